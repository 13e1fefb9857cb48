"""Several tasks in one adapter: disjoint masks, the ledger, and taking a task out again bit for bit."""

import json
import re
import shutil

import pytest
import torch
from files_by_hand import read_tensors
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import make_llama, make_rows, make_trainer

from lori_trl import LoriMasks, LoriSFTTrainer, load_lori_adapter, merge_lori_adapters
from lori_trl.cli import main
from lori_trl.compact import export_compact
from lori_trl.continual import extract_task, feasible_entries, read_ledger, remove_task, tasks_that_fit
from lori_trl.method.sparsity import num_to_select

TASKS = ("math", "code", "nlu")


def train(folder, task, start=None, **changes):
    """Train a task on the tiny model, from a fresh adapter or from that in `start`; return the trainer."""
    model = load_lori_adapter(make_llama(), start, is_trainable=True) if start is not None else None
    data = make_rows().shuffle(seed=len(task))
    changes = {"disjoint_masks": True} | changes
    trainer = make_trainer(folder, model, train_dataset=data, task_name=task, **changes)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def sequence(tmp_path_factory):
    """Three disjoint tasks in a row: task -> the folder as it was after that task."""
    root, start = tmp_path_factory.mktemp("loraf"), None
    folders = {}
    for task in TASKS:
        folders[task] = root / task
        train(folders[task], task, start)
        start = folders[task]
    return folders


def weights(folder, part="lora_B"):
    return {name: tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items() if part in name}


def peft_config(folder):
    """PEFT keeps the target modules as a set, which it writes in any order."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return {**config, "target_modules": sorted(config["target_modules"])}


def values(folder, masks):
    return {name: B[masks[name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")]]
            for name, B in weights(folder).items()}  # fmt: skip


def same(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_disjoint_tasks_never_touch_each_others_entries(sequence):
    masks = {task: LoriMasks.from_pretrained(sequence["nlu"], task=task) for task in TASKS}
    for task, other in (("math", "code"), ("math", "nlu"), ("code", "nlu")):
        assert (masks[task] & masks[other]).num_selected == 0
    for task in TASKS:
        assert masks[task].num_selected == num_to_select(0.9, masks[task].numel)
        assert same(values(sequence["nlu"], masks[task]), values(sequence[task], masks[task]))
        assert any(tensor.any() for tensor in values(sequence[task], masks[task]).values())
    assert same(weights(sequence["nlu"], "lora_A"), weights(sequence["math"], "lora_A"))


def test_without_disjoint_masks_tasks_do_overlap(sequence, tmp_path):
    train(tmp_path / "two", "code", sequence["math"], disjoint_masks=False)
    math, code = (LoriMasks.from_pretrained(tmp_path / "two", task=task) for task in ("math", "code"))
    assert (math & code).num_selected > 0
    with pytest.raises(ValueError, match="='code'` shares entries of B: .* with math. .*disjoint_masks=True"):
        extract_task(tmp_path / "two", "code", tmp_path / "code")
    assert not (tmp_path / "code").exists()
    ledger = read_ledger(tmp_path / "two")
    assert [task.owned for task in ledger.tasks] == [(math - code).num_selected, code.num_selected]
    assert ledger.free == ledger.numel - (math | code).num_selected


def test_calibration_moves_free_entries_only(sequence):
    trainer = None

    def note(self, *args, **kwargs):
        nonlocal trainer
        trainer = self
        before = {path: weight.detach().clone() for path, weight in self.weights.items()}
        reset(self)
        for path, weight in self.weights.items():
            assert torch.equal(before[path][~self.run.feasible[path]], weight[~self.run.feasible[path]])

    reset = LoriSFTTrainer._set_B_back
    try:
        LoriSFTTrainer._set_B_back = note
        train(sequence["math"].parent / "again", "code", sequence["math"])
    finally:
        LoriSFTTrainer._set_B_back = reset
    assert trainer.run.feasible == ~trainer.run.earlier_masks["math"]
    assert trainer.masks == LoriMasks.from_pretrained(sequence["code"], task="code")  # and the run is repeatable


def test_removing_the_newest_task_is_never_having_trained_it(sequence, tmp_path):
    remove_task(sequence["nlu"], "nlu", tmp_path / "without")
    assert same(weights(tmp_path / "without", "lora"), weights(sequence["code"], "lora"))
    for name in ("lori_config.json", "README.md"):
        assert (tmp_path / "without" / name).read_text() == (sequence["code"] / name).read_text()
    assert peft_config(tmp_path / "without") == peft_config(sequence["code"])
    assert sorted(path.name for path in (tmp_path / "without" / "masks").iterdir()) == [
        "code.safetensors",
        "math.safetensors",
    ]
    model = load_lori_adapter(make_llama(), tmp_path / "without")
    assert list(model.lori_masks) == ["math", "code"]


def test_removing_an_earlier_task_leaves_the_others_bit_identical(sequence, tmp_path):
    masks = {task: LoriMasks.from_pretrained(sequence["nlu"], task=task) for task in TASKS}
    remove_task(sequence["nlu"], "math", tmp_path / "without")
    for task in ("code", "nlu"):
        assert same(values(tmp_path / "without", masks[task]), values(sequence["nlu"], masks[task]))
    assert not any(tensor.any() for tensor in values(tmp_path / "without", masks["math"]).values())
    config = json.loads((tmp_path / "without" / "lori_config.json").read_text())
    assert [record["task"] for record in config["tasks"]] == ["code", "nlu"] and config["task"] == "nlu"


def test_extracted_tasks_sum_back_to_the_whole(sequence, tmp_path):
    whole = weights(sequence["nlu"])
    total = {name: torch.zeros_like(B) for name, B in whole.items()}
    for task in TASKS:
        extract_task(sequence["nlu"], task, tmp_path / task)
        for name, B in weights(tmp_path / task).items():
            total[name] += B
        config = json.loads((tmp_path / task / "lori_config.json").read_text())
        assert config["task"] == task and len(config["tasks"]) == 1
        assert config["counts"]["selected"] == LoriMasks.from_pretrained(tmp_path / task).num_selected
    assert same(total, whole)
    # math was the first: alone, it is the adapter that was trained first, and so says its config
    assert same(weights(tmp_path / "math", "lora"), weights(sequence["math"], "lora"))
    assert (tmp_path / "math" / "lori_config.json").read_text() == (sequence["math"] / "lori_config.json").read_text()


def test_an_extracted_task_loads_with_plain_peft_and_can_be_continued(sequence, tmp_path):
    extract_task(sequence["nlu"], "code", tmp_path / "code")
    plain = PeftModel.from_pretrained(make_llama(), tmp_path / "code")
    ours = load_lori_adapter(make_llama(), tmp_path / "code")
    tokens = torch.arange(8)[None]
    assert torch.equal(plain(tokens).logits, ours(tokens).logits)
    trainer = train(tmp_path / "more", "more", tmp_path / "code")
    assert list(trainer.run.all_masks) == ["code", "more"]


def test_both_backends_find_the_same_disjoint_masks(sequence, tmp_path):
    trainer = train(tmp_path / "hook", "code", sequence["math"], sparse_backend="hook")
    assert trainer.masks == LoriMasks.from_pretrained(sequence["code"], task="code")
    for name, B in weights(tmp_path / "hook").items():
        torch.testing.assert_close(B, weights(sequence["code"])[name], rtol=1e-5, atol=1e-6)


def test_the_history_has_every_tasks_run(sequence):
    model = load_lori_adapter(make_llama(), sequence["nlu"])
    assert [record["task"] for record in model.lori_tasks] == list(TASKS)
    for record in model.lori_tasks:
        assert record["training"]["dataset"]["rows"] == 32 and record["training"]["steps"] == 4
        assert record["calibration"]["steps"] == 4
    config = json.loads((sequence["nlu"] / "lori_config.json").read_text())
    assert config["tasks"][-1].keys() == {"task", "selected"}  # the newest task's facts are at the top


def test_a_task_that_is_there_goes_on_with_its_own_masks(sequence, tmp_path):
    trainer = train(tmp_path / "again", "math", sequence["code"])
    assert trainer.masks == LoriMasks.from_pretrained(sequence["math"]) and trainer.run.calibration is None
    config = json.loads((tmp_path / "again" / "lori_config.json").read_text())
    assert [record["task"] for record in config["tasks"]] == ["code", "math"]
    code = LoriMasks.from_pretrained(sequence["code"], task="code")
    assert same(values(tmp_path / "again", code), values(sequence["code"], code))
    masks = sequence["code"] / "masks" / "code.safetensors"
    with pytest.raises(ValueError, match="`task_name='math'`: the adapter has this task with other masks"):
        train(tmp_path / "third", "math", sequence["code"], mask_name_or_path=str(masks))


def test_masks_that_overlap_are_refused(sequence, tmp_path):
    given = str(LoriMasks.from_pretrained(sequence["math"]).save_pretrained(tmp_path))
    with pytest.raises(ValueError, match="entries of the given masks belong to math"):
        train(tmp_path / "out", "code", sequence["math"], mask_name_or_path=given)


def test_when_the_free_entries_run_out(sequence, tmp_path):
    with pytest.raises(ValueError, match="`sparsity=0.2`.* math, code, nlu left .* sparsity from 0.2") as error:
        train(tmp_path / "out", "more", sequence["nlu"], sparsity=0.2)
    assert not list((tmp_path / "out").glob("*")), "the error comes before training"
    least = float(str(error.value).split("from ")[1].split(" ")[0])
    assert train(tmp_path / "out", "more", sequence["nlu"], sparsity=least).masks.num_selected > 0
    with pytest.raises(ValueError, match="`sparsity=0.0`"):
        train(tmp_path / "dense", "dense", sequence["nlu"], sparsity=0.0)


def test_entries_of_unknown_origin_are_refused(sequence, tmp_path):
    model = PeftModel.from_pretrained(make_llama(), sequence["math"], is_trainable=True)
    with pytest.raises(ValueError, match="belong to no task on record.*load_lori_adapter"):
        make_trainer(tmp_path / "out", model, disjoint_masks=True)


def test_feasible_entries_and_room():
    masks = LoriMasks({"layers.0.q": torch.eye(4, dtype=torch.bool), "layers.1.q": torch.zeros(4, 4).bool()})
    free = feasible_entries({path: mask.shape for path, mask in masks.items()}, {"one": masks})
    assert free == ~masks and free.num_selected == 28
    assert tasks_that_fit(free, 0.75) == 3  # 28 free, 8 a task
    assert tasks_that_fit(free, 0.75, "layer") == 3  # layer 0: 12 free, 4 a task
    assert tasks_that_fit(free, 0.5, "layer") == 1 and tasks_that_fit(free, 0.0) == 0
    assert feasible_entries({"q": (2, 2)}, {}).num_selected == 4


def test_the_ledger(sequence, capsys):
    ledger = read_ledger(sequence["nlu"])
    each = num_to_select(0.9, ledger.numel)
    assert [(task.task, task.trained, task.owned) for task in ledger.tasks] == [(task, each, each) for task in TASKS]
    assert ledger.free == ledger.numel - 3 * each and ledger.more_tasks == ledger.free // each
    assert main(["tasks", str(sequence["nlu"])]) == 0
    shown = capsys.readouterr().out
    assert f"{ledger.free:,}" in shown and f"{ledger.more_tasks} more disjoint tasks of sparsity 0.9 fit" in shown


def test_the_command_line_extracts_and_removes(sequence, tmp_path, capsys):
    assert main(["tasks", str(sequence["nlu"]), "--remove", "nlu", "--output_dir", str(tmp_path / "two")]) == 0
    assert same(weights(tmp_path / "two"), weights(sequence["code"]))
    compact = export_compact(sequence["nlu"], tmp_path / "compact.safetensors")
    assert main(["tasks", str(compact), "--extract", "math", "--output_dir", str(tmp_path / "one")]) == 0
    assert same(weights(tmp_path / "one"), weights(sequence["math"]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{nlu}", "--extract", "maths", "--output_dir", "{new}"], "`task='maths'` is not in .* It has math, "),
        (["{nlu}", "--remove", "../nlu", "--output_dir", "{new}"], "is not in"),
        (["{math}", "--remove", "math", "--output_dir", "{new}"], "is the only task of"),
        (["{nlu}", "--extract", "math", "--output_dir", "{full}"], "is not empty"),
        (["{nlu}", "--extract", "math"], "go together"),
        (["{nlu}", "--output_dir", "{new}"], "go together"),
        (["{new}"], "does not exist"),
        (["{merged}"], "is a merged adapter"),
    ],
)
def test_wrong_calls_change_nothing(arguments, message, sequence, tmp_path, capsys):
    full, merged = tmp_path / "full", tmp_path / "merged"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    merge_lori_adapters([sequence["nlu"]], 1.0, output_dir=merged)
    places = {**sequence, "new": tmp_path / "new", "full": full, "merged": merged}
    with pytest.raises(SystemExit) as exit:
        main(["tasks", *(argument.format(**places) for argument in arguments)])
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists() and [path.name for path in full.iterdir()] == ["mine.txt"]


def test_a_shape_that_does_not_fit_is_refused(sequence, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(sequence["nlu"], folder)
    state = read_tensors(folder / "adapter_model.safetensors")
    name = next(name for name in state if "lora_B" in name)
    save_file({**state, name: state[name][:-1].contiguous()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="do not fit the adapter in 1 modules"):
        extract_task(folder, "math", tmp_path / "out")
    assert not (tmp_path / "out").exists()
