"""`lori-sft --help` is written down, for its parser takes seconds to import."""

import os

import pytest

from lori_trl.cli import sft, training_options
from lori_trl.cli.options import with_underscores
from lori_trl.cli.training_options import FILE_OF_HELP, help_made_for, sft_help, training_parser


@pytest.fixture
def live(monkeypatch) -> str:
    """The parser's own text, as wide as the one that is written down."""
    monkeypatch.setenv("COLUMNS", "80")
    return training_parser().format_help()


def test_the_help_that_is_written_down_is_the_parsers(live):
    """Set LORI_UPDATE_GOLDEN=1 to write it anew."""
    if os.environ.get("LORI_UPDATE_GOLDEN"):
        FILE_OF_HELP.write_text(f"{help_made_for()}\n{live}", encoding="utf-8")
    assert sft_help().split() == live.split(), "run `LORI_UPDATE_GOLDEN=1 pytest tests/cli/test_help.py`"


def test_of_other_versions_the_help_is_the_parsers(live, monkeypatch, capsys):
    monkeypatch.setattr(training_options, "help_made_for", lambda: "trl 0.0, transformers 0.0")
    monkeypatch.setattr(training_options, "_EPILOG", "live")
    assert sft(["--help"]) == 0
    assert capsys.readouterr().out.split()[-1] == "live"


def test_the_example_for_eight_devices_has_the_papers_batch():
    example = sft_help()[sft_help().index("--num_processes 8") :]
    assert "--per_device_train_batch_size 4" in example and "--gradient_accumulation_steps 1" in example


def test_dashes_in_an_option_are_underscores():
    call = ["--dry-run", "--model-name=a-b", "x-y", "-h", "--", "--lora_r", "-1"]
    assert with_underscores(call) == ["--dry_run", "--model_name=a-b", "x-y", "-h", "--", "--lora_r", "-1"]
