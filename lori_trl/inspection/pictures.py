"""Drawings of an inspection: matrices of tasks, cosines by layer, entries by magnitude."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapter.heatmaps import number_layers
from .statistics import TaskPair, TaskStatistics

_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D1F", "#56B4E9")  # Okabe and Ito's, for all eyes
_STYLES = ("-", "--", ":", "-.")


def matrix_height(names: Sequence[str]) -> float:
    """Return the height of a matrix of tasks, in inches."""
    return 1.3 + max(0.45 * len(names), 0.9)


def draw_matrix(
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


def draw_cosine_by_layer(
    pairs: Sequence[TaskPair], layers: Sequence[int], grid: Sequence[Sequence[float]], figure: Any
) -> None:
    """Draw a row for each pair, a column for each layer."""
    axes = figure.subplots()
    limit = max([0.01, *(abs(value) for row in grid for value in row if not math.isnan(value))])
    image = axes.imshow(grid, aspect="auto", cmap=_around_the_middle(), vmin=-limit, vmax=limit)
    names = [f"{_shortened(pair.first)}\n{_shortened(pair.second)}" for pair in pairs]
    size = _name_size([name for pair in pairs for name in (pair.first, pair.second)])
    axes.set_yticks(range(len(pairs)), names, parse_math=False, fontsize=size)
    number_layers(axes, layers)
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="cosine", aspect=10, ticks=[-limit, 0, limit], format="%+.2g")


def draw_magnitudes(tasks: Sequence[TaskStatistics], figure: Any) -> None:
    """Draw, above, a histogram of the entries' magnitudes; below, what share of the squared norm the largest hold."""
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


def _main_part(tasks: Sequence[TaskStatistics]) -> tuple[float, float]:
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
