"""`lori eval`: one table for the base and several models, and one message for a wrong call."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from evaluation.benchmark_rows import figure, write_rows
from files_by_hand import change_record
from hub_server import HubServer, client_of
from tiny import make_chat_tokenizer
from transformers import AutoModelForCausalLM

from lori_trl.adapter.card import render_model_card
from lori_trl.adapter.layout import COMPACT_NAME
from lori_trl.adapter.record import read_record
from lori_trl.cli import main
from lori_trl.compact import export_compact
from lori_trl.evaluation import (
    CompletionLoss,
    read_results,
    records,
    write_results,
)


@pytest.fixture
def adapters(adapter_folder, plain_adapter, model_folder, tmp_path):
    """A LoRI adapter, a plain one and a whole model, to write beside."""
    folders = [tmp_path / name for name in ("lori", "plain", "whole")]
    for source, folder in zip((adapter_folder, plain_adapter, model_folder), folders, strict=True):
        shutil.copytree(source, folder)
    return [str(folder) for folder in folders]


def test_one_table_for_the_base_and_several_models(adapters, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    together = tmp_path / "all.json"
    call = ["eval", *adapters, "--tasks", "gsm8k", "boolq_loglikelihood", "--metrics", "loss", "--limit", "3"]
    local = [f"gsm8k={data / 'gsm8k'}", f"boolq={data / 'boolq' / 'test.jsonl'}"]
    assert main([*call, "--max_new_tokens", "4", "--dataset_path", *local, "--output_path", str(together)]) == 0
    shown = capsys.readouterr().out
    header = next(line for line in shown.splitlines() if "metric" in line)
    assert [cell.strip() for cell in header.strip("\u2503").split("\u2503")] == (
        ["task", "metric", "n", "base", "lori", "plain", "whole"]
    )
    metrics = {
        "accuracy_strict",
        "accuracy_flexible",
        "unparsed_strict",
        "accuracy_loglikelihood",
        "majority_baseline",
    }
    for folder in adapters:
        results = read_results(folder)
        assert {result["metric"] for result in results} == metrics | {"loss"}
        assert {result["task"] for result in results} == {"gsm8k", "boolq"}
        assert {result["model"]["name"] for result in results} == {Path(folder).name}
    content = json.loads(together.read_text())
    assert content["format_version"] == 1 and len(content["results"]) == 4 * 7
    by_model = {
        r["model"]["name"]: r["value"] for r in content["results"] if (r["task"], r["metric"]) == ("gsm8k", "loss")
    }
    assert by_model["tiny-llama"] == by_model["whole"]  # the base, untouched by the adapters before
    assert len({by_model[name] for name in ("whole", "lori", "plain")}) == 3
    peft = json.loads(Path(adapters[0], "adapter_config.json").read_text())
    card = render_model_card(
        read_record(adapters[0]),
        peft,
        None,
        eval_results=json.loads(Path(adapters[0], "eval_results.json").read_text()),
    )
    assert "accuracy_flexible" in card and str(tmp_path) not in card


def test_adapters_on_the_hub_and_compact_files(
    adapter_folder, plain_adapter, model_folder, data, tmp_path, monkeypatch, capsys
):
    compact = export_compact(adapter_folder, tmp_path / COMPACT_NAME)
    together = tmp_path / "all.json"
    call = ["--base_model", str(model_folder), "--metrics", "loss", "--dataset_path", str(data / "gsm8k")]
    names = ["me/lori", "me/plain", "me/compact", str(compact)]
    with HubServer() as hub, client_of(hub, tmp_path / "home", monkeypatch):
        hub.create("me/lori", files=contents(adapter_folder))
        hub.create("me/plain", files=contents(plain_adapter))
        hub.create("me/compact", files={compact.name: compact.read_bytes()})
        assert main(["eval", *names, *call]) == 0
        assert f"No file was written for me/lori, me/plain, me/compact, {compact}" in capsys.readouterr().out
        assert main(["eval", *names, *call, "--output_path", str(together)]) == 0
        assert main(["eval", "me/lori", "me/plain", "me/compact", *call[2:]]) == 0  # they name their base
    losses = {result["model"]["name"]: result["value"] for result in json.loads(together.read_text())["results"]}
    assert losses["me/lori"] == losses["me/compact"] == losses[compact.name] != losses["me/plain"]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_help_ends_in_an_example(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["eval", "--help"])
    assert exit.value.code == 0 and "example:\n  lori eval" in capsys.readouterr().out


def test_the_loss_alone_needs_no_lm_eval(adapters, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", adapters[0], "--metrics", "loss", "--dataset_path", str(data / "gsm8k" / "test.jsonl")]) == 0
    (result,) = read_results(adapters[0])
    assert (result["task"], result["metric"], result["n"]) == ("gsm8k", "loss", 6 * 3)
    with pytest.raises(SystemExit):
        main(["eval", adapters[0], "--tasks", "gsm8k"])
    assert "`pip install lm-eval`" in capsys.readouterr().err


def test_a_base_in_4_bits(adapters, data, capsys, caplog):
    """As QLoRA has it; what an adapter was trained on is on record, and a difference is told."""
    call = ["eval", adapters[0], "--metrics", "loss", "--dataset_path", str(data / "gsm8k" / "test.jsonl")]
    assert main(call) == 0 and "full precision" not in caplog.text
    (whole,) = read_results(adapters[0])
    assert main([*call, "--load_in_4bit", "--dtype", "bfloat16"]) == 0
    (packed,) = read_results(adapters[0])
    assert packed["settings"]["quantization"] == "4-bit" and packed["settings"]["dtype"] == "torch.bfloat16"
    assert packed["value"] != whole["value"] == pytest.approx(packed["value"], rel=0.05)
    assert "trained on a base in full precision, and this one is in 4-bit" in caplog.text
    caplog.clear()
    change_record(Path(adapters[0]), lambda values: values["training"]["base_model"].update(quantization="4-bit"))
    assert main(call) == 0
    assert "trained on a base in 4-bit, and this one is in float32" in caplog.text
    assert "Pass `--load_in_4bit`" in caplog.text


def test_wrong_calls(adapters, data, tmp_path, capsys, model_folder):
    write_results(adapters[0], records([figure()], adapters[0], None))
    before = {file: file.read_bytes() for folder in adapters for file in Path(folder).rglob("*") if file.is_file()}
    empty = write_rows(tmp_path / "empty.jsonl", [])
    bare = write_rows(tmp_path / "bare.jsonl", [{"prompt": "w1"}])
    only_train = write_rows(tmp_path / "only" / "train.jsonl", [{"text": "w1"}]).parent
    odd = write_rows(tmp_path / "odd.jsonl", [{"prompt": "w1", "choices": ["w2"], "answer": "w3"}])
    word = write_rows(tmp_path / "word.jsonl", [{"prompt": "w1", "answer": "ten"}])
    other = AutoModelForCausalLM.from_pretrained(model_folder).config
    other.hidden_size, other.intermediate_size = 64, 96
    wide = tmp_path / "wide" / "tiny-llama"
    AutoModelForCausalLM.from_config(other).save_pretrained(wide)
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, wide)
    gsm8k, one = ["--tasks", "gsm8k", "--dataset_path"], adapters[:1]
    calls = [
        ([*one], ["Neither `--tasks` nor `--metrics` is given"]),
        ([*one, "--tasks", "gsm8"], ["`gsm8` is no task (did you mean gsm8k?)", "Pass some of these"]),
        (["--tasks", "gsm8k"], ["`--base_model` is missing", "Pass e.g."]),
        ([*one, *gsm8k, str(empty)], ["no rows"]),
        ([*one, *gsm8k, str(bare)], ["gsm8k also needs answer"]),
        ([*one, "--tasks", "boolq", "--dataset_path", str(odd)], ["Row 0 of `odd.jsonl` has `answer='w3'`"]),
        ([*one, *gsm8k, str(word)], ["`answer='ten'`. Allowed is a number and nothing else"]),
        ([*one, "--tasks", "safety"], ["cannot be fetched from `LLM-Tuning-Safety/HEx-PHI`", "accepted their terms"]),
        ([*one, *gsm8k, "nowhere.jsonl"], ["`--dataset_path nowhere.jsonl` does not exist"]),
        ([*one, *gsm8k, f"gsm={data}"], ["`gsm` is no task"]),
        ([*one, *gsm8k, str(data), str(data)], ["has two paths for all tasks"]),
        ([*one, "--tasks", "gsm8k", "boolq", "--dataset_path", str(bare)], ["is one file for gsm8k, boolq"]),
        ([*one, "--tasks", "humaneval"], ["Pass `--allow_code_execution`"]),
        ([*one, "--metrics", "loss"], ["`--metrics loss` has no data"]),
        ([*one, "--metrics", "loss", "--dataset_path", str(bare)], ["columns prompt", "Rename the columns"]),
        ([*one, "--metrics", "loss", "--dataset_path", str(data)], ["holds no file of rows"]),
        ([*one, "--metrics", "loss", "--dataset_path", str(only_train)], ["has train, and no test. The loss is"]),
        ([*one, *gsm8k, str(data), "--limit", "0"], ["`--limit 0` is too few"]),
        ([*one, *gsm8k, str(data), "--max_new_tokens", "5000"], ["leaves no room for a prompt"]),
        ([*one, *gsm8k, str(data), "--base_model", str(wide)], ["does not fit the base model", "Load that base"]),
        ([*one, *gsm8k, str(data), "--base_model", "/no/such/model"], ["cannot be loaded as a model"]),
        (["/no/such/adapter", *gsm8k, str(data)], ["`/no/such/adapter` does not exist"]),
        ([str(data), *gsm8k, str(data)], ["holds no adapter_config.json"]),
    ]
    for call, parts in calls:
        with pytest.raises(SystemExit) as exit:
            main(["eval", *call])
        assert exit.value.code == 2, call
        error = capsys.readouterr().err
        assert "Traceback" not in error
        for part in parts:
            assert part in error, (call, error)
    after = {file: file.read_bytes() for folder in adapters for file in Path(folder).rglob("*") if file.is_file()}
    assert after == before


def write_talk(file: Path, role: str = "user") -> str:
    talk = [{"role": role, "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    return str(write_rows(file, [{"messages": talk}] * 3))


def test_two_sets_of_one_name_keep_both_rows(adapters, tmp_path, capsys):
    paths = [write_rows(tmp_path / name / "held.jsonl", [{"prompt": "w1", "completion": f"w{name}"}]) for name in "78"]
    call = ["eval", adapters[0], "--metrics", "loss", "--dataset_path"]
    assert main([*call, f"a={paths[0]}", f"b={paths[1]}"]) == 0
    shown = capsys.readouterr().out
    assert "│ a " in shown and "│ b " in shown
    assert {result["task"] for result in read_results(adapters[0])} == {"a", "b"}
    with pytest.raises(SystemExit, match="2"):
        main([*call, str(paths[0]), f"held={paths[1]}"])
    assert "are both called 'held'. Each set has a name of its own" in capsys.readouterr().err


def test_conversations_are_measured_and_checked_before_a_model_is_loaded(
    adapters, model_folder, tmp_path, capsys, monkeypatch
):
    """The adapter brings a template; the base, which has none, is measured with it."""
    make_chat_tokenizer().save_pretrained(adapters[0])
    call = ["eval", adapters[0], "--metrics", "loss", "--dataset_path"]
    assert main([*call, write_talk(tmp_path / "talk.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert f"base: measured with the tokenizer of {adapters[0]}" in shown and "has no chat template" in shown
    (result,) = read_results(adapters[0])
    assert result["task"] == "talk" and result["n"] == 3 * len("w2 w3 </s>".split())
    monkeypatch.setattr(
        "lori_trl.evaluation.models.load_base_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    refused = {
        write_talk(tmp_path / "odd.jsonl", "narrator"): "Row 0 of `odd.jsonl` does not go through the chat template",
        str(write_rows(tmp_path / "none.jsonl", [{"messages": []}])): "Row 0 of `none.jsonl` has `messages=[]`",
        str(write_rows(tmp_path / "ids.jsonl", [{"input_ids": [1]}])): "has input_ids and nothing that is completed",
    }
    for path, part in refused.items():
        with pytest.raises(SystemExit, match="2"):
            main([*call, path])
        assert part in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["eval", adapters[1], *call[2:], write_talk(tmp_path / "talk.jsonl")])
    assert "has no chat template, and `talk.jsonl` has messages" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_not_on_file(adapters, data, capsys, monkeypatch):
    call = ["eval", adapters[0], "--metrics", "loss", "--dataset_path", str(data / "gsm8k" / "test.jsonl")]
    assert main(call) == 0 and len(read_results(adapters[0])) == 1
    nan = float("nan")
    monkeypatch.setattr("lori_trl.evaluation.loss.completion_loss", lambda *_, **__: CompletionLoss(nan, 18, nan))
    assert main([*call, "--output_path", str(Path(adapters[0]).parent / "all.json")]) == 0
    assert "the loss of gsm8k is nan, no number, and is not written" in capsys.readouterr().out
    assert read_results(adapters[0]) == []  # the figure before was another adapter's
    assert "NaN" not in (Path(adapters[0]).parent / "all.json").read_text()
