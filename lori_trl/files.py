"""Files that are replaced in one step."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """
    Yield a path beside a file to write to; it takes the file's place at the end.

    If anything fails before that, the file stays as it was.
    """
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
