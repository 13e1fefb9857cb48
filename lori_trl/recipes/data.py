"""One's own data: from the Hub, a file or a folder, as rows that TRL trains on."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..hub.compat import httpx
from .data_files import locate_data, parquet_schema, read_rows, split_files
from .raw_rows import RowFault
from .row_formats import IMAGES, RowFormat, RowKind, check_row, row_format
from .task_names import file_name_of, name_of_dataset, name_of_path

_BUILDERS = {"json", "csv", "parquet", "arrow", "text"}  # of `load_dataset`, for local files
# What reads the files: where it changes, no cache of what it read before is taken.
_READERS = [Path(__file__).with_name(name) for name in ("data_files.py", "raw_rows.py", "row_formats.py")]


@dataclass
class LoriScriptArguments(ScriptArguments, DatasetMixtureConfig):
    """
    Arguments of the command line beside the run's and the model's: TRL's own, and these.

    Args:
        recipe (`str`, *optional*):
            Recipe to read, a path or a shipped one's name. `config` means the same.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to only count parameters and memory.
        preview (`int`, *optional*):
            Print so many rows as the model will see them, and stop.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an adapter that is in `output_dir`.
        dataset_path (`str`, *optional*):
            A .jsonl, .json, .csv or .parquet file, or a folder of such files named after their splits. Looked up
            from where the command is run and beside the recipe. Excludes `dataset_name`.
        adapter_name_or_path (`str`, *optional*):
            LoRI adapter to continue. Its rank, alpha and target modules are kept.
        allow_modified (`bool`, *optional*, defaults to `False`):
            Whether to continue an adapter that was changed after `lori_trl` saved it, e.g. with plain PEFT.
    """

    recipe: str | None = field(
        default=None, metadata={"help": "Recipe to read: a path, or a shipped one's name. --config means the same."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Count parameters and memory without weights, look at the data's first row and stop."},
    )
    preview: int | None = field(
        default=None, metadata={"help": "Print so many rows as the model will see them, and stop."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an adapter that is in `output_dir`."})
    dataset_path: str | None = field(
        default=None,
        metadata={
            "help": "A .jsonl, .json, .csv or .parquet file, or a folder of such files named after their splits."
        },
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A LoRI adapter to continue. Its rank, alpha and target modules are kept."},
    )
    allow_modified: bool = field(
        default=False,
        metadata={"help": "Continue an adapter that was changed after lori_trl saved it, e.g. with plain PEFT."},
    )


@dataclass
class LoriRolloutArguments(LoriScriptArguments):
    """
    Arguments of the command line for the trainers that generate answers and learn from their rewards.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Reward functions: names of TRL's, or import paths of one's own, looked up from where the command is run.
        reward_model_name_or_path (`str`, *optional*):
            Model whose score is a reward, too: one of sequence classification, or an adapter of `lori reward`.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: accuracy_reward, reasoning_accuracy_reward, think_format_reward, "
            "get_soft_overlong_punishment, or import paths of one's own, e.g. my_rewards.is_short."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A model whose score is a reward, too: of sequence classification, or an adapter of `lori reward`."
        },
    )


def load_training_data(
    arguments: LoriScriptArguments,
    text_field: str = "text",
    *,
    kind: RowKind | None = None,
    evaluated: bool = False,
) -> DatasetDict:
    """
    Load the data set that the arguments name, and make of every row what TRL trains on. Every row is checked.

    Args:
        arguments ([`LoriScriptArguments`]): `dataset_name` or `dataset_path`, and the splits.
        text_field (`str`, *optional*, defaults to `"text"`): the column of plain text, TRL's `dataset_text_field`.
        kind ([`~lori_trl.recipes.row_formats.RowKind`], *optional*):
            of the rows that are needed; by default those of supervised training.
        evaluated (`bool`, *optional*, defaults to `False`): whether the split to evaluate on is needed, too.

    Returns:
        `DatasetDict`: the split to train on, and the other one if it is needed.

    Raises:
        `ValueError`: no data set or two are named, a split is missing or empty, its columns are unknown, a file is
            not UTF-8 or damaged, or a row holds no text and no messages; of a stream, one of the first 100.
        `FileNotFoundError`: `dataset_path` does not exist or holds no rows.
        `ConnectionError`: the Hub cannot be reached, and the cache does not have the data set.
    """
    named = [name for name in ("dataset_name", "dataset_path", "datasets") if getattr(arguments, name)]
    if len(named) != 1:
        given = ", ".join(f"`{name}={getattr(arguments, name)}`" for name in named) or "No data set is named"
        raise ValueError(
            f"{given}. Exactly one says what to train on. Pass a Hub name as `dataset_name`, a file or folder as "
            "`dataset_path`, or TRL's list of `datasets` in a recipe."
        )
    if not arguments.datasets and (arguments.streaming or arguments.test_split_size is not None):
        raise ValueError(
            f"`streaming={arguments.streaming}`, `test_split_size={arguments.test_split_size}` without `datasets`. "
            "They are of that list alone. Pass `dataset_streaming`, or a split of its own as `dataset_test_split`."
        )
    data: Mapping[str, Any]
    if arguments.dataset_path is not None:
        data, where = split_files(arguments.dataset_path, arguments.recipe), arguments.dataset_path
    elif arguments.datasets:
        data, where = get_dataset(arguments), ", ".join(each.path for each in arguments.datasets)
    else:
        data, where = _load_by_name(arguments), str(arguments.dataset_name)
    splits = check_splits(data, arguments, evaluated=evaluated)
    if arguments.dataset_path is not None:
        return DatasetDict({split: rows_of_files(data[split], text_field, kind) for split in splits})
    return DatasetDict({split: _rows_of_hub(data[split], where, text_field, kind) for split in splits})


def check_splits(data: Iterable[str], arguments: LoriScriptArguments, *, evaluated: bool) -> list[str]:
    """
    Check that data have the splits that a run needs.

    Args:
        data (`Iterable[str]`): the names of those that they have.
        arguments ([`LoriScriptArguments`]): the names of those that are needed.
        evaluated (`bool`): whether the split to evaluate on is needed, too.

    Returns:
        `list[str]`: those that are needed.

    Raises:
        `ValueError`: one is not there.
    """
    where = arguments.dataset_path or arguments.dataset_name or "datasets"
    needed = {"dataset_train_split": arguments.dataset_train_split}
    if evaluated:
        needed["dataset_test_split"] = arguments.dataset_test_split
    for name, split in needed.items():
        if split not in data:
            raise ValueError(
                f"`{name}={split!r}` is not in `{where}`, which has {', '.join(data)}. Pass one of these"
                f"{', or evaluate nothing' if name == 'dataset_test_split' else ''}."
            )
    return list(needed.values())


def _load_by_name(arguments: LoriScriptArguments) -> Mapping[str, Any]:
    try:
        return load_dataset(
            arguments.dataset_name, name=arguments.dataset_config, streaming=arguments.dataset_streaming
        )
    except ConnectionError as error:
        raise ConnectionError(
            f"`dataset_name={arguments.dataset_name}` is out of reach: {str(error).rstrip('.')}. "
            "A data set comes from the Hub once, and from the cache later. Connect, unset HF_HUB_OFFLINE, or pass "
            "rows of your own as `--dataset_path`."
        ) from error


def look_at_training_data(
    arguments: LoriScriptArguments, text_field: str = "text", *, kind: RowKind | None = None
) -> tuple[dict[str, Any] | None, int | None]:
    """
    Look at the first row of the data set that the arguments name. Of one on the Hub, little more is fetched.

    Args and raises: as [`load_training_data`].

    Returns:
        `tuple`: the row (`dict[str, Any]`), with the columns that TRL trains on, and how many rows there are (`int`),
            which the Hub may not tell; both are `None` if it cannot be reached.
    """
    name = arguments.datasets[0].path if arguments.datasets else arguments.dataset_name
    if name is not None and not Path(name).exists() and name not in _BUILDERS:
        try:
            HfApi().dataset_info(name, timeout=5)
        except HfHubHTTPError:
            pass  # `load_dataset` says whether there is no such data set, or none for this user
        except (OfflineModeIsEnabled, httpx.HTTPError):
            return None, None
    if arguments.datasets:
        first = replace(arguments.datasets[0], fraction=None)
        streamed = replace(arguments, datasets=[first], streaming=True, test_split_size=None)  # type: ignore[call-arg]
    else:
        streamed = replace(arguments, dataset_streaming=True)  # type: ignore[call-arg]  # a field of TRL's
    rows = load_training_data(streamed, text_field, kind=kind)[arguments.dataset_train_split]
    if isinstance(rows, Dataset):
        return rows[0], len(rows)
    split = None if arguments.datasets else (rows.info.splits or {}).get(arguments.dataset_train_split)
    return next(iter(rows)), None if split is None else split.num_examples or None


def default_task_name(arguments: LoriScriptArguments) -> str:
    """Name a task after the data that the arguments name, where nobody named it. Nothing is fetched or read for it."""
    split = arguments.dataset_train_split
    if arguments.dataset_path is not None:
        path = locate_data(arguments.dataset_path, arguments.recipe)
        return name_of_path(path or Path(arguments.dataset_path), split)
    if not arguments.datasets:
        return _name_by_name(str(arguments.dataset_name), arguments.dataset_config, split)
    names = []
    for each in arguments.datasets:
        files = each.data_files if each.path in _BUILDERS and isinstance(each.data_files, str) else each.path
        names.append(_name_by_name(files, each.name or each.data_dir, each.split))
    return file_name_of("-".join(dict.fromkeys(names)))


def _name_by_name(name: str, config: str | None, split: str) -> str:
    return name_of_path(Path(name), split) if Path(name).exists() else name_of_dataset(name, config, split)


def rows_of_files(files: list[Path], text_field: str = "text", kind: RowKind | None = None) -> Dataset:
    """
    Read files of rows that TRL trains on, and check every row. What was read stays in the cache of `datasets`.

    Raises: as [`load_training_data`].
    """
    source = files[0].name if len(files) == 1 else f"{files[0].parent.name}/{files[0].name}, ..."
    first = next(_rows(files), None)
    if first is None:
        raise ValueError(f"`{source}` has no rows. At least one is needed. Pass other data.")
    form = _format(first, source, text_field, kind)
    features = form.features
    if files[0].suffix == ".parquet":
        stored = Features.from_arrow_schema(parquet_schema(files[0]))
        features |= {name: stored[name] for name in IMAGES if name in features}
    seen = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in [*files, *_READERS]]
    fingerprint = hashlib.sha256(f"{seen} {text_field} {kind}".encode()).hexdigest()[:16]
    try:
        return Dataset.from_generator(
            _converted_files, features, gen_kwargs={"source": (files, form)}, fingerprint=fingerprint
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ if isinstance(error.__cause__, (ValueError, OSError)) else error) from None


def check_rows(rows: Dataset | IterableDataset, columns: Iterable[str], source: str) -> None:
    """
    Check that columns hold text or messages: in all rows, or in the first 100 of a stream.

    Args:
        rows (`Dataset` or `IterableDataset`): the rows.
        columns (`Iterable[str]`): which of their columns.
        source (`str`): what they are called in an error.

    Raises:
        `ValueError`: a row holds something else there.
    """
    columns = tuple(columns)
    for number, row in enumerate(rows if isinstance(rows, Dataset) else islice(rows, 100)):
        try:
            check_row(row, columns)
        except RowFault as fault:
            raise fault.at(number, source) from None


def unknown_columns(columns: Iterable[str], source: str) -> ValueError:
    """Return the error that none of the columns can be trained on."""
    return ValueError(
        f"The rows of `{source}` have the columns {', '.join(columns)}. Allowed are TRL's formats (prompt and "
        "completion, messages, text), ShareGPT's (conversations), Alpaca's (instruction, input, output) and "
        "GSM8K's (question, answer with `#### n`). Rename the columns, or pass `dataset_text_field` for plain text."
    )


def _format(first: Mapping[str, Any], source: str, text_field: str, kind: RowKind | None) -> RowFormat:
    form = row_format(first, text_field, kind)
    if form is None and kind is not None:
        raise ValueError(
            f"The rows of `{source}` have the columns {', '.join(first)}. Needed are {kind.allowed}. Rename the "
            "columns, or pass other data."
        )
    if form is None:
        raise unknown_columns(first, source)
    return form


def _rows(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from read_rows(file)


def _converted_files(source: tuple[list[Path], RowFormat]) -> Iterator[dict[str, Any]]:
    """Yield the rows of files as TRL trains on them. (A tuple: `datasets` would deal out a list among workers.)"""
    files, form = source
    for file in files:
        for number, row in enumerate(read_rows(file)):
            yield _converted(row, number, form, file.name)


def _converted(row: Mapping[str, Any], number: int, form: RowFormat, source: str) -> dict[str, Any]:
    try:
        return form.convert(row)
    except RowFault as fault:
        raise fault.at(number, source) from None


def _rows_of_hub(
    rows: Dataset | IterableDataset, source: str, text_field: str, kind: RowKind | None
) -> Dataset | IterableDataset:
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"`{source}` has no rows. At least one is needed. Pass other data.")
    form = _format(first, source, text_field, kind)
    features = form.features | {name: rows.features[name] for name in IMAGES if name in form.columns and rows.features}
    converted = rows.map(
        _converted,
        with_indices=True,
        fn_kwargs={"form": form, "source": source},
        remove_columns=list(first),
        features=Features(features),
    )
    if isinstance(converted, IterableDataset):
        check_rows(converted, form.texts, source)
    return converted
