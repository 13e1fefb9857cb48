"""
The tasks of the paper, nlu, math, code and safety: what they are trained and tested on.

The raw rows are recognised by their columns and become prompt-completion rows, the same for training and for testing:

| raw row | columns | prompt | besides, for scoring |
| --- | --- | --- | --- |
| CodeAlpaca, Saferpaca, commonsense_170k | instruction, (input,) output | [`alpaca_prompt`] | answer, choices |
| GSM8K | question, answer with `#### n` | [`gsm8k_prompt`] | answer |
| HumanEval | prompt, canonical_solution | the code, stripped | raw_prompt, test, entry_point, task_id |
| HEx-PHI | instruction | [`hex_phi_prompt`] | |

Source: paper section 3.1; the prompts are the authors', without the blanks that their f-strings put before each line.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..inputs.files import describe_fault
from .data_files import read_rows, split_files
from .raw_rows import RowFault, hex_phi_row, human_eval_row, raw_row_converter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark."""

    name: str  # as in `lori eval --tasks`
    source: str  # a name on the Hub, or the address of a JSON file
    config: str | None = None  # the configuration on the Hub
    split: str | None = None  # the split on the Hub; all of them together by default
    load: dict[str, Any] = field(default_factory=dict)  # more arguments of `load_dataset`
    gated: bool = False  # whether its terms must be accepted on the Hub first
    sizes: tuple[int, ...] = ()  # how many rows it has had on the Hub, newest first; empty where that is not known


@dataclass(frozen=True)
class Task:
    """A task of the paper: what it is trained and tested on."""

    name: str  # as in recipes
    source: str  # the training data: a name on the Hub, or the address of a JSON file to download
    benchmarks: tuple[Benchmark, ...]  # the benchmarks
    config: str | None = None  # the configuration on the Hub


# The folders of LLM-Adapters (Hu et al. 2023); the sets are on no Hub in this form.
_LLM_ADAPTERS = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset/{}/test.json"
_NLU = {
    "boolq": "boolq",
    "piqa": "piqa",
    "social_i_qa": "social_i_qa",
    "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy",
    "openbookqa": "openbookqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
}
_REST = "rest"  # a second field in a row that must have one
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "nlu",
            "zwhe99/commonsense_170k",
            tuple(Benchmark(name, _LLM_ADAPTERS.format(folder)) for name, folder in _NLU.items()),
        ),
        Task(
            "math", "openai/gsm8k", (Benchmark("gsm8k", "openai/gsm8k", "main", "test", sizes=(1319,)),), config="main"
        ),
        Task(
            "code",
            "sahil2801/CodeAlpaca-20k",
            (Benchmark("humaneval", "openai/openai_humaneval", split="test", sizes=(164,)),),
        ),
        Task(
            "safety",
            "https://raw.githubusercontent.com/vinid/safety-tuned-llamas/main/data/training/"
            "saferpaca_Instructions_2000.json",
            # 11 files of 30 instructions when the paper was written; its authors then withdrew the second, child abuse
            # content. The files have no header line: without names, the first instruction of each would become one,
            # and with one name alone, pandas would take what stands before an unquoted comma for an index.
            (
                Benchmark(
                    "hex_phi",
                    "LLM-Tuning-Safety/HEx-PHI",
                    load={
                        "features": Features({"instruction": Value("string"), _REST: Value("string")}),
                        "names": ["instruction", _REST],
                        "header": None,
                        "index_col": False,
                    },
                    gated=True,
                    sizes=(300, 330),
                ),
            ),
        ),
    )
}
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for task in TASKS.values() for benchmark in task.benchmarks
}


def load_benchmark(name: str, path: str | None = None) -> Dataset:
    """
    Load a benchmark as prompt-completion rows, with the columns that scoring needs.

    Args:
        name (`str`): a key of `BENCHMARKS`.
        path (`str`, *optional*): a .jsonl or .json file in place of the set's source: raw rows, or rows with prompts.

    Returns:
        `Dataset`: `prompt`, and as the set has them `completion`, `answer`, `choices`, `task_id`, `test`, ...

    Raises:
        `ValueError`: the name is unknown, or the rows are none of the known ones, or not whole.
        `FileNotFoundError`: `path` does not exist.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"`{name}` is no benchmark. Allowed are {', '.join(BENCHMARKS)}. Pass one of these.")
    benchmark = BENCHMARKS[name]
    rows: Dataset | list[dict[str, Any]]
    if path is not None:
        splits = split_files(path)
        files = splits.get(name) or splits.get("test") or (len(splits) == 1 and next(iter(splits.values())))
        if not files:
            raise ValueError(
                f"`{path}` has {', '.join(splits)}. Allowed is a folder with {name} or test. Pass a file of it "
                "instead."
            )
        rows = [row for file in files for row in read_rows(file)]
    elif benchmark.source.startswith("https://"):
        rows = load_dataset("json", data_files=benchmark.source, split="train")
    else:
        rows = _rows_from_hub(benchmark)
    source = str(path or benchmark.source)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"`{source}` has no rows. At least one is needed. Pass other data.")
    convert = raw_row_converter(first) or (hex_phi_row if "instruction" in first else None)
    if "prompt" in first and convert is not human_eval_row:
        convert = dict
    if convert is None:
        raise ValueError(
            f"The rows of `{source}` have the columns {', '.join(first)}. Allowed are the raw rows "
            f"of {name}, or rows with a prompt and what its scoring needs. Rename the columns."
        )
    return _with_prompts(rows, convert, source)


def _with_prompts(
    rows: Iterable[Mapping[str, Any]], convert: Callable[[Mapping[str, Any]], dict[str, Any]], source: str
) -> Dataset:
    """Convert rows and keep their other columns; every column has values of one type."""
    new: list[dict[str, Any]] = []
    types: dict[str, type] = {}
    for number, row in enumerate(rows):
        try:
            new.append({**row, **convert(row)})
            for column, value in new[-1].items():
                if value is not None and types.setdefault(column, type(value)) is not type(value):
                    raise RowFault(f"has `{column}={str(value)[:80]}`", f"a {types[column].__name__}, as before it")
        except RowFault as fault:
            raise fault.at(number, source) from None
    columns = dict.fromkeys(column for row in new for column in row)
    return Dataset.from_dict({column: [row.get(column) for row in new] for column in columns})


def _rows_from_hub(benchmark: Benchmark) -> Dataset:
    """Load a benchmark's rows, of all splits where none is named, and look whether they are whole."""
    try:
        rows = load_dataset(benchmark.source, benchmark.config, split=benchmark.split, **benchmark.load)
    except DatasetGenerationError as error:
        raise _not_whole(benchmark, describe_fault(error.__cause__ or error)) from error
    if isinstance(rows, DatasetDict):
        rows = concatenate_datasets(list(rows.values()))
    if _REST in rows.column_names:
        for row in rows:
            if row[_REST] is not None:
                raise _not_whole(benchmark, f"{row['instruction'][:40]!r} has a second field, {row[_REST][:40]!r}")
        rows = rows.remove_columns(_REST)
    if benchmark.sizes and len(rows) not in benchmark.sizes:
        logger.warning(
            f"`{benchmark.source}` has {len(rows)} rows; known are {' and '.join(map(str, benchmark.sizes))}. Figures "
            "on other rows are not comparable with published ones."
        )
    return rows


def _not_whole(benchmark: Benchmark, fault: str) -> ValueError:
    return ValueError(
        f"`{benchmark.source}` has a row that is not whole: {fault}. A row has one field, in quotes if it has commas "
        f"inside. Get the files anew, or pass rows of your own as `--dataset_path {benchmark.name}=FILE.jsonl`."
    )
