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


def test_only_training_takes_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(["recipes", "list"])
    assert end.value.code == 2 and "`lori recipes` was started in 2 processes" in capsys.readouterr().err
