"""The table of what the ranks were compared in, printed when all is done."""

import pytest

ROWS = pytest.StashKey[list[tuple[str, ...]]]()
HEAD = ("engine", "case", "backend", "phases", "largest difference", "masks equal")


@pytest.fixture
def table(request) -> list[tuple[str, ...]]:
    """Rows to append to."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    terminalreporter.section("two ranks against one process")
    for row in [HEAD, *rows]:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
