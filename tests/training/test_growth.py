"""A new task with an A of its own on an earlier adapter, which stays what it is: bit for bit, and taken out again."""

import hashlib
import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import lora_config, make_llama, make_rows, make_tokenizer, make_trainer

from lori_trl import LoriMasks, load_lori_adapter, merge_lori_adapters
from lori_trl.cli import main, sft
from lori_trl.compact import expand, export_compact
from lori_trl.continual import extract_task, read_ledger, remove_task
from lori_trl.method.sparsity import num_to_select
from lori_trl.training import activations
from lori_trl.training.trainers import LoriDPOConfig, LoriDPOTrainer

TOKENS = torch.arange(3, 33).view(2, 15)
FILES = ("adapter_model.safetensors", "lori_config.json", "README.md")


def trainer_of(folder, task, start=None, **changes):
    model = load_lori_adapter(make_llama(), start, is_trainable=True) if start is not None else None
    return make_trainer(folder, model, train_dataset=make_rows().shuffle(seed=len(task)), task_name=task, **changes)


def train(folder, task, start=None, **changes):
    trainer = trainer_of(folder, task, start, **changes)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Three tasks, each with an A of its own: drawn, contrastive, and all of the new columns of a drawn one."""
    root = tmp_path_factory.mktemp("grown")
    train(root / "math", "math", save_moments=True, protect_rows=8)
    before = hashes(root / "math")
    contrastive = {"projection_init": "contrastive", "protect": [str(root / "math")], "protect_rows": 8}
    train(root / "code", "code", root / "math", grow=2, **contrastive)
    train(root / "nlu", "nlu", root / "code", grow=4, sparsity=0.0, sparse_backend="hook")
    assert hashes(root / "math") == before  # what is read is never changed
    return root


def hashes(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weights(folder, part="lora_"):
    return {name: tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items() if part in name}


def same(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def settings(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return {**config, "target_modules": sorted(config["target_modules"])}  # PEFT writes a set, in any order


def logits(folder):
    model = PeftModel.from_pretrained(make_llama(), folder).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def same_adapter(mine, theirs, names=FILES):
    """Whether two folders hold one adapter, to the last byte."""
    masks = sorted(file.name for file in (theirs / "masks").iterdir())
    files = [*names, *(f"masks/{name}" for name in masks)]
    assert sorted(file.name for file in (mine / "masks").iterdir()) == masks
    assert settings(mine) == settings(theirs)
    return all((mine / name).read_bytes() == (theirs / name).read_bytes() for name in files)


def test_the_earlier_rows_and_columns_stay_and_the_new_ones_are_trained(grown):
    first, second, third = (weights(grown / task) for task in ("math", "code", "nlu"))
    for name in first:
        part = (slice(4),) if ".lora_A." in name else (slice(None), slice(4))
        two = (slice(6),) if ".lora_A." in name else (slice(None), slice(6))
        assert torch.equal(second[name][part], first[name]) and torch.equal(third[name][two], second[name])
        if ".lora_B." in name:
            assert third[name][:, 6:].all()  # LoRI-D: all of the new columns
    assert [settings(grown / task)[key] for task in ("code", "nlu") for key in ("r", "lora_alpha")] == [6, 12, 10, 20]
    masks = {task: LoriMasks.from_pretrained(grown / "nlu", task=task) for task in ("math", "code", "nlu")}
    B = [tensor for name, tensor in first.items() if ".lora_B." in name]
    assert masks["code"].num_selected == num_to_select(0.9, sum(2 * len(each) for each in B))
    for path, mask in masks["code"].items():
        assert not mask[:, :4].any() and not mask[:, 6:].any() and not masks["math"][path][:, 4:].any()
    code = weights(grown / "code", "lora_B")
    assert all(
        code[f"base_model.model.{path}.lora_B.weight"][:, :6][mask[:, :6]].all()
        for path, mask in masks["code"].items()
    )
    config = json.loads((grown / "nlu" / "lori_config.json").read_text())
    assert [block["init"] for block in config["projection"]["blocks"]] == ["gaussian", "contrastive", "gaussian"]
    assert config["projection"]["blocks"][1]["protected"] == ["math"]
    assert [task["columns"] for task in config["tasks"]] == [[0, 4], [4, 6], [6, 10]]
    card = (grown / "code" / "README.md").read_text()
    assert "its seed is not on record" not in card and "rows 5 to 6" in card


def test_before_it_is_trained_it_computes_what_the_earlier_one_does(grown, tmp_path):
    trainer = trainer_of(tmp_path, "code", grown / "math", grow=2)
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(TOKENS).logits, logits(grown / "math"), rtol=1e-6, atol=1e-6)


def test_plain_peft_computes_what_was_trained(grown):
    model = load_lori_adapter(make_llama(), grown / "nlu").eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits(grown / "nlu"))
    assert list(model.lori_masks) == ["math", "code", "nlu"]
    assert not torch.allclose(logits(grown / "nlu"), logits(grown / "math"))


def test_the_first_task_comes_out_as_the_adapter_that_it_was(grown, tmp_path):
    extract_task(grown / "nlu", "math", tmp_path / "math")
    assert same_adapter(tmp_path / "math", grown / "math")
    assert torch.equal(logits(tmp_path / "math"), logits(grown / "math"))


def test_a_later_task_comes_out_with_its_own_rows_of_A(grown, tmp_path):
    extract_task(grown / "nlu", "code", tmp_path / "code")
    whole, own = weights(grown / "nlu"), weights(tmp_path / "code")
    for name in own:
        assert torch.equal(own[name], whole[name][4:6] if ".lora_A." in name else whole[name][:, 4:6])
    assert (settings(tmp_path / "code")["r"], settings(tmp_path / "code")["lora_alpha"]) == (2, 4)
    masks = load_lori_adapter(make_llama(), tmp_path / "code").lori_masks["code"]
    assert masks.projection.init == "contrastive" and masks.projection.blocks is None
    assert logits(tmp_path / "code").isfinite().all()


def test_a_task_is_removed_with_its_columns(grown, tmp_path):
    remove_task(grown / "nlu", "nlu", tmp_path / "without-nlu")
    assert same_adapter(tmp_path / "without-nlu", grown / "code")
    remove_task(grown / "nlu", "code", tmp_path / "without-code")
    kept = [0, 1, 2, 3, 6, 7, 8, 9]
    whole, left = weights(grown / "nlu"), weights(tmp_path / "without-code")
    for name in left:
        assert torch.equal(left[name], whole[name][kept] if ".lora_A." in name else whole[name][:, kept])
    ledger = read_ledger(tmp_path / "without-code")
    assert [(each.task, each.columns) for each in ledger.tasks] == [("math", (0, 4)), ("nlu", (4, 8))]
    remove_task(tmp_path / "without-code", "nlu", tmp_path / "math")
    assert same_adapter(tmp_path / "math", grown / "math")


def test_an_adapter_whose_rows_are_exchanged_is_not_taken_apart(grown, tmp_path):
    shutil.copytree(grown / "code", tmp_path / "changed")
    file = tmp_path / "changed" / "lori_config.json"
    record = json.loads(file.read_text())
    record["projection"]["blocks"][0]["fingerprint"] = record["projection"]["blocks"][1]["fingerprint"]
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="rows of A are not those that its record names"):
        extract_task(tmp_path / "changed", "math", tmp_path / "math", allow_modified=True)


def test_a_further_task_may_share_the_grown_A(grown, tmp_path):
    """It has entries in all columns, so that none go when it is taken out; the first still comes out whole."""
    trainer = train(tmp_path / "more", "more", grown / "code", disjoint_masks=True, sparsity=0.5)
    assert trainer.run.columns is None and trainer.projection.blocks is not None
    assert any(mask[:, :4].any() for mask in trainer.masks.values())
    assert any(mask[:, 4:].any() for mask in trainer.masks.values())
    extract_task(tmp_path / "more", "math", tmp_path / "math")
    assert same_adapter(tmp_path / "math", grown / "math")
    train(tmp_path / "last", "last", tmp_path / "more", grow=2)
    ledger = read_ledger(tmp_path / "last")
    assert [each.columns for each in ledger.tasks] == [(0, 4), (4, 6), (0, 6), (6, 8)]
    remove_task(tmp_path / "last", "last", tmp_path / "without")
    record, before = (json.loads((tmp_path / name / FILES[1]).read_text()) for name in ("without", "more"))
    assert same(weights(tmp_path / "without"), weights(tmp_path / "more"))
    assert record["projection"] == before["projection"] and record["counts"] == before["counts"]


def test_a_grown_task_goes_on_with_its_own_masks(grown, tmp_path):
    trainer = train(tmp_path / "again", "code", grown / "code")
    assert trainer.masks == LoriMasks.from_pretrained(grown / "code", task="code") and trainer.run.columns == (4, 6)
    extract_task(tmp_path / "again", "math", tmp_path / "math")
    assert same_adapter(tmp_path / "math", grown / "math")


@pytest.mark.parametrize(
    ("init", "checkpoint"), [("gaussian", "calibration/checkpoint-2"), ("contrastive", "checkpoint-2")]
)
def test_a_run_that_is_resumed_is_the_undisturbed_one(grown, tmp_path, monkeypatch, init, checkpoint):
    changes = {"grow": 2, "projection_init": init, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path / "run", "code", grown / "math", **changes)
    compute = activations.contrastive_projections  # another machine computes other last digits
    elsewhere = lambda *args, **named: {path: A * (1 + 1e-6) for path, A in compute(*args, **named).items()}  # noqa: E731
    monkeypatch.setattr(activations, "contrastive_projections", elsewhere)
    resumed = trainer_of(tmp_path / "run", "code", grown / "math", **changes)
    assert (resumed.projection == whole.projection) == (init == "gaussian")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / checkpoint))
    assert resumed.masks == whole.masks
    assert resumed.projection == whole.projection == resumed.run.earlier_masks["math"].projection
    assert all(torch.equal(resumed.weights[path], whole.weights[path]) for path in whole.weights)
    with pytest.raises(ValueError, match="this run has"):
        other = trainer_of(tmp_path / "run", "code", grown / "math", **changes | {"grow": 4})
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity": 0.0},
        pytest.param({"calibration_method": "random"}, marks=pytest.mark.release),
        pytest.param({"calibration_method": "gradient"}, marks=pytest.mark.release),
    ],
)
def test_both_backends_train_the_same_entries(grown, tmp_path, changes):
    runs = [
        train(tmp_path / each, "code", grown / "math", grow=2, sparse_backend=each, **changes)
        for each in ("packed", "hook")
    ]
    assert runs[0].masks == runs[1].masks
    packed, hook = (weights(tmp_path / each) for each in ("packed", "hook"))
    for name in packed:
        torch.testing.assert_close(packed[name], hook[name], rtol=1e-5, atol=1e-6)
    extract_task(tmp_path / "hook", "math", tmp_path / "math")
    assert same_adapter(tmp_path / "math", grown / "math")


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_the_compact_form_stores_the_rows_that_no_seed_draws(grown, tmp_path, dtype):
    file = export_compact(grown / "nlu", tmp_path / "nlu.safetensors", dtype=dtype)
    with safe_open(file, "pt") as tensors:
        stored = {
            name: tensors.get_slice(name).get_shape()
            for name in tensors.keys()
            if ".lora_A." in name or name.startswith("A.")
        }  # noqa: E501, SIM118
    assert stored and {shape[0] for shape in stored.values()} == {2}  # of ten rows the two from activations
    expand(file, tmp_path / "nlu")
    if dtype is None:
        assert same(weights(tmp_path / "nlu"), weights(grown / "nlu"))
        extract_task(tmp_path / "nlu", "math", tmp_path / "math")
        assert same(weights(tmp_path / "math"), weights(grown / "math"))
    else:
        A, exact = weights(tmp_path / "nlu", "lora_A"), weights(grown / "nlu", "lora_A")
        assert all(
            torch.equal(A[name][:4], exact[name][:4]) and torch.equal(A[name][6:], exact[name][6:]) for name in A
        )
        assert not same(A, exact)
        remove_task(tmp_path / "nlu", "code", tmp_path / "left")  # every block's fingerprint is the one that is read
        extract_task(tmp_path / "nlu", "code", tmp_path / "code")
    assert list(load_lori_adapter(make_llama(), tmp_path / "nlu").lori_masks) == ["math", "code", "nlu"]


def test_a_grown_adapter_is_merged_inspected_and_told_apart(grown, tmp_path, caplog, capsys):
    other = tmp_path / "other"
    train(other, "other")
    merge_lori_adapters([grown / "nlu", other], 1.0, "concat", tmp_path / "merged")
    assert "rows of A in common" not in caplog.text
    merged, first, second = (weights(folder) for folder in (tmp_path / "merged", grown / "nlu", other))
    for name, B in ((name, B) for name, B in merged.items() if ".lora_B." in name):
        A = name.replace("lora_B", "lora_A")
        delta = first[name] @ first[A] + second[name] @ second[A]
        torch.testing.assert_close(B @ merged[A], delta, rtol=1e-4, atol=1e-6)
    record = json.loads((tmp_path / "merged" / "lori_config.json").read_text())
    assert [task["task"] for task in record["tasks"]] == ["math", "code", "nlu", "other"]
    assert not any("columns" in task for task in record["tasks"])
    merge_lori_adapters([grown / "nlu", grown / "math"], 0.5, "concat", tmp_path / "twice")
    assert "`nlu` and `math` have 4 rows of A in common" in caplog.text
    merge_lori_adapters([grown / "nlu"], 1.0, "svd", tmp_path / "svd", rank=4)
    assert settings(tmp_path / "svd")["r"] == 4
    assert main(["inspect", str(grown / "nlu"), str(other)]) == 0
    assert main(["tasks", str(grown / "nlu")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "7 to 10" in shown and "rank 10: `vllm serve --max-lora-rank 16`" in shown


def test_dpo_grows_an_adapter_and_its_reference_stays(grown, tmp_path):
    rows = Dataset.from_list([{"prompt": f"w{n} w5", "chosen": f" w{n + 1}", "rejected": " w9"} for n in range(16)])
    args = LoriDPOConfig(
        str(tmp_path / "dpo"), grow=2, use_cpu=True, report_to="none", task_name="preferences", max_steps=1,
        per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no", activation_checkpointing=False,
        logging_steps=1, sparsity=0.0,
    )  # fmt: skip
    model = load_lori_adapter(make_llama(), grown / "math", is_trainable=True)
    trainer = LoriDPOTrainer(model, args=args, train_dataset=rows, processing_class=make_tokenizer())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference agree
    trainer.save_model()
    extract_task(tmp_path / "dpo", "math", tmp_path / "math")
    assert same_adapter(tmp_path / "math", grown / "math")


def test_what_cannot_be_grown_is_refused(grown, tmp_path):
    def grow(start=grown / "math", task="code", **changes):
        return trainer_of(tmp_path / "run", task, start, **{"grow": 2} | changes)

    with pytest.raises(ValueError, match="`grow=2`, but the adapter is a new one"):
        grow(None)
    with pytest.raises(ValueError, match="`grow=0` is outside"):
        grow(grow=0)
    with pytest.raises(ValueError, match="no task of the adapter is on record"):
        plain = PeftModel.from_pretrained(make_llama(), grown / "math", is_trainable=True)
        make_trainer(tmp_path / "run", plain, grow=2)
    with pytest.raises(ValueError, match="masks belong to an A"):
        grow(mask_name_or_path=str(grown / "math"))
    with pytest.raises(ValueError, match="the adapter has this task already"):
        grow(task="math")
    seed = json.loads((grown / "math" / "lori_config.json").read_text())["projection"]["seed"]
    with pytest.raises(ValueError, match=f"projection seed {seed}, from which the adapter has rows of A"):
        grow(projection_seed=seed)
    train(tmp_path / "patterns", "math", peft_config=lora_config(rank_pattern={"q_proj": 2}))
    with pytest.raises(ValueError, match="the adapter has a `rank_pattern`"):
        grow(tmp_path / "patterns")
    train(tmp_path / "odd", "math", peft_config=lora_config(r=17))
    with pytest.raises(ValueError, match="at rank 25, no `lora_alpha` gives .* Allowed nearby are 9, 10, 11"):
        grow(tmp_path / "odd", grow=8)
    train(tmp_path / "dense", "math", peft_config=lora_config(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="1 parameters besides B are trained"):
        grow(tmp_path / "dense")


def test_the_command_line_grows_an_adapter(tmp_path, model_folder, rows, capsys):
    rows.to_json(tmp_path / "rows.jsonl")
    options = {
        "model_name_or_path": model_folder, "dataset_path": tmp_path / "rows.jsonl", "max_steps": 2,
        "calibration_max_steps": 2, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "save_strategy": "no",
        "report_to": "none", "lora_r": 4, "lora_alpha": 8,
    }  # fmt: skip
    call = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    assert sft([*call, "--task_name", "first", "--output_dir", str(tmp_path / "first")]) == 0
    more = [*call, "--task_name", "next", "--adapter_name_or_path", str(tmp_path / "first"), "--grow", "4"]
    assert sft([*more, "--output_dir", str(tmp_path / "two"), "--dry_run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the adapter is grown to rank 8: `vllm serve --max-lora-rank 8`" in shown
    assert sft([*more, "--output_dir", str(tmp_path / "two")]) == 0
    trained = LoriMasks.from_pretrained(tmp_path / "two", task="next")
    assert f"{trained.num_selected:,}" in shown and "rank 8" in " ".join(capsys.readouterr().out.split())
    assert main(["tasks", str(tmp_path / "two"), "--extract", "first", "--output_dir", str(tmp_path / "alone")]) == 0
    assert same_adapter(tmp_path / "alone", tmp_path / "first", FILES[:2])  # a card tells of a recipe
    with pytest.raises(SystemExit) as refused:
        sft([*call, "--grow", "4", "--output_dir", str(tmp_path / "none")])
    assert refused.value.code == 2 and "but the adapter is a new one" in capsys.readouterr().err
