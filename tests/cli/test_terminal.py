"""What reaches the terminal: foreign text as text, from every command and every error."""

import logging
import shutil

import pytest
from rich.table import Table
from tiny import make_rows, model_folder, trained_adapter

from lori_trl.cli import main, sft
from lori_trl.cli.terminal import show, show_logs_as_text

HOSTILE = "[/q][red]\x1b[31m\x9b2J\u202e\r"
SEEN = "[/q][red]?[31m?2J??"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def test_texts_tables_and_logs(capsys):
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    show(HOSTILE, table)
    show(HOSTILE, error=True)
    show_logs_as_text()
    logging.lastResort.handle(logging.makeLogRecord({"msg": HOSTILE, "levelno": logging.WARNING}))
    out, error = capsys.readouterr()
    assert out.count(SEEN) == 4 and error.count(SEEN) == 2
    assert not {"\x1b", "\x9b", "\u202e", "\r"} & set(out + error)


def test_every_command_shows_a_hostile_folder_as_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, file = HOSTILE.replace("/", ""), HOSTILE.replace("/", "") + ".safetensors"
    shutil.copytree(trained_adapter(), name)
    calls = (
        ["tasks", name],
        ["inspect", name],
        ["inspect", name, "--json", f"{name}.json"],
        ["push", name, "me/x", "--dry-run"],
        ["merge", name, "--output_dir", f"{name}-merged"],
        ["export", "--compact", name, file],
        ["expand", file, f"{name}-again"],
    )
    for call in calls:
        assert main(call) == 0
        out = capsys.readouterr().out
        assert SEEN.replace("/", "") in out and "\x1b" not in out, call
    for call in (
        ["tasks", f"no-{name}"],
        ["inspect", f"no-{name}"],
        ["push", name, f"me/{HOSTILE}"],
        ["push", f"no-{name}", "me/x"],
        ["merge", f"no-{name}", name, "--output_dir", "out"],
        ["export", "--compact", f"no-{name}", "out"],
        ["expand", f"no-{name}", "out"],
        ["eval", f"no-{name}", "--tasks", "boolq"],
        ["recipes", "show", HOSTILE],
        ["sft", "--recipe", HOSTILE],
        ["sft", f"--{HOSTILE}", "1"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(call)
        error = capsys.readouterr().err
        assert "[red]?[31m" in error and "\x1b" not in error, call


def test_a_hostile_output_folder_costs_no_run(tmp_path, capsys):
    make_rows().to_json(tmp_path / "rows.jsonl")
    output = tmp_path / HOSTILE.replace("/", "")
    call = f"--model_name_or_path {model_folder()} --dataset_path {tmp_path}/rows.jsonl --max_steps 1 --sparsity 0"
    call += " --report_to none --save_strategy no --activation_checkpointing False --dataloader_pin_memory False"
    assert sft([*call.split(), "--output_dir", str(output)]) == 0
    assert SEEN.replace("/", "") in capsys.readouterr().out


@pytest.mark.parametrize("repo", ["a/b/c", "../../x", "me/[/x]", "a b", "a--b", ""])
def test_a_dry_run_refuses_what_is_no_repository(repo, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["push", str(trained_adapter()), repo, "--dry-run"])
    assert f"`{repo}` cannot be a repository" in capsys.readouterr().err
