"""What can be known of the training rows before the first step: their name, whether they hold text, what is cut."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, Value
from trl import SFTConfig

from ..recipes.data import check_rows, unknown_columns
from ..recipes.raw_rows import RowFault
from ..recipes.row_formats import chat_message, text_columns
from ..recipes.task_names import is_name, name_of_dataset

logger = get_logger(__name__)

# The columns that TRL's other trainers take text from.
_TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected")


def name_of_data(rows: Dataset | IterableDataset) -> str:
    """Name a task after its data set, or after the contents of its first rows where that has no name."""
    info = rows.info
    if info.dataset_name is not None and is_name(info.dataset_name):
        split = None if rows.split is None else re.split(r"[\[+]", str(rows.split))[0]
        return name_of_dataset(info.dataset_name, info.config_name, split)
    name = f"data-{fingerprint_rows(rows)[:8]}"
    logger.warning(f"`task_name` is not given and the data set has no name: the task is called {name!r}.")
    return name


def fingerprint_rows(rows: Dataset | IterableDataset) -> str:
    """
    Return SHA-256 of 100 rows, in hexadecimal: spread evenly from the first to the last, of a stream the first ones.

    Of images and the like only their kind counts.
    """
    if isinstance(rows, Dataset) and len(rows) > 100:
        rows = rows.select([round(i * (len(rows) - 1) / 99) for i in range(100)])
    taken = json.dumps(list(islice(rows, 100)), sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(taken.encode()).hexdigest()


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


def check_text(rows: Dataset | IterableDataset, argument: str, text_field: str | None = None) -> None:
    """
    Check that the columns that TRL takes hold text or messages: in all rows, or in the first 100 of a stream.

    Args:
        rows (`Dataset` or `IterableDataset`): the rows.
        argument (`str`): what they were passed as.
        text_field (`str`, *optional*): `dataset_text_field` of supervised training; other trainers have none.

    Raises:
        `ValueError`: a row holds something else there, or supervised training would find nothing to learn.
    """
    names = column_names(rows)
    if "input_ids" in names:
        return
    if text_field is None:
        columns = tuple(name for name in _TEXT_COLUMNS if name in names)
    elif not (columns := text_columns(names, text_field)):
        raise unknown_columns(names, argument)
    if not all(_is_all_text(rows, each) for each in columns):
        check_rows(rows, columns, argument)


def loss_on_all_turns(columns: Collection[str], args: SFTConfig) -> str | None:
    """Say that all turns of conversations bear loss, where they do: few expect it of a chat's fine-tuning."""
    if args.assistant_only_loss or text_columns(columns, args.dataset_text_field) != ("messages",):
        return None
    return (
        "loss: every turn of `messages` bears it, what the system and the user say, too. For the assistant's words "
        "alone, pass `--assistant_only_loss`, or make rows of prompt and completion."
    )


def sft_rows(rows: Dataset | IterableDataset, text_field: str, argument: str) -> Dataset | IterableDataset:
    """
    Make rows what TRL's supervised training takes whole: columns of one format, and roles that chat templates know.

    Of several formats in one row TRL takes a part each: `text` beside prompt and completion costs the completion its
    EOS, a `prompt` beside `messages` fails.

    Args:
        rows (`Dataset` or `IterableDataset`): rows that [`check_text`] has passed.
        text_field (`str`): `dataset_text_field`.
        argument (`str`): what they were passed as.
    """
    names = column_names(rows)
    texts = text_columns(names, text_field)
    if "input_ids" in names or not texts:
        return rows
    beside = {"prompt", "completion", "messages", "conversations", text_field}.intersection(names).difference(texts)
    rows = rows.remove_columns(sorted(beside)) if beside else rows
    first = next(iter(rows))[texts[-1]]
    if texts == ("conversations",) or isinstance(first, list) and any(each.get("from") for each in first):
        kwargs = {"columns": texts, "argument": argument}
        return rows.map(_with_roles, with_indices=True, fn_kwargs=kwargs, remove_columns=list(texts))
    return rows


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    return rows.column_names or list(next(iter(rows)))


def _with_roles(row: Mapping[str, Any], number: int, columns: tuple[str, ...], argument: str) -> dict[str, Any]:
    try:
        return {
            "messages" if column == "conversations" else column: [chat_message(each) for each in row[column]]
            for column in columns
        }
    except RowFault as fault:
        raise fault.at(number, argument) from None


def _is_all_text(rows: Dataset | IterableDataset, column: str) -> bool:
    """Say whether a column's type is text and no row lacks it, without taking the rows out one by one."""
    if not isinstance(rows, Dataset) or rows.features[column] not in (Value("string"), Value("large_string")):
        return False
    batches = rows.select_columns(column).with_format("arrow").iter(10_000)
    return not any(batch.column(0).null_count for batch in batches)


def kept_positions(
    input_ids: list[int], prompt_length: int, max_length: int, bos: int | None, eos: int | None
) -> list[int]:
    """
    Choose the tokens of a prompt and its completion that stay: the prompt's end and the EOS are among them.

    First the prompt loses its beginning (a BOS stays), until it has half of `max_length`; then the completion loses
    what stands before its EOS.

    Args:
        input_ids (`list[int]`): the prompt's tokens and the completion's.
        prompt_length (`int`): how many are the prompt's.
        max_length (`int`): how many may stay, in tokens.
        bos (`int`, *optional*): the tokenizer's BOS.
        eos (`int`, *optional*): the tokenizer's EOS. What follows the last one, in a chat template, stays with it.

    Returns:
        `list[int]`: ascending positions in `input_ids`; all of them where `max_length` suffices.

    Source: the authors cut 512 tokens into 256 and 256 too, but they cut the prompt's end (with `### Response:`) and
    the EOS.
    """
    length = len(input_ids)
    if length <= max_length:
        return list(range(length))
    in_prompt = min(prompt_length, max(max_length - (length - prompt_length), max_length // 2))
    prompt = list(range(prompt_length - in_prompt, prompt_length))
    if in_prompt > 1 and input_ids[0] == bos:
        prompt[0] = 0
    completion, room = input_ids[prompt_length:], max_length - in_prompt
    ending = min(room, completion[::-1].index(eos) + 1) if eos in completion else 0
    beginning = range(prompt_length, min(length, prompt_length + room) - ending)
    return prompt + [*beginning, *range(length - ending, length)]
