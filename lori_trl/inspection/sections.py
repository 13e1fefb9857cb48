"""What an inspection says, section by section: in words, as tables, and as drawings."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..adapter.heatmaps import draw_maps, layer_label, layer_numbers, maps_height, projection_names
from .pictures import draw_cosine_by_layer, draw_magnitudes, draw_matrix, matrix_height
from .statistics import Cell, Inspection, TaskPair, TaskStatistics

_BARS = "▁▂▃▄▅▆▇█"
_PAIRS_DRAWN = 10  # of the pairs' heat map by layer; ten adapters have 45


@dataclass
class Grid:
    """A table of texts; the first column names the row."""

    columns: list[str]  # the heads
    rows: list[list[str]]  # as many texts as there are columns

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, to be set flush right."""
        columns = list(zip(*self.rows, strict=True)) or [() for _ in self.columns]
        return [all(re.match(r"[-+–\d]|$", text) for text in column) for column in columns]


@dataclass
class Drawing:
    """A picture that can be drawn."""

    title: str  # what stands above it
    alt: str  # the picture in a sentence, for who cannot see it
    height: float  # in inches; all are `WIDTH` wide
    draw: Callable[[Any], None]  # draws it into a matplotlib figure


@dataclass
class Section:
    """One thing to see: what it is, in words, as a table, and as a picture."""

    key: str  # a short name; that of the picture's file
    title: str  # the heading
    text: str  # what it shows and how to read it
    table: Grid  # the figures, condensed
    sparks: list[str] | None = None  # a line of bars for each row of the table: its course over the layers
    numbers: Grid | None = None  # the figures in full, as the picture shows them
    drawing: Drawing | None = None  # the picture

    def for_terminal(self) -> Group:
        """Return heading, table and text for a terminal that takes no text for markup, for names are foreign."""
        table = Table()
        for column, numeric in zip(self.table.columns, self.table.numeric, strict=True):
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in self.table.rows:
            table.add_row(*row)
        parts: list[Text | Table] = [Text(self.title, style="bold"), table]
        if self.sparks is not None:
            bars = Table(self.table.columns[0], "by layer")
            for row, spark in zip(self.table.rows, self.sparks, strict=True):
                bars.add_row(row[0], spark)
            parts.append(bars)
        return Group(*parts, *([Text(self.text, style="dim")] if self.text else []))


def inspection_sections(inspection: Inspection) -> list[Section]:
    """Put what was found into sections, in the order in which to read them."""
    tasks = inspection.tasks
    sections = [_adapters_section(inspection), _tasks_section(tasks)]
    sections += [_projections_section(inspection)] if inspection.projections else []
    sections += [_overlap_section(inspection), _cosine_section(inspection)] if inspection.pairs else []
    compared = [pair for pair in inspection.pairs if pair.cosine_by_layer]
    sections += [_cosine_by_layer_section(compared)] if compared else []
    return [*sections, _density_section(tasks), _norms_section(tasks), _magnitudes_section(tasks)]


def verdict(inspection: Inspection) -> str:
    """
    Say whether the tasks interfere, as far as weights tell: by the largest |cosine| between two deltas.

    Source: the bounds, 0.05 and 0.3, are a rule of thumb of this project. Nothing was measured that would give others.
    """
    if len(inspection.tasks) < 2:
        return "There is one task, and nothing that it could interfere with."
    compared = [(pair.cosine, f"{pair.first} | {pair.second}") for pair in inspection.pairs if pair.cosine is not None]
    if not compared:
        return "Whether these tasks interfere can't be read from their weights: no two of them can be compared."
    cosine, names = max(compared, key=lambda pair: abs(pair[0]))
    size = abs(cosine)
    how_far = "don't interfere" if size < 0.05 else "interfere a little" if size < 0.3 else "interfere"
    why = "" if size < 0.05 else ", in the same direction" if cosine > 0 else ", against each other"
    return (
        f"By their weights, these tasks {how_far}: the largest cosine between two deltas is {_signed(cosine)} "
        f"({names}){why}. What a merge costs is told by held-out rows alone."
    )


def _adapters_section(inspection: Inspection) -> Section:
    rows = [
        [
            adapter.name,
            adapter.base_model or "not named",
            f"{adapter.modules}",
            ", ".join(map(str, adapter.ranks)),
            ", ".join(f"{scaling:.4g}" for scaling in adapter.scalings),
            f"{adapter.numel_B:,}",
            ", ".join(adapter.tasks),
        ]
        for adapter in inspection.adapters
    ]
    columns = ["adapter", "base model", "matrices", "rank", "scaling", "entries of B", "tasks, oldest first"]
    return Section("adapters", "Adapters", "", Grid(columns, rows))


def _tasks_section(tasks: Sequence[TaskStatistics]) -> Section:
    rows = [
        [
            task.name,
            f"{task.selected:,}" if task.masked else "–",
            _percent(task.density),
            f"{task.owned:,}",
            f"{task.norm:.4g}",
        ]
        for task in tasks
    ]
    text = (
        "The delta of a task is s B A, with B reduced to the entries that belong to it: those of its mask that no "
        "newer task of the same adapter has too; all of B where there is no mask (–). Norms are Frobenius norms."
    )
    columns = ["task", "entries on the mask", "density", "entries of its own", "norm of the delta"]
    return Section("tasks", "Tasks", text, Grid(columns, rows))


def _overlap_section(inspection: Inspection) -> Section:
    names = [task.name for task in inspection.tasks]
    texts, labels, ratios = {}, {}, {}
    for pair in inspection.pairs:
        if pair.overlap is None:
            continue
        star = "" if pair.same_A else " *"
        both_ways = (pair.first, pair.second), (pair.second, pair.first)
        each = zip(pair.overlap.shares, pair.overlap.chance, pair.overlap.chance_by_matrix, strict=True)
        for two, (share, chance, by_matrix) in zip(both_ways, each, strict=True):
            texts[two] = f"{_percent(share)}{star}\n({100 * chance:.3g}; {100 * by_matrix:.3g})"
            labels[two] = f"{100 * share:.3g}{star}\n({100 * chance:.3g})"
            ratios[two] = share / chance if chance else math.nan
    starred = any(not pair.same_A for pair in inspection.pairs if pair.overlap is not None)
    section = Section(
        "overlap",
        "Overlap of masks",
        "Of the entries that the row's task trains, the share that the column's task trains too. In brackets, in %, "
        "what chance gives: the density of the other mask; the same when every matrix keeps its own density."
        + (" * The two have different A: equal positions are not equal directions." if starred else ""),
        _matrix(names, texts),
    )
    if texts:
        section.drawing = Drawing(
            section.title,
            "Matrix of the tasks: the masks' overlap in times of chance. The table has the values.",
            matrix_height(names),
            partial(draw_matrix, names, ratios, labels, (0, 2), "times chance", "overlap in %, in brackets chance"),
        )
    return section


def _cosine_section(inspection: Inspection) -> Section:
    names = [task.name for task in inspection.tasks]
    found = {}
    for pair in inspection.pairs:
        if pair.cosine is not None:
            found[pair.first, pair.second] = found[pair.second, pair.first] = pair.cosine
    section = Section(
        "cosine",
        "Cosine of deltas",
        "Over all matrices. 0: the tasks' changes of the model are orthogonal; 1: the same direction; below 0: they "
        "work against each other.",
        _matrix(names, {two: _signed(cosine) for two, cosine in found.items()}),
    )
    if found:
        limit = max(0.1, *map(abs, found.values()))
        labels = {two: _signed(cosine, 3) for two, cosine in found.items()}
        section.drawing = Drawing(
            section.title,
            "Matrix of the tasks: the cosine between every two deltas. The table has the values.",
            matrix_height(names),
            partial(draw_matrix, names, found, labels, (-limit, limit), "cosine", "task"),
        )
    return section


def _cosine_by_layer_section(pairs: Sequence[TaskPair]) -> Section:
    names = [f"{pair.first} | {pair.second}" for pair in pairs]
    layers = sorted({layer for pair in pairs for layer in pair.cosine_by_layer})
    rows = []
    for name, pair in zip(names, pairs, strict=True):
        ranked = sorted((cosine, layer) for layer, cosine in pair.cosine_by_layer.items())
        ends = [f"{_signed(cosine)} (layer {layer_label(layer)})" for cosine, layer in (ranked[0], ranked[-1])]
        rows.append([name, *ends])
    grid = [[pair.cosine_by_layer.get(layer, math.nan) for layer in layers] for pair in pairs]
    numbers = [[layer_label(layer), *(_signed(row[i]) for row in grid)] for i, layer in enumerate(layers)]
    title = "Cosine of deltas by layer"
    largest = [max([0.0, *(abs(value) for value in row if not math.isnan(value))]) for row in grid]
    drawn = sorted(sorted(range(len(pairs)), key=lambda i: -largest[i])[:_PAIRS_DRAWN])
    some = f" The picture has the {_PAIRS_DRAWN} pairs with the largest." if len(drawn) < len(pairs) else ""
    return Section(
        "cosine_by_layer",
        title,
        f"The same within each layer, over its projections.{some}",
        Grid(["tasks", "lowest", "highest"], rows),
        numbers=Grid(["layer", *names], numbers),
        drawing=Drawing(
            title,
            "Heat map of the cosine between the deltas of every two tasks, by layer.",
            0.9 + 0.4 * len(drawn),
            partial(draw_cosine_by_layer, [pairs[i] for i in drawn], layers, [grid[i] for i in drawn]),
        ),
    )


def _projections_section(inspection: Inspection) -> Section:
    rows = [
        [
            f"{pair.first} | {pair.second}",
            "the same" if pair.same else "different",
            f"{pair.mean:.4f}",
            f"{pair.chance:.4f}",
            f"{pair.max:.4f}",
        ]
        for pair in inspection.projections
    ]
    return Section(
        "projections",
        "Cosine of the projections A",
        "|cosine| between the rows of one A and the rows of the other, over all matrices. Independent random rows "
        "have a mean of sqrt(2 / (pi in_features)); the largest is 1 where both have the same row.",
        Grid(["adapters", "A", "mean", "chance", "largest"], rows),
    )


def _density_section(tasks: Sequence[TaskStatistics]) -> Section:
    return _section_by_layer(
        "density",
        "Density by layer and projection",
        "Which % of B a task trains; without a mask, which % is not 0.",
        tasks,
        lambda cell: 100 * cell.density,
        [(f"{task.name}, {_percent(task.density)}", task) for task in tasks if 0 < task.density < 1],
        ("which share of B's entries is trained", "% of the entries", True),
    )


def _norms_section(tasks: Sequence[TaskStatistics]) -> Section:
    return _section_by_layer(
        "norms",
        "Norms of the deltas by layer and projection",
        "Frobenius norms of s B A. They are not relative to the base model's weights, which are not read.",
        tasks,
        lambda cell: cell.norm,
        [(f"{task.name}, {task.norm:.4g} in all", task) for task in tasks if task.norm > 0],
        ("the Frobenius norm of the delta", "norm", False),
    )


def _section_by_layer(
    key: str,
    title: str,
    text: str,
    tasks: Sequence[TaskStatistics],
    value: Callable[[Cell], float],
    drawn: Sequence[tuple[str, TaskStatistics]],
    picture: tuple[str, str, bool],
) -> Section:
    """Tell a figure by layer and projection. `drawn` are the heat maps; `picture`: what is seen, in what unit."""
    section = Section(key, title, text, *_by_projection(tasks, value))
    if drawn:
        maps = [(heading, {place: value(cell) for place, cell in task.cells.items()}) for heading, task in drawn]
        seen, unit, shared = picture
        section.numbers = _cell_grid(tasks, value)
        section.drawing = Drawing(
            title,
            f"A heat map a task: {seen}, by layer and projection.",
            maps_height(maps),
            partial(draw_maps, maps, unit, shared),
        )
    return section


def _magnitudes_section(tasks: Sequence[TaskStatistics]) -> Section:
    shares = (0.01, 0.1, 0.5)
    rows = [
        [
            task.name,
            f"{task.magnitudes.zeros:,}",
            *(_percent(task.magnitudes.top(share)) if task.norm > 0 else "–" for share in shares),
        ]
        for task in tasks
    ]
    section = Section(
        "magnitudes",
        "Entries by magnitude",
        "How much of the squared norm of B the largest of a task's own entries hold.",
        Grid(["task", "entries that are 0", *(f"largest {_percent(share)}" for share in shares)], rows),
    )
    drawn = [task for task in tasks if task.norm > 0]
    if drawn:
        bins = sorted({i for task in drawn for i in range(task.magnitudes.span.start, task.magnitudes.span.stop)})
        section.numbers = Grid(
            ["magnitude from", *(task.name for task in drawn)],
            [
                [f"{10 ** drawn[0].magnitudes.edge(i):.2g}"]
                + [_percent(int(task.magnitudes.counts[i]) / task.magnitudes.numel) for task in drawn]
                for i in bins
            ],
        )
        section.drawing = Drawing(
            section.title,
            "Above, a histogram of the magnitudes of a task's entries on a logarithmic scale; below, which share of "
            "the squared norm the largest entries hold.",
            4.6 + 0.2 * len(drawn),
            partial(draw_magnitudes, drawn),
        )
    return section


def _by_projection(tasks: Sequence[TaskStatistics], value: Callable[[Cell], float]) -> tuple[Grid, list[str]]:
    """Condense cells to a row a task and a column a projection, and a line of bars over the layers."""
    names = projection_names(task.cells for task in tasks)
    rows = []
    for task in tasks:
        totals = [task.total(projection=name) for name in names]
        rows.append([task.name, *(f"{value(total):.3g}" if total.numel else "–" for total in totals)])
    sparks = [_spark([value(task.total(layer)) for layer in layer_numbers(task.cells)]) for task in tasks]
    return Grid(["task", *(name.removesuffix("_proj") for name in names)], rows), sparks


def _cell_grid(tasks: Sequence[TaskStatistics], value: Callable[[Cell], float]) -> Grid:
    names = projection_names(task.cells for task in tasks)
    rows = [
        [
            f"{task.name}, layer {layer_label(layer)}",
            *(f"{value(task.cells[layer, name]):.3g}" if (layer, name) in task.cells else "–" for name in names),
        ]
        for task in tasks
        for layer in layer_numbers(task.cells)
    ]
    return Grid(["task, layer", *(name.removesuffix("_proj") for name in names)], rows)


def _matrix(names: Sequence[str], texts: Mapping[tuple[str, str], str]) -> Grid:
    rows = [[row, *("" if row == column else texts.get((row, column), "–") for column in names)] for row in names]
    return Grid(["", *names], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}\u00a0%"


def _signed(cosine: float, digits: int = 4) -> str:
    return "–" if math.isnan(cosine) else f"{round(cosine, digits) + 0.0:+.{digits}f}"  # + 0.0: no -0.0000


def _spark(values: Sequence[float]) -> str:
    """Draw values from 0 to their largest as bars, one each, in at most 40 characters."""
    width = -(-len(values) // 40) or 1
    values = [sum(part) / len(part) for part in (values[i : i + width] for i in range(0, len(values), width))]
    top = max(values, default=0) or 1
    return "".join(_BARS[min(int(len(_BARS) * value / top), len(_BARS) - 1)] for value in values)
