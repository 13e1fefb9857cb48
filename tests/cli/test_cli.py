"""What holds for every command."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("command", [["lori", "--help"], ["lori-sft", "--help"], ["lori", "recipes", "--help"]])
def test_help_ends_in_an_example(command):
    program = Path(sys.executable).with_name(command[0])
    text = subprocess.check_output([program, *command[1:]], text=True)
    assert "example:\n  lori" in text
