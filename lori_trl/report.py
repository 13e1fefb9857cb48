"""What inspecting found, to look at: tables, pictures, a page."""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers.utils import is_matplotlib_available

if TYPE_CHECKING:
    from .inspection import Cell, Inspection, Place, TaskPair, TaskStatistics
    from .masks import LoriMasks


@dataclass
class Grid:
    """
    A table of texts; the first column names the row.

    Args:
        columns (`list[str]`): the heads.
        rows (`list[list[str]]`): as many texts as there are columns.
    """

    columns: list[str]
    rows: list[list[str]]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, to be set flush right."""
        columns = list(zip(*self.rows, strict=True)) or [() for _ in self.columns]
        return [all(re.match(r"[-+–\d]|$", text) for text in column) for column in columns]


@dataclass
class Section:
    """
    One thing to see: what it is, in words, as a table, and as a picture.

    Args:
        key (`str`): a short name; that of the picture's file.
        title (`str`): the heading.
        text (`str`): what it shows and how to read it.
        table ([`Grid`]): the figures, condensed.
        sparks (`list[str]`, *optional*): a line of bars for each row of the table: its course over the layers.
        numbers ([`Grid`], *optional*): the figures in full, as the picture shows them.
        draw (`Callable`, *optional*): draws the picture into a matplotlib figure.
        height (`float`): of the picture, in inches; all are `WIDTH` wide.
        alt (`str`): the picture in a sentence, for who cannot see it.
    """

    key: str
    title: str
    text: str
    table: Grid
    sparks: list[str] | None = None
    numbers: Grid | None = None
    draw: Callable[[Any], None] | None = None
    height: float = 0.0
    alt: str = ""

    def for_terminal(self) -> Group:
        """Return heading, table and text for the terminal."""
        table = Table()
        for column, numeric in zip(self.table.columns, self.table.numeric, strict=True):
            table.add_column(printable(column), justify="right" if numeric else "left", overflow="fold")
        for row in self.table.rows:
            table.add_row(*map(printable, row))
        parts = [Text(self.title, style="bold"), table]
        if self.sparks is not None:
            bars = Table(self.table.columns[0], "by layer")
            for row, spark in zip(self.table.rows, self.sparks, strict=True):
                bars.add_row(printable(row[0]), spark)
            parts.append(bars)
        return Group(*parts, *([Text(self.text, style="dim")] if self.text else []))


WIDTH = 4.8  # inches of a picture: what a phone can show without shrinking the letters much
PAGE_NAME = "inspection.html.jinja"

_INK = "#010203"  # stands for the page's own text colour in an SVG
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D1F", "#56B4E9")  # Okabe and Ito's, for all eyes
_STYLES = ("-", "--", ":", "-.")
_USUAL_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BARS = "▁▂▃▄▅▆▇█"


def printable(text: str) -> str:
    """Keep brackets and control characters in a text from meaning anything to rich or the terminal."""
    return "".join(char if char.isprintable() or char in "\n\u00a0" else "?" for char in text).replace("[", r"\[")


def inspection_sections(inspection: "Inspection") -> list[Section]:
    """Put what was found into sections, in the order in which to read them."""
    tasks = inspection.tasks
    sections = [_adapters_section(inspection), _tasks_section(tasks)]
    sections += [_projections_section(inspection)] if inspection.projections else []
    sections += [_overlap_section(inspection), _cosine_section(inspection)] if inspection.pairs else []
    compared = [pair for pair in inspection.pairs if pair.cosine_by_layer]
    sections += [_cosine_by_layer_section(compared)] if compared else []
    return [*sections, _density_section(tasks), _norms_section(tasks), _magnitudes_section(tasks)]


def render_page(inspection: "Inspection", sections: Sequence[Section]) -> str:
    """
    Render one HTML page that needs no other file and no network.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pictures = {section.key: _svg(section) for section in sections if section.draw is not None}
    names = [adapter.name for adapter in inspection.adapters]
    page = environment.get_template(PAGE_NAME)
    return page.render(names=names, notes=inspection.notes, sections=sections, pictures=pictures)


def render_pictures(sections: Sequence[Section]) -> dict[str, bytes]:
    """
    Draw every section that has a picture.

    Returns:
        `dict[str, bytes]`: the section's key -> a PNG.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: there is nothing to draw.
    """
    return {section.key: _png([[section]]) for section in _drawn(sections)}


def render_picture(sections: Sequence[Section]) -> bytes:
    """
    Draw all sections that have a picture into one PNG, in two columns.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: there is nothing to draw.
    """
    columns: list[list[Section]] = [[], []]
    for section in _drawn(sections):
        min(columns, key=_height).append(section)
    return _png([column for column in columns if column])


def _drawn(sections: Sequence[Section]) -> list[Section]:
    drawn = [section for section in sections if section.draw is not None]
    if not drawn:
        raise ValueError(
            "`--save` has nothing to draw: every B is zero. A trained adapter is needed. Pass one, or leave out "
            "`--save`."
        )
    return drawn


def draw_density(masks: "Mapping[str, LoriMasks]", file: Path) -> bool:
    """
    Draw the density of the newest task's mask by layer and projection, where matplotlib is installed
    (`lori-trl[plots]`).

    Returns:
        `bool`: whether it was drawn: without matplotlib, or for all of B, there is nothing to see.

    Source: paper Figure 6.
    """
    newest = list(masks.values())[-1] if masks else None
    if newest is None or newest.density == 1 or not is_matplotlib_available():
        return False
    cells = newest.by_layer_and_projection()
    maps = [(f"Trained entries of B, mean {100 * newest.density:.2g} %", cells)]
    with _canvas() as figure_of:
        figure = figure_of(figsize=(1.5 * WIDTH, _maps_height(maps)), dpi=110)
        _draw_maps(maps, "% of the entries", 100, True, figure)
        figure.savefig(file, metadata={"Software": None})  # the same masks give the same bytes
    return True


# ---- the sections ----------------------------------------------------------------------------------------------


def _adapters_section(inspection: "Inspection") -> Section:
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


def _tasks_section(tasks: "Sequence[TaskStatistics]") -> Section:
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


def _overlap_section(inspection: "Inspection") -> Section:
    names = [task.name for task in inspection.tasks]
    found = {}
    for pair in inspection.pairs:
        if pair.overlap is not None:
            parts = [pair.overlap.shares, pair.overlap.chance, pair.overlap.chance_by_matrix]
            star = "" if pair.same_A else " *"
            found[pair.first, pair.second] = (*(part[0] for part in parts), star)
            found[pair.second, pair.first] = (*(part[1] for part in parts), star)

    def text(cell: "tuple[float, float, float, str]") -> str:
        share, chance, by_matrix, star = cell
        return f"{_percent(share)}{star}\n({100 * chance:.3g}; {100 * by_matrix:.3g})"

    def label(cell: "tuple[float, float, float, str]") -> str:
        share, chance, _, star = cell
        return f"{100 * share:.3g}{star}\n({100 * chance:.3g})"

    starred = any(not pair.same_A for pair in inspection.pairs if pair.overlap is not None)
    section = Section(
        "overlap",
        "Overlap of masks",
        "Of the entries that the row's task trains, the share that the column's task trains too. In brackets, in %, "
        "what chance gives: the density of the other mask; the same when every matrix keeps its own density."
        + (" * The two have different A: equal positions are not equal directions." if starred else ""),
        _matrix(names, {two: text(cell) for two, cell in found.items()}),
    )
    if found:
        ratios = {two: cell[0] / cell[1] if cell[1] else math.nan for two, cell in found.items()}
        labels = {two: label(cell) for two, cell in found.items()}
        section.draw = partial(
            _draw_matrix, names, ratios, labels, (0, 2), "times chance", "overlap in %, in brackets chance"
        )
        section.height = _matrix_height(names)
        section.alt = "Matrix of the tasks: the masks' overlap in times of chance. The table has the values."
    return section


def _cosine_section(inspection: "Inspection") -> Section:
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
        section.draw = partial(_draw_matrix, names, found, labels, (-limit, limit), "cosine", "task")
        section.height = _matrix_height(names)
        section.alt = "Matrix of the tasks: the cosine between every two deltas. The table has the values."
    return section


def _cosine_by_layer_section(pairs: "Sequence[TaskPair]") -> Section:
    names = [f"{pair.first} | {pair.second}" for pair in pairs]
    layers = sorted({layer for pair in pairs for layer in pair.cosine_by_layer})
    rows = []
    for name, pair in zip(names, pairs, strict=True):
        ranked = sorted((cosine, layer) for layer, cosine in pair.cosine_by_layer.items())
        ends = [f"{_signed(cosine)} (layer {_layer(layer)})" for cosine, layer in (ranked[0], ranked[-1])]
        rows.append([name, *ends])
    grid = [[pair.cosine_by_layer.get(layer, math.nan) for layer in layers] for pair in pairs]
    numbers = [[_layer(layer), *(_signed(row[i]) for row in grid)] for i, layer in enumerate(layers)]
    return Section(
        "cosine_by_layer",
        "Cosine of deltas by layer",
        "The same within each layer, over its projections.",
        Grid(["tasks", "lowest", "highest"], rows),
        numbers=Grid(["layer", *names], numbers),
        draw=partial(_draw_cosine_by_layer, pairs, layers, grid),
        height=0.9 + 0.4 * len(names),
        alt="Heat map of the cosine between the deltas of every two tasks, by layer.",
    )


def _projections_section(inspection: "Inspection") -> Section:
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


def _density_section(tasks: "Sequence[TaskStatistics]") -> Section:
    maps = [
        (f"{task.name}, {_percent(task.density)}", {place: cell.density for place, cell in task.cells.items()})
        for task in tasks
        if 0 < task.density < 1
    ]
    section = Section(
        "density",
        "Density by layer and projection",
        "Which % of B a task trains; without a mask, which % is not 0.",
        *_by_projection(tasks, _density_in_percent, "{:.3g}".format),
    )
    if maps:
        section.draw = partial(_draw_maps, maps, "% of the entries", 100, True)
        section.height = _maps_height(maps)
        section.numbers = _cell_grid(tasks, _density_in_percent, "{:.3g}".format)
        section.alt = "A heat map a task: which share of B's entries is trained, by layer and projection."
    return section


def _norms_section(tasks: "Sequence[TaskStatistics]") -> Section:
    maps = [
        (f"{task.name}, {task.norm:.4g} in all", {place: cell.norm for place, cell in task.cells.items()})
        for task in tasks
        if task.norm > 0
    ]
    section = Section(
        "norms",
        "Norms of the deltas by layer and projection",
        "Frobenius norms of s B A. They are not relative to the base model's weights, which are not read.",
        *_by_projection(tasks, lambda cell: cell.norm, "{:.3g}".format),
    )
    if maps:
        section.draw = partial(_draw_maps, maps, "norm", 1, False)
        section.height = _maps_height(maps)
        section.numbers = _cell_grid(tasks, lambda cell: cell.norm, "{:.3g}".format)
        section.alt = "A heat map a task: the Frobenius norm of the delta, by layer and projection."
    return section


def _magnitudes_section(tasks: "Sequence[TaskStatistics]") -> Section:
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
        section.draw = partial(_draw_magnitudes, drawn)
        section.height = 4.6 + 0.2 * len(drawn)
        section.numbers = Grid(
            ["magnitude from", *(task.name for task in drawn)],
            [
                [f"{10 ** drawn[0].magnitudes.edge(i):.2g}"]
                + [_percent(int(task.magnitudes.counts[i]) / task.magnitudes.numel) for task in drawn]
                for i in bins
            ],
        )
        section.alt = (
            "Above, a histogram of the magnitudes of a task's entries on a logarithmic scale; below, which share of "
            "the squared norm the largest entries hold."
        )
    return section


def _by_projection(
    tasks: "Sequence[TaskStatistics]", value: "Callable[[Cell], float]", text: Callable[[float], str]
) -> tuple[Grid, list[str]]:
    """Condense cells to a row a task and a column a projection, and a line of bars over the layers."""
    names = _projection_names(task.cells for task in tasks)
    rows = []
    for task in tasks:
        totals = [task.total(projection=name) for name in names]
        rows.append([task.name, *(text(value(total)) if total.numel else "–" for total in totals)])
    sparks = [_spark([value(task.total(layer)) for layer in _layers(task.cells)]) for task in tasks]
    return Grid(["task", *(name.removesuffix("_proj") for name in names)], rows), sparks


def _cell_grid(
    tasks: "Sequence[TaskStatistics]", value: "Callable[[Cell], float]", text: Callable[[float], str]
) -> Grid:
    names = _projection_names(task.cells for task in tasks)
    rows = [
        [
            f"{task.name}, layer {_layer(layer)}",
            *(text(value(task.cells[layer, name])) if (layer, name) in task.cells else "–" for name in names),
        ]
        for task in tasks
        for layer in _layers(task.cells)
    ]
    return Grid(["task, layer", *(name.removesuffix("_proj") for name in names)], rows)


def _matrix(names: Sequence[str], texts: Mapping[tuple[str, str], str]) -> Grid:
    rows = [[row, *("" if row == column else texts.get((row, column), "–") for column in names)] for row in names]
    return Grid(["", *names], rows)


def _density_in_percent(cell: "Cell") -> float:
    return 100 * cell.density


def _projection_names(cells: "Iterable[Iterable[Place]]") -> list[str]:
    names = {name for mapping in cells for _, name in mapping}
    return [name for name in _USUAL_ORDER if name in names] + sorted(names - {*_USUAL_ORDER})


def _layers(cells: "Iterable[Place]") -> list[int]:
    return sorted({layer for layer, _ in cells})


def _percent(share: float) -> str:
    return f"{100 * share:.3g}\u00a0%"


def _signed(cosine: float, digits: int = 4) -> str:
    return "–" if math.isnan(cosine) else f"{round(cosine, digits) + 0.0:+.{digits}f}"  # + 0.0: no -0.0000


def _layer(layer: int) -> str:
    return "none" if layer < 0 else str(layer)


def _spark(values: Sequence[float]) -> str:
    """Draw values from 0 to their largest as bars, one each, in at most 40 characters."""
    width = -(-len(values) // 40) or 1
    values = [sum(part) / len(part) for part in (values[i : i + width] for i in range(0, len(values), width))]
    top = max(values, default=0) or 1
    return "".join(_BARS[min(int(len(_BARS) * value / top), len(_BARS) - 1)] for value in values)


# ---- pictures --------------------------------------------------------------------------------------------------


@contextmanager
def _canvas(ink: str = "black"):
    """Yield a function that makes figures, with small letters in one colour."""
    if not is_matplotlib_available():
        raise ImportError(
            "`matplotlib` is not installed, and pictures need it. It comes with the extra `plots`. Run `pip install "
            "lori-trl[plots]`, or leave out the options that draw."
        )
    import matplotlib
    from matplotlib.figure import Figure

    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = {part: ink for part in parts} | {
        "font.size": 9,
        "axes.titlesize": 9,
        "figure.titlesize": 11,
        "legend.frameon": False,
        "svg.hashsalt": "lori_trl",
        "image.interpolation": "none",
    }
    with matplotlib.rc_context(style):
        yield partial(Figure, layout="constrained")


def _height(sections: Sequence[Section]) -> float:
    return sum(section.height + 0.35 for section in sections)


def _png(columns: Sequence[Sequence[Section]]) -> bytes:
    height = max(map(_height, columns))
    with _canvas() as figure_of:
        figure = figure_of(figsize=(WIDTH * len(columns), height), dpi=160)
        for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
            heights = [section.height + 0.35 for section in column]
            heights += [height - sum(heights)] if height - sum(heights) > 0.01 else []
            panels = part.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
            for panel, section in zip(panels, column, strict=False):  # the last panel may be empty
                panel.suptitle(section.title, fontweight="bold")
                section.draw(panel)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _svg(section: Section) -> str:
    """Draw a section as an `<svg>` for a page: letters in the page's colour, ids that occur nowhere else."""
    with _canvas(_INK) as figure_of:
        figure = figure_of(figsize=(WIDTH, section.height))
        section.draw(figure)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{section.key}-", svg).replace(_INK, "currentColor")
    size = re.compile(r'<svg ([^>]*?)(?:width|height)="[\d.]+pt"')
    while size.match(svg):
        svg = size.sub(r"<svg \1", svg, count=1)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _maps_height(maps: "Sequence[tuple[str, Mapping[Place, float]]]") -> float:
    return 0.5 + sum(0.45 + 0.19 * len(_projection_names([cells])) for _, cells in maps)


def _draw_maps(
    maps: "Sequence[tuple[str, Mapping[Place, float]]]", label: str, factor: float, shared: bool, figure: Any
) -> None:
    """Draw heat maps below each other, layers to the right; with one scale for all, or each its own."""
    ratios = [max(len(_projection_names([cells])), 2) for _, cells in maps]
    panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=ratios)[:, 0]
    top = max((factor * value for _, cells in maps for value in cells.values()), default=1)
    for axes, (title, cells) in zip(panels, maps, strict=True):
        layers, names = _layers(cells), _projection_names([cells])
        grid = [[factor * cells.get((layer, name), math.nan) for layer in layers] for name in names]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=top if shared else None)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        _number_layers(axes, layers)
        axes.set_title(title, loc="left", parse_math=False)
        if not shared:
            figure.colorbar(image, ax=axes, label=label, aspect=10)
    panels[-1].set_xlabel("layer")
    if shared:
        figure.colorbar(image, ax=list(panels), label=label, aspect=12 * len(maps))


def _number_layers(axes: Any, layers: Sequence[int]) -> None:
    step = 1 + (len(layers) - 1) // 12
    axes.set_xticks(range(0, len(layers), step), [_layer(layer) for layer in layers[::step]])


def _matrix_height(names: Sequence[str]) -> float:
    return 1.3 + max(0.45 * len(names), 0.9)


def _draw_matrix(
    names: Sequence[str],
    values: Mapping[tuple[str, str], float],
    labels: Mapping[tuple[str, str], str],
    limits: tuple[float, float],
    scale: str,
    meaning: str,
    figure: Any,
) -> None:
    """Draw a matrix of tasks with its values written in; the middle of the scale is white."""
    axes = figure.subplots()
    grid = [[values.get((row, column), math.nan) for column in names] for row in names]
    image = axes.imshow(grid, aspect="auto", cmap=_around_the_middle(), vmin=limits[0], vmax=limits[1])
    numbered = [f"{_shortened(name)}  {i}" for i, name in enumerate(names, 1)]
    axes.set_yticks(range(len(names)), numbered, parse_math=False, fontsize=_name_size(names))
    axes.set_xticks(range(len(names)), range(1, len(names) + 1))
    axes.set_xlabel(meaning)
    middle, half = sum(limits) / 2, (limits[1] - limits[0]) / 2
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            if (row, column) in values:
                dark = abs(values[row, column] - middle) > 0.65 * half
                size = 8 if len(names) < 5 else 6 if len(names) < 9 else 4.5
                color = "white" if dark else "black"
                axes.text(j, i, labels[row, column], ha="center", va="center", fontsize=size, color=color)
    figure.colorbar(image, ax=axes, label=scale)


def _around_the_middle() -> Any:
    """Return a colour map for values on both sides of a middle: purple and orange, grey where nothing is defined."""
    import matplotlib

    return matplotlib.colormaps["PuOr_r"].with_extremes(bad="#80808040")


def _draw_cosine_by_layer(
    pairs: "Sequence[TaskPair]", layers: Sequence[int], grid: Sequence[Sequence[float]], figure: Any
) -> None:
    axes = figure.subplots()
    limit = max([0.01, *(abs(value) for row in grid for value in row if not math.isnan(value))])
    image = axes.imshow(grid, aspect="auto", cmap=_around_the_middle(), vmin=-limit, vmax=limit)
    names = [f"{_shortened(pair.first)}\n{_shortened(pair.second)}" for pair in pairs]
    size = _name_size([name for pair in pairs for name in (pair.first, pair.second)])
    axes.set_yticks(range(len(pairs)), names, parse_math=False, fontsize=size)
    _number_layers(axes, layers)
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="cosine", aspect=10, ticks=[-limit, 0, limit], format="%+.2g")


def _draw_magnitudes(tasks: "Sequence[TaskStatistics]", figure: Any) -> None:
    above, below = figure.subplots(2, 1)
    for i, task in enumerate(tasks):
        magnitudes = task.magnitudes
        look = {"color": _LINES[i % len(_LINES)], "linestyle": _STYLES[i % len(_STYLES)]}
        heights = [100 * count / magnitudes.numel for count in magnitudes.counts[magnitudes.span].tolist()]
        above.stairs(heights, [10**edge for edge in magnitudes.edges], label=_shortened(task.name, 40), **look)
        entries, squares = ([100 * share for share in part] for part in magnitudes.shares())
        below.plot(entries, squares, **look)
    # Where nearly all entries are: a few that training hardly moved would stretch the picture over many decades.
    above.set_xscale("log")
    above.set_xlim(*(10**edge for edge in _main_part(tasks)))
    above.set_xlabel("magnitude of an entry of B")
    above.set_ylabel("% of the entries")
    below.plot([0, 100], [0, 100], color="gray", linewidth=0.8, linestyle=":")
    below.set_xlabel("largest entries, %")
    below.set_ylabel("% of the squared norm")
    figure.legend(loc="outside lower left")


def _main_part(tasks: "Sequence[TaskStatistics]") -> tuple[float, float]:
    """Return between which powers of ten all but a thousandth of every task's entries lie."""
    ends = []
    for task in tasks:
        counts = task.magnitudes.counts
        smaller = counts.cumsum(0) / counts.sum()
        ends.append((int((smaller < 0.001).sum()), task.magnitudes.span.stop))
    return tasks[0].magnitudes.edge(min(low for low, _ in ends)), tasks[0].magnitudes.edge(
        max(high for _, high in ends)
    )


def _name_size(names: Sequence[str]) -> int:
    return 9 if max(map(len, names)) <= 14 else 7


def _shortened(name: str, length: int = 26) -> str:
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"
