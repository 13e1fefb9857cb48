"""The one way to the terminal. Text of files, servers and errors is shown there, and never obeyed."""

import logging
import os
from typing import Any

from rich.console import Console
from rich.text import Text


def printable(text: str) -> str:
    """Replace what a terminal obeys, or cannot show: escapes, other control characters, changes of direction."""
    return "".join(char if char.isprintable() or char in "\n\t\u00a0" else "?" for char in text)


class _PlainConsole(Console):
    """A console on which text has no markup, cells and titles of tables included."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False})


def show(*parts: Any, error: bool = False, width: int | None = None) -> None:
    """
    Print texts and tables. Of the processes of a launch, the first one does.

    Args:
        parts (`str` or a rich renderable): one below the other; a text is not wrapped.
        error (`bool`, *optional*, defaults to `False`): whether to print to the standard error.
        width (`int`, *optional*): of the tables; by default the terminal's.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    console = _PlainConsole(stderr=error, highlight=False, width=width)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def show_logs_as_text() -> None:
    """Print what is logged, which quotes foreign text too, in the same way."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PlainFormatter())
