"""Results on file, beside the adapter, and in a table."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from ..adapter.layout import ADAPTER_WEIGHTS, EVAL_RESULTS_NAME
from ..hub.download import hash_file
from ..inputs.files import replacing, sole_writer

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Result:
    """One figure."""

    task: str  # the benchmark, or the name of the held-out file
    metric: str  # what was measured; rates are fractions in [0, 1], losses nats per token, `unparsed` a count
    value: float  # the figure
    n: int  # over how many rows, or tokens for a loss
    stderr: float | None = None  # its standard error, in the same unit
    dataset: str | None = None  # the data set's name on the Hub
    # `source`, the number of `rows`, and the `sha256` of the rows
    data: Mapping[str, Any] = field(default_factory=dict)
    # what else decides the figure: generation, limit, seed, versions
    settings: Mapping[str, Any] = field(default_factory=dict)


def rows_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of rows, as JSON lines with sorted keys."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def versions(*more: str) -> dict[str, str]:
    """Return the versions of the packages that decide a figure."""
    return {name: version(name) for name in ("lori-trl", "transformers", "torch", *more)}


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """
    Read the results beside an adapter; none if there is no file.

    Raises:
        `ValueError`: the file is not of its form, or of a later one.
    """
    file = Path(folder) / EVAL_RESULTS_NAME
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, results = content["format_version"], list(content["results"])
        known = [(result["task"], result["metric"]) for result in results]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{file}` is not of its form ({error!r}). It is what `lori eval` writes. Correct it or move it away."
        ) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`{file}` has format_version {version}. This lori_trl reads versions up to {FORMAT_VERSION}. Upgrade it."
        )
    return [result for result, key in zip(results, known, strict=True) if key]


def records(results: Sequence[Result], name: str, base_model: str | None) -> list[dict[str, Any]]:
    """
    Return results as they go on file: with the model, and without what is not known.

    Args:
        results (`Sequence[Result]`): the figures.
        name (`str`): the model: a folder, a file or a name on the Hub. Of local ones the last part is kept.
        base_model (`str`, *optional*): the base that `name` is an adapter of.
    """
    weights = Path(name) / ADAPTER_WEIGHTS
    model = {
        "name": _without_folders(name),
        "base": None if base_model is None else _without_folders(base_model),
        "sha256": hash_file(weights, lfs=True) if weights.is_file() else None,
    }
    return [_known({**asdict(result), "model": _known(model)}) for result in results]


def write_results(folder: str | Path, new: Sequence[Mapping[str, Any]]) -> Path:
    """
    Write results beside an adapter: new ones replace those of the same task and metric, others stay.

    Args:
        folder (`str` or `Path`): the adapter's folder, or a whole model's.
        new (`Sequence[Mapping[str, Any]]`): from [`records`].

    Returns:
        `Path`: the file. It is replaced in one step.
    """
    replaced = {(result["task"], result["metric"]) for result in new}
    file = Path(folder) / EVAL_RESULTS_NAME
    with sole_writer(file, seconds=60, beside=True):  # another evaluation may add its own
        kept = [result for result in read_results(folder) if (result["task"], result["metric"]) not in replaced]
        write_file(file, [*kept, *new])
    return file


def write_file(file: str | Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results to a file, which is replaced in one step. What is no number is left out: JSON has no NaN."""
    content = {"format_version": FORMAT_VERSION, "results": [each for each in results if math.isfinite(each["value"])]}
    with replacing(file) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def results_table(results: Mapping[str, Sequence[Result]]) -> Table:
    """Return a table: a row for every figure, a column for every model; values with their standard errors."""
    table = Table("task", title="evaluation", title_justify="left")
    table.add_column("metric", overflow="fold")
    table.add_column("n", justify="right")
    for name in results:
        table.add_column(name, justify="right")
    cells = {name: {(result.task, result.metric): result for result in figures} for name, figures in results.items()}
    keys = list(dict.fromkeys(key for figures in cells.values() for key in figures))
    for task in dict.fromkeys(task for task, _ in keys):
        for key in (key for key in keys if key[0] == task):
            row = [figures.get(key) for figures in cells.values()]
            n = next(result.n for result in row if result is not None)
            table.add_row(*key, f"{n:,}", *("" if result is None else cell_text(result) for result in row))
        table.add_section()
    return table


def cell_text(result: Result) -> str:
    """Return a figure as a table shows it, with its standard error."""
    if result.metric.startswith("unparsed"):
        return f"{result.value:.0f}"
    return f"{result.value:.3f}" + (f" \u00b1 {result.stderr:.3f}" if result.stderr is not None else "")


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _without_folders(name: str) -> str:
    return Path(name).resolve().name if Path(name).exists() else name
