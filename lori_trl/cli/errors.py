"""Errors about the input: one message, and the exit code of a wrong call."""

import traceback
from collections.abc import Iterable
from contextlib import contextmanager

from .terminal import show

_INPUT_ERRORS = (ValueError, TypeError, OSError, ImportError)
# What transformers' own `--debug` takes; without one of them the option is ours.
_OF_TRANSFORMERS = ("underflow_overflow", "tpu_metrics_debug")


def take_debug(arguments: Iterable[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of a call, wherever it stands: whether an error is told by its traceback."""
    arguments = list(arguments)
    ours = [
        number
        for number, argument in enumerate(arguments)
        if argument == "--debug" and not {*arguments[number + 1 : number + 2]} & {*_OF_TRANSFORMERS}
    ]
    return [argument for number, argument in enumerate(arguments) if number not in ours], bool(ours)


@contextmanager
def bad_input(program: str, errors: tuple[type[Exception], ...] = _INPUT_ERRORS, *, debug: bool = False):
    """
    Turn an error about the input into one message and exit code 2, a full disk into one message and 1.

    Args:
        program (`str`): whose message it is.
        errors (`tuple[type[Exception], ...]`, *optional*): those that are about the input; others are raised.
        debug (`bool`, *optional*, defaults to `False`): whether to tell the traceback, too.
    """
    try:
        yield
    except Exception as error:
        is_full = "No space left on device" in str(error)  # by whatever class: safetensors has its own
        if not is_full and not isinstance(error, errors):
            raise
        if debug:
            show("".join(traceback.format_exception(error)), error=True)
        show(f"{program}: {_full_disk(error) if is_full else _message(error)}", error=True)
        raise SystemExit(1 if is_full else 2) from None


def _full_disk(error: Exception) -> str:
    place = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return (
        f"The disk is full{f' at `{place}`' if place is not None else ''} ({type(error).__name__}: no space left on "
        "device). There must be room for all that is written. Free some, or write to another disk."
    )


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:  # the system's own, and no sentence
        if error.filename is None:
            return (
                f"{error.strerror}. The system refused it. Look after disk, network and rights; `--debug` says where."
            )
        return (
            f"`{error.filename}`: {error.strerror}. A name that the system can open is needed. Correct it, or the "
            "rights to it."
        )
    return str(error)
