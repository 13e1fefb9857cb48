"""Files of rows: found by the name that was given, and read as what they are."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ..inputs.files import describe_fault
from .find import shipped_folder

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # of a split in several files, as the Hub has them
_ALLOWED = "Allowed is a .jsonl, .json, .csv or .parquet file, or a folder with e.g. train.jsonl and test.jsonl"


def locate_data(dataset_path: str, recipe: str | None = None) -> Path | None:
    """Find a path as it is given, beside the recipe or among the shipped ones; `None` where there is none."""
    beside_recipe = [Path(recipe).parent / dataset_path, shipped_folder("recipes") / dataset_path] if recipe else []
    return next((path for path in [Path(dataset_path), *beside_recipe] if path.exists()), None)


def split_files(dataset_path: str, recipe: str | None = None) -> dict[str, list[Path]]:
    """
    Find the files of a path, which is taken to the letter: `[`, `]`, `?` and `*` stand for themselves.

    Args:
        dataset_path (`str`): a file, or a folder of files that are named after their splits.
        recipe (`str`, *optional*): the recipe that names the path, which may stand beside it.

    Returns:
        `dict[str, list[Path]]`: split -> its files; a file alone is the split `train`.

    Raises:
        `FileNotFoundError`: there is no such path, or no file of rows in it.
        `ValueError`: a split has two files that are not parts of one set.
    """
    path = locate_data(dataset_path, recipe)
    files = [] if path is None else [path] if path.is_file() else sorted(path.iterdir())
    files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
    if path is None or not files:
        raise FileNotFoundError(
            f"`dataset_path={dataset_path}` {'does not exist' if path is None else 'holds no file of rows'}. "
            f"{_ALLOWED}. Correct the path."
        )
    if files == [path]:
        return {"train": files}
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_SHARD.sub("", file.stem), []).append(file)
    for split, parts in splits.items():
        if len(parts) > 1 and not all(_SHARD.search(part.stem) for part in parts):
            raise ValueError(
                f"`dataset_path={dataset_path}` has {', '.join(part.name for part in parts)} for the split {split!r}. "
                "A split is one file, or parts that are numbered as on the Hub. Pass the file itself, or move the "
                "others away."
            )
    return splits


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """
    Read the rows of a file one by one: its values as they are, whatever other rows hold.

    Args:
        file (`Path`): JSON lines, a JSON list of objects, CSV with a header (every value is text) or Parquet.

    Raises:
        `ValueError`: it is not UTF-8, damaged, or holds something else than rows.
    """
    try:
        if file.suffix == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
                yield from batch.to_pylist()
        else:
            _check_text(file)
            yield from _csv_rows(file) if file.suffix == ".csv" else _json_rows(file)
    except UnicodeDecodeError as error:
        raise _not_utf8(file, f"byte 0x{error.object[error.start]:02x}") from error
    except (pyarrow.ArrowException, csv.Error) as error:
        raise _unreadable(file, describe_fault(error)) from error


def parquet_schema(file: Path) -> pyarrow.Schema:
    """
    Return the columns of a Parquet file and their types.

    Raises:
        `ValueError`: it is damaged.
    """
    try:
        return pyarrow.parquet.read_schema(file)
    except pyarrow.ArrowException as error:
        raise _unreadable(file, describe_fault(error)) from error


def _check_text(file: Path) -> None:
    with file.open("rb") as stream:
        if b"\0" in stream.read(1000):
            raise _not_utf8(file, "a zero byte, as UTF-16 has")


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig") as stream:
        if _first_character(stream) == "[":
            try:
                rows: Iterable[tuple[int, Any]] = enumerate(json.load(stream))
            except (json.JSONDecodeError, RecursionError) as error:
                raise _unreadable(file, describe_fault(error)) from error
        else:
            rows = _lines(file, stream)
        for number, row in rows:
            if not isinstance(row, dict):
                raise _unreadable(file, f"row {number} is a {type(row).__name__}, no object")
            yield row


def _lines(file: Path, stream: Any) -> Iterator[tuple[int, Any]]:
    number = 0
    for line_number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise _unreadable(file, f"line {line_number}: {describe_fault(error)}") from error
            number += 1


def _first_character(stream: Any) -> str:
    """Look at the first character that is no blank, and go back to the beginning."""
    character = " "
    while character.isspace():
        character = stream.read(1)
    stream.seek(0)
    return character


def _csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # 128 kB by default: less than a long document
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                raise _unreadable(file, f"row {number} has not the header's {len(reader.fieldnames or ())} fields")
            yield row


def _unreadable(file: Path, fault: str) -> ValueError:
    return ValueError(
        f"`{file}` is unreadable: {fault}. A .jsonl file has one JSON object a line, a .json file a list of them, a "
        ".csv file a header and as many fields in every row. Correct the file."
    )


def _not_utf8(file: Path, fault: str) -> ValueError:
    return ValueError(
        f"`{file}` is not UTF-8: it has {fault}. Text is read as UTF-8 alone. Save it so, e.g. with `iconv -f LATIN1 "
        "-t UTF-8 OLD > NEW` (or `-f UTF-16`)."
    )
