"""The data to train on: from the Hub, a file or a folder, in any format that TRL knows."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl import ScriptArguments

from .recipes import shipped_folder

# The columns that TRL's formats are made of. Others (answers, ids) are for scoring and are left out.
_TRAINING_COLUMNS = {"prompt", "completion", "messages", "text", "tools", "chat_template_kwargs", "images", "image"}


@dataclass
class LoriScriptArguments(ScriptArguments):
    """
    What to train on and from.

    Args:
        recipe (`str`, *optional*):
            A YAML file, or the name of a shipped recipe. The command line goes over it.
        dry_run (`bool`, *optional*, defaults to `False`):
            Build the model without weights, print the counts and stop.
        dataset_path (`str`, *optional*):
            A .jsonl or .json file, or a folder of such files named after their splits. In a recipe, relative paths
            are also looked up beside the recipe.
        adapter_name_or_path (`str`, *optional*):
            A LoRI adapter to continue. Its rank, alpha and target modules are kept.
    """

    recipe: str | None = field(
        default=None, metadata={"help": "A YAML file, or the name of a shipped recipe. The command line goes over it."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Build the model without weights, print the counts and stop."}
    )
    dataset_path: str | None = field(
        default=None,
        metadata={"help": "A .jsonl or .json file, or a folder of such files named after their splits."},
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A LoRI adapter to continue. Its rank, alpha and target modules are kept."},
    )


def load_training_data(arguments: LoriScriptArguments) -> DatasetDict:
    """
    Load the data set that the arguments name.

    Returns:
        `DatasetDict`: split -> rows, with the columns that TRL trains on.

    Raises:
        `ValueError`: no data set or two are named, or the train split is missing or empty.
        `FileNotFoundError`: `dataset_path` does not exist or holds no JSON.
    """
    if (arguments.dataset_path is None) == (arguments.dataset_name is None):
        raise ValueError(
            f"`dataset_name={arguments.dataset_name}`, `dataset_path={arguments.dataset_path}`. Exactly one of them "
            "says what to train on. Pass a Hub name as `dataset_name`, or a file or folder as `dataset_path`."
        )
    if arguments.dataset_path is not None:
        files = _split_files(arguments.dataset_path, arguments.recipe)
        data = {split: _read_json(file) for split, file in files.items()}
    else:
        data = load_dataset(
            arguments.dataset_name, name=arguments.dataset_config, streaming=arguments.dataset_streaming
        )
    split = arguments.dataset_train_split
    where = arguments.dataset_path or arguments.dataset_name
    if split not in data:
        raise ValueError(
            f"`dataset_train_split={split!r}` is not in `{where}`, which has {', '.join(data)}. Pass one of these."
        )
    if next(iter(data[split]), None) is None:
        raise ValueError(f"The split {split!r} of `{where}` has no rows. At least one is needed. Pass other data.")
    return DatasetDict({name: _training_rows(rows) for name, rows in data.items()})


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """
    Put an instruction into the Alpaca template.

    Source: Taori et al. 2023. The authors of LoRI indent every line of it by an accident of their f-strings; not so
    here.
    """
    what = "an instruction that describes a task"
    if input:
        what += ", paired with an input that provides further context"
    text = f"Below is {what}. Write a response that appropriately completes the request.\n\n"
    text += f"### Instruction:\n{instruction}\n\n"
    return text + (f"### Input:\n{input}\n\n" if input else "") + "### Response:\n"


def _training_rows(rows):
    columns = set(rows.column_names)
    if {"instruction", "output"} <= columns and not columns & _TRAINING_COLUMNS:
        rows = rows.map(
            lambda row: {
                "prompt": alpaca_prompt(row["instruction"], row.get("input") or ""),
                "completion": row["output"],
            }
        )
    return rows.select_columns(
        [column for column in rows.column_names if column in _TRAINING_COLUMNS] or list(columns)
    )


def data_name(arguments: LoriScriptArguments) -> str:
    """Return the data set's name without its folder or namespace: the default name of a task."""
    return Path(arguments.dataset_path or arguments.dataset_name).stem


def _read_json(file: str) -> Dataset:
    if Path(file).stat().st_size == 0:
        return Dataset.from_dict({})
    try:
        return load_dataset("json", data_files=file, split="train")
    except DatasetGenerationError as error:
        raise ValueError(
            f"`{file}` is unreadable: {error.__cause__}. A .jsonl file has one JSON object a line, a .json "
            "file a list of them, all with the same keys. Correct the file."
        ) from error


def _split_files(dataset_path: str, recipe: str | None) -> dict[str, str]:
    """Find a path as given, beside the recipe or among the shipped ones; return split -> file."""
    beside_recipe = [Path(recipe).parent / dataset_path, shipped_folder("recipes") / dataset_path] if recipe else []
    path = next((path for path in [Path(dataset_path), *beside_recipe] if path.exists()), None)
    files = []
    if path is not None:
        files = [path] if path.is_file() else sorted(path.iterdir())
        files = [file for file in files if file.suffix in (".jsonl", ".json")]
    if not files:
        raise FileNotFoundError(
            f"`dataset_path={dataset_path}` {'does not exist' if path is None else 'holds no .jsonl or .json file'}. "
            "Allowed is a .jsonl or .json file, or a folder with e.g. train.jsonl and test.jsonl. Correct the path."
        )
    return {"train": str(path)} if path.is_file() else {file.stem: str(file) for file in files}
