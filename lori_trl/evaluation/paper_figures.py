"""Results as Markdown, beside the figures of the paper's Tables 1, 2, 11 and 12."""

import json
from collections.abc import Mapping, Sequence

from ..adapter.folder import AdapterFolder
from ..recipes.find import shipped_folder
from .results import Result, cell_text

Figures = dict[tuple[str, str], float]  # task and metric -> a fraction in [0, 1]


def paper_figures(adapter: AdapterFolder) -> Figures:
    """
    Return what the paper has for an adapter: on its own task, of its base model, rank and variant.

    Args:
        adapter ([`AdapterFolder`]): one of one task; of plain LoRA, which has no record, the folder's name begins with
            the task's, as the baseline recipes name it (`math-lora`).

    Returns:
        `dict`: task and metric -> the figure; empty for any other adapter.
    """
    variant, task = "LoRA", adapter.task.partition("-")[0]
    if adapter.record is not None:
        variant, task = adapter.record.variant, adapter.task
        if len(adapter.tasks) != 1:
            return {}
    elif adapter.config.get("use_dora"):
        variant = "DoRA"
    base = (adapter.base or "").rpartition("/")[2]
    file = shipped_folder("recipes") / "paper_figures.json"
    tables = json.loads(file.read_text(encoding="utf-8"))
    of_task = tables.get(f"{base}, r = {adapter.rank}, {variant}", {}).get(task, {})
    return {(name.split()[0], name.split()[1]): percent / 100 for name, percent in of_task.items()}


def markdown_table(results: Mapping[str, Sequence[Result]], paper: Mapping[str, Figures]) -> str:
    """
    Return a table in Markdown: a row for every figure, a column for every model, and the paper's beside a model's.

    Args:
        results (`Mapping[str, Sequence[Result]]`): model -> its figures.
        paper (`Mapping[str, Figures]`): model -> the paper's; a model without any has no such column.
    """
    cells: dict[tuple[str, str], dict[str, Result]] = {}
    for model, figures in results.items():
        for figure in figures:
            cells.setdefault((figure.task, figure.metric), {})[model] = figure
    head, rows = ["task", "metric", "n"], [[*key, f"{next(iter(row.values())).n:,}"] for key, row in cells.items()]
    for model in results:
        head.append(model.replace("|", "\\|"))
        for row, found in zip(rows, cells.values(), strict=True):
            row.append(cell_text(found[model]) if model in found else "")
        if of_paper := paper.get(model):
            head.append("paper")
            for row, key in zip(rows, cells, strict=True):
                row.append(f"{of_paper[key]:.3f}" if key in of_paper else "")
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
