"""An error about the input is one message; `--debug` shows where it came from."""

import errno
import os

import pytest
from safetensors import SafetensorError

from lori_trl.cli import main
from lori_trl.cli.errors import bad_input, take_debug

FULL = (errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(*FULL), "lori: The disk is full (OSError: no space left"),
        (OSError(*FULL, "a", None, "out/b"), "lori: The disk is full at `out/b` (OSError"),
        (SafetensorError(f"Error while serializing: I/O error: {FULL[1]} (os error 28)"), "is full (SafetensorError"),
        (RuntimeError(f"write failed: {FULL[1]}"), "Free some, or write to another disk"),
    ],
)
def test_a_full_disk_is_told_and_nothing_is_none(error, told, capsys):
    with pytest.raises(SystemExit) as exit, bad_input("lori"):
        raise error
    shown = capsys.readouterr().err
    assert exit.value.code == 1 and told in shown and "None" not in shown


def test_an_error_of_the_system_without_a_file(capsys):
    with pytest.raises(SystemExit) as exit, bad_input("lori"):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")
    shown = capsys.readouterr().err
    assert (
        exit.value.code == 2 and "lori: Network is unreachable. The system refused it" in shown and "None" not in shown
    )


def test_what_is_no_fault_of_the_call_is_raised():
    with pytest.raises(ZeroDivisionError), bad_input("lori"):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("given", "rest", "debug"),
    [
        (["merge", "a"], ["merge", "a"], False),
        (["--debug", "merge", "a"], ["merge", "a"], True),
        (["merge", "--debug", "a"], ["merge", "a"], True),
        (["--debug", "underflow_overflow"], ["--debug", "underflow_overflow"], False),
        (["--debug", "underflow_overflow", "--debug"], ["--debug", "underflow_overflow"], True),
    ],
)
def test_debug_may_stand_anywhere_and_transformers_own_stays(given, rest, debug):
    assert take_debug(given) == (rest, debug)


@pytest.mark.parametrize(
    "call",
    [
        ["merge", "nowhere"],
        ["push", "nowhere", "me/x"],
        ["inspect", "nowhere"],
        ["tasks", "nowhere"],
        ["expand", "nowhere", "out"],
        ["export", "--compact", "nowhere", "out.safetensors"],
        ["eval", "nowhere", "--metrics", "loss"],
        ["recipes", "show", "nowhere"],
        ["sft", "--recipe", "nowhere"],
    ],
    ids=lambda call: call[0],
)
def test_every_command_shows_the_traceback_with_debug(call, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--debug"]):
        with pytest.raises(SystemExit) as exit:
            main([*call, *more])
        shown = capsys.readouterr().err
        assert exit.value.code == 2 and ("Traceback (most recent call last)" in shown) == bool(more)
        assert shown.count("nowhere") >= 1
