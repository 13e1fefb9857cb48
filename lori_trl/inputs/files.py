"""Files that are read with care and replaced in one step."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


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


def copy_files(files: Mapping[str, Path], folder: str | Path) -> None:
    """Copy files into a folder: name from the folder -> file."""
    for name, file in files.items():
        target = Path(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def read_json(file: str | Path, max_bytes: int) -> Any:
    """
    Read a JSON file whose contents are not trusted.

    Args:
        file (`str` or `Path`): the file.
        max_bytes (`int`): how large it may be.

    Raises:
        `ValueError`: it is larger, no JSON in UTF-8, nested too deeply, or holds NaN or infinity.
    """
    file = Path(file)
    if file.stat().st_size > max_bytes:
        raise ValueError(
            f"`{file}` has {file.stat().st_size / 1e6:.0f} MB. Such a file has at most {max_bytes / 1e6:.0f} MB. Do "
            "not use it; fetch it again."
        )
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`{file}` is unreadable ({describe_fault(error)}). It must be plain JSON. Fetch or save it again."
        ) from error


def parse_json(text: str) -> Any:
    """Parse JSON as the standard has it: without NaN and infinity. Raises `ValueError` or `RecursionError`."""
    return json.loads(text, parse_constant=_refuse_constant)


def describe_fault(error: Exception) -> str:
    """Say in a few words what was wrong with a file's contents, without quoting them at length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
