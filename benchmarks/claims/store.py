"""Results as JSON lines: appended whole or not at all, read again after a kill."""

import json
import os
from pathlib import Path
from typing import Any

from .cells import Cell

Figures = dict[str, Any]


class Store:
    """
    The results of all cells so far.

    Args:
        file (`Path`): a .jsonl file, one result a line; several processes may append to it.
    """

    def __init__(self, file: Path):
        self.file = file
        self.lines: dict[str, dict] = {}
        self.read()

    def read(self) -> None:
        """Read what was added since. A last line that a kill cut short does not count."""
        if not self.file.is_file():
            return
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                result = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.lines.setdefault(result["key"], result)

    def add(self, cell: Cell, figures: Figures, **facts: Any) -> None:
        """Append a cell's result."""
        result = {"key": cell.key, "cell": cell.settings, "figures": figures, **facts}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened for appending: lines of several processes do not mix. The leading newline ends a
        # line that a kill cut short.
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            cut_short = os.path.getsize(self.file) > 0 and self.file.read_bytes()[-1:] != b"\n"
            os.write(descriptor, (b"\n" if cut_short else b"") + json.dumps(result).encode() + b"\n")
        finally:
            os.close(descriptor)
        self.lines[cell.key] = result

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self.lines

    def figures(self, cell: Cell) -> Figures:
        """Return what was measured in a cell."""
        return self.lines[cell.key]["figures"]
