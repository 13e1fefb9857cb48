"""The search for weights: its losses are those of the merges."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from merging.adapters import write_adapter
from peft import PeftModel
from tiny import lora_config, make_trainer
from transformers import AutoModelForCausalLM

from lori_trl import merge_lori_adapters
from lori_trl.adapter.record import read_record
from lori_trl.cli import main
from lori_trl.evaluation import CompletionLoss, completion_loss
from lori_trl.merging.search import default_grid, search_merge_weights


@pytest.fixture(scope="module")
def searched(tmp_path_factory, model_folder) -> tuple[list[Path], dict[str, Path]]:
    """Two adapters that know their own words by heart, too strongly, and a held-out file of each."""
    folder = tmp_path_factory.mktemp("searched")
    adapters, heldout = [], {}
    for word in ("w7", "w8"):
        rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" {word} {word}"} for i in range(20, 32)]
        heldout[word] = folder / f"{word}.jsonl"
        heldout[word].write_text("\n".join(map(json.dumps, rows[:8])))
        changes = {"task_name": word, "sparsity": 0.0, "max_steps": 30, "learning_rate": 1e-2}
        trainer = make_trainer(
            folder / f"{word}-lori",
            str(model_folder),
            peft_config=lora_config(),
            train_dataset=Dataset.from_list(rows),
            **changes,
        )
        trainer.train()
        trainer.save_model()
        adapters.append(folder / f"{word}-lori")
    return adapters, heldout


def read_rows(heldout: dict[str, Path]) -> dict[str, list]:
    return {name: list(map(json.loads, file.read_text().splitlines())) for name, file in heldout.items()}


@pytest.mark.parametrize("method", ["concat", "linear", "dare"])
def test_the_losses_of_a_search_are_those_of_the_merges(searched, tmp_path, model_folder, tokenizer, method):
    adapters, heldout = searched
    rows, density = read_rows(heldout), 0.8 if method == "dare" else None
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    search = search_merge_weights(
        adapters, rows, model, tokenizer, method=method, strategy="shared", grid=(0.5, 1.0), density=density, seed=3
    )
    assert [trial.weights for trial in search.trials] == [(0.5, 0.5), (1.0, 1.0)]
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    for name in rows:
        assert search.base.losses[name] == pytest.approx(completion_loss(model, tokenizer, rows[name]).loss, rel=1e-6)
    for trial in search.trials:
        folder = tmp_path / str(trial.weights[0])
        merge_lori_adapters(adapters, trial.weights, method, folder, density=density, seed=3)
        merged = PeftModel.from_pretrained(model, folder)
        for name, loss in trial.losses.items():
            assert loss == pytest.approx(completion_loss(merged, tokenizer, rows[name]).loss, rel=1e-5)
        model = merged.unload()


def test_a_coordinate_search_goes_on_from_the_best_shared_weight(searched, tokenizer, model_folder):
    adapters, heldout = searched
    rows = read_rows({"w7": heldout["w7"]})  # only the first adapter's task counts
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    grid = (0.1, 0.5, 1.0)
    shared = search_merge_weights(adapters, rows, model, tokenizer, grid=grid, strategy="shared")
    search = search_merge_weights(adapters, rows, model, tokenizer, grid=grid, strategy="coordinate")
    assert search.trials[:3] == shared.trials and len({trial.weights for trial in search.trials}) == len(search.trials)
    assert search.best.objective <= shared.best.objective
    assert search.best.weights[0] > search.best.weights[1]
    for number in range(2):  # no single change within the grid is better
        for weight in grid:
            weights = list(search.best.weights)
            weights[number] = weight
            tried = {trial.weights: trial.objective for trial in search.trials}
            assert tried[tuple(weights)] >= search.best.objective


def test_conversations_are_measured_in_the_template_that_the_adapters_bring(searched, tmp_path):
    adapters = [shutil.copytree(folder, tmp_path / folder.name) for folder in searched[0]]
    for folder in adapters:
        (folder / "chat_template.jinja").write_text(
            "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        )
    prompt, completion = ([{"role": "user", "content": word}] for word in ("w1", "w2"))
    heldout = {"chat": [{"prompt": prompt, "completion": completion}]}
    assert search_merge_weights(adapters, heldout, grid=[0.5]).best.losses["chat"] > 0


def test_the_command_line_searches_merges_and_keeps_the_table(searched, tmp_path, capsys):
    adapters, heldout = searched
    files = [str(file) for file in heldout.values()]
    arguments = [*map(str, adapters), "--search", "shared", "--grid", "0.2", "0.6", "--heldout", *files]
    arguments += ["--dtype", "bfloat16", "--load_in_4bit"]
    assert main(["merge", *arguments, "--output_dir", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr().out
    assert "completion loss by weights" in printed and "base model" in printed
    config = json.loads((tmp_path / "merged" / "lori_config.json").read_text())
    search = config["merge"]["search"]
    assert [trial["weights"] for trial in search["trials"]] == [[0.2, 0.2], [0.6, 0.6]]
    best = min(search["trials"], key=lambda trial: trial["objective"])
    assert best["objective"] == pytest.approx(sum(best["losses"].values()) / 2)
    assert best["objective"] < sum(search["base"].values()) / 2
    assert [adapter["weight"] for adapter in config["merge"]["adapters"]] == best["weights"]
    assert f"{best['objective']:.4f}" in printed and str(tmp_path) not in json.dumps(config)


def test_a_wrong_search_is_one_message(searched, tmp_path, capsys, model_folder):
    adapters, heldout = searched
    file = str(heldout["w7"])
    other = str(write_adapter(tmp_path / "other", base=str(model_folder)))
    for arguments, says in (
        (["--heldout", file, "--weights", "1"], "`--heldout` without `--search`"),
        (["--dtype", "bfloat16", "--load_in_4bit"], "`--dtype --load_in_4bit` without `--search`"),
        (["--search", "shared"], "`heldout` names no data"),
        (["--search", "shared", "--heldout", file, file], "names a file twice"),
        (["--search", "shared", "--heldout", file, "--grid", "0"], "`grid=[0.0]` is empty or has a 0"),
        (["--search", "shared", "--heldout", file, "--weights", "1"], "exclude each other"),
        (["--search", "shared", "--heldout", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(["merge", *map(str, adapters), *arguments, "--output_dir", str(tmp_path / "merged")])
        assert raised.value.code == 2 and says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["merge", other, "--search", "shared", "--heldout", file, "--output_dir", str(tmp_path / "merged")])
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_held_out_rows_alone_mean_a_coordinate_search(searched, tmp_path):
    adapters, heldout = searched
    files = [str(file) for file in heldout.values()]
    output = tmp_path / "merged"
    assert (
        main(["merge", *map(str, adapters), "--heldout", *files, "--grid", "0.4", "0.8", "--output_dir", str(output)])
        == 0
    )
    assert read_record(output).merge.search["strategy"] == "coordinate"


def test_the_grid_of_linear_is_the_square_root_of_the_others():
    """Its weights enter the delta squared."""
    assert [weight**2 for weight in default_grid("linear")] == pytest.approx(default_grid("concat"), rel=1e-3)
    assert all(1.25 < high / low < 1.36 for low, high in pairwise(default_grid("concat")))


def test_weights_whose_loss_is_no_number_are_never_the_best(searched, model_folder, tokenizer, monkeypatch):
    adapters, heldout = searched
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    losses = iter([3.0, float("nan"), 2.0, float("inf")])  # of the base, and of three weights
    monkeypatch.setattr(
        "lori_trl.merging.search.completion_loss", lambda *_, **__: CompletionLoss(next(losses), 1, 0.0)
    )
    one = {"w7": read_rows(heldout)["w7"]}
    search = search_merge_weights(adapters, one, model, tokenizer, strategy="shared", grid=(0.1, 0.2, 0.3))
    assert search.best.weights == (0.2, 0.2)
    assert [trial["objective"] for trial in search.record["trials"]] == [None, 2.0, None]
    json.dumps(search.record, allow_nan=False)
    losses = iter([3.0, float("nan")])
    with pytest.raises(ValueError, match=r"No weights of the grid 0.1 give a loss that is a number"):
        search_merge_weights(adapters, one, model, tokenizer, strategy="shared", grid=(0.1,))


def test_held_out_rows_are_checked_before_the_base_is_loaded(searched, tmp_path, monkeypatch, capsys):
    adapters, _ = searched
    monkeypatch.setattr("lori_trl.merging.search.load_model", lambda *_, **__: pytest.fail("the base was loaded"))
    file = tmp_path / "talk.jsonl"
    talk = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    for rows, part in (([talk], "has no chat template"), ([talk, {"messages": []}], "Row 1 of `talk.jsonl` has")):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(SystemExit, match="2"):
            main(["merge", *map(str, adapters), "--heldout", str(file), "--output_dir", str(tmp_path / "out")])
        assert part in capsys.readouterr().err
