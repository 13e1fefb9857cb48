"""What holds for every command."""

import subprocess
import sys
from pathlib import Path

import pytest

from lori_trl.cli import main


@pytest.mark.parametrize("command", [["lori", "--help"], ["lori-sft", "--help"], ["lori", "recipes", "--help"]])
def test_help_ends_in_an_example(command):
    program = Path(sys.executable).with_name(command[0])
    text = subprocess.check_output([program, *command[1:]], text=True)
    assert "example:\n  lori" in text


@pytest.mark.parametrize("call", [["recipes", "list"], ["merge", "a", "b"], ["inspect", "a"], ["push", "a", "me/a"]])
def test_only_training_and_evaluation_take_several_processes(call, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(call)
    error = capsys.readouterr().err
    assert end.value.code == 2 and f"`lori {call[0]}` was started in 2 processes" in error
    assert "Start it once, without `accelerate launch`" in error
