"""Files that are read with care and replaced in one step."""

import errno
import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
LOCK_NAME = ".lori_trl.lock"  # in a folder that is being written


@contextmanager
def replacing(file: str | Path, *, seconds: float = 60) -> Iterator[Path]:
    """
    Yield a path beside a file to write to, which no other writer has; it takes the file's place at the end.

    If anything fails before that, the file stays as it was. What a killed writer of this file left beside it goes.

    Args:
        file (`str` or `Path`): the file.
        seconds (`float`, *optional*, defaults to 60): how long to wait for another process that writes it.

    Raises:
        `FileExistsError`: another process writes it.
        `OSError`: there is no room for the file, or it cannot be written.
    """
    file = Path(file)
    beginning = f".{file.name[:100]}."
    partial = file.with_name(f"{beginning}{secrets.token_hex(4)}.partial")
    with sole_writer(file, seconds=seconds, beside=True) as first:
        if first:
            remove_left_over(file.parent, beginning, "[0-9a-f]{8}[.]partial")
        try:
            with room_for(file):
                yield partial
                partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def remove_left_over(folder: Path, beginning: str, ending: str) -> None:
    """Remove the files and folders that a killed writer has left: those of this name, which ends as a pattern says."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(beginning) and re.fullmatch(ending, path.name.removeprefix(beginning)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def room_for(target: Path) -> Iterator[None]:
    """Say what could not be written where a disk is full: the system's own error names no file, or another one."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_ROOM:
            raise
        fault = error.strerror if isinstance(error, OSError) else error
        raise OSError(
            f"`{target}` cannot be written: {fault}. What was there before is as it was. Make room for it, or pass "
            "another place."
        ) from error


@contextmanager
def sole_writer(output: Path, *, seconds: float = 0, beside: bool = False) -> Iterator[bool]:
    """
    Keep other processes, and other threads, from writing to an output as long as the context lasts.

    Yields `True` where the output is locked, and this thread did not hold it before.

    Args:
        output (`Path`): a folder, which exists; or with `beside` what need not.
        seconds (`float`, *optional*, defaults to 0): how long to wait for another writer.
        beside (`bool`, *optional*, defaults to `False`):
            whether the file that is locked lies beside the output: for a file, and for a folder that is replaced.

    Raises:
        `FileExistsError`: another process writes to it.
    """
    from filelock import FileLock, Timeout  # not before: it takes a while

    place = output.resolve()
    file = place.with_name(f".{place.name[:100]}.lock") if beside else place / LOCK_NAME
    lock = FileLock(file, is_singleton=True)  # one a path: who holds it may write within
    outermost = not lock.is_locked
    try:
        file.touch()  # where no file can be made, `acquire` would take that for another writer
        lock.acquire(timeout=seconds)
    except Timeout:
        raise FileExistsError(
            f"`{output}` is being written by another process. An output has one writer. Wait until that one is done, "
            "or pass another place."
        ) from None
    except (NotImplementedError, OSError) as error:  # a file system without locks: no reason to lose a run
        logger.info(f"`{output}` cannot be locked ({error}).")
    try:
        yield outermost and lock.is_locked
    finally:
        if outermost:
            file.unlink(missing_ok=True)
        lock.release()


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
