"""What can be known of the training rows before the first step: what they are called, and whether they hold text."""

import hashlib
import json
import re
from itertools import islice
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, Value

logger = get_logger(__name__)

# What `load_dataset` calls data that came from files: no name of a task.
_FILE_BUILDERS = {"json", "csv", "parquet", "arrow", "text", "pandas", "generator", "webdataset"}
# The columns that TRL takes text from: the first of these sets that there is anything of.
_TEXT_COLUMNS = (("input_ids",), ("messages",), ("prompt", "completion", "chosen", "rejected", "text"))


def name_of_data(rows: Dataset | IterableDataset) -> str:
    """Name a task after its data set, or after the contents of its first rows where that has no name."""
    name = rows.info.dataset_name
    if name is not None and name not in _FILE_BUILDERS:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:96]
    name = f"data-{fingerprint_rows(rows)[:8]}"
    logger.warning(f"`task_name` is not given and the data set has no name: the task is called {name!r}.")
    return name


def fingerprint_rows(rows: Dataset | IterableDataset) -> str:
    """Return SHA-256 of the first 100 rows, in hexadecimal. Of images and the like only their kind counts."""
    first_rows = json.dumps(list(islice(rows, 100)), sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(first_rows.encode()).hexdigest()


def check_not_empty(rows: Dataset | IterableDataset | None) -> None:
    """
    Check that there are rows.

    Raises:
        `TypeError`: they are no data set.
        `ValueError`: there are none.
    """
    if not isinstance(rows, Dataset | IterableDataset | None):
        raise TypeError(
            f"`train_dataset` is a {type(rows).__name__}. Allowed is a `datasets.Dataset` or `IterableDataset`. Pass "
            "one split of a `DatasetDict`, or make one of a list with `Dataset.from_list`."
        )
    if rows is None or next(iter(rows), None) is None:
        raise ValueError("`train_dataset` has no rows. At least one is needed. Pass a `datasets.Dataset` with rows.")


def have_images(rows: Dataset | IterableDataset) -> bool:
    """Say whether rows have images, by the columns that TRL looks for."""
    return not {"image", "images"}.isdisjoint(next(iter(rows)))


def check_text(rows: Dataset | IterableDataset, argument: str) -> None:
    """
    Check that TRL's columns hold text or messages: in all rows, or in the first 100 of a stream.

    Args:
        rows (`Dataset` or `IterableDataset`): the rows.
        argument (`str`): what they were passed as.

    Raises:
        `ValueError`: a row holds something else there.
    """
    names = rows.column_names or list(next(iter(rows)))
    columns = next((used for group in _TEXT_COLUMNS if (used := [name for name in group if name in names])), [])
    columns = [column for column in columns if column != "input_ids" and not _is_all_text(rows, column)]
    if not columns:
        return
    for number, row in enumerate(rows if isinstance(rows, Dataset) else islice(rows, 100)):
        for column in columns:
            if not _is_text(row[column]):
                raise ValueError(
                    f"Row {number} of `{argument}` has `{column}={row[column]!r}`. Allowed is text, or a list of "
                    "messages with a role and content. Correct the row, or leave it out."
                )


def _is_all_text(rows: Dataset | IterableDataset, column: str) -> bool:
    """Say whether a column's type is text and no row lacks it, without taking the rows out one by one."""
    if not isinstance(rows, Dataset) or rows.features[column] not in (Value("string"), Value("large_string")):
        return False
    batches = rows.select_columns(column).with_format("arrow").iter(10_000)
    return not any(batch.column(0).null_count for batch in batches)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, dict) for item in value))
