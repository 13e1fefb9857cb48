"""What an inspection measures: adapters, their tasks, and every two of them beside each other."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FORMAT_VERSION = 1

Place = tuple[int, str]  # layer, projection; as in the paper's Figure 6

_DECADES, _BINS_A_DECADE = (-12, 4), 20  # of |B|; smaller and larger entries count in the outermost bins


@dataclass
class AdapterStatistics:
    """What is told of one adapter."""

    name: str  # of its folder or repository
    base_model: str | None  # the base model's name, without the way to a local folder
    modules: int  # matrices that the adapter changes
    ranks: list[int]  # every rank that occurs
    scalings: list[float]  # every scaling s that occurs, `alpha / rank` or `alpha / sqrt(rank)`
    tasks: list[str]  # names of its tasks, oldest first
    numel_B: int  # entries of B
    outside: int = 0  # entries of B that are not zero and on no task's mask; 0 where an adapter has no masks


@dataclass
class Cell:
    """One layer's part of a task in one kind of projection."""

    selected: int = 0  # entries on the task's mask; without one, entries that are not 0
    numel: int = 0  # all entries of B
    squared_norm: float = 0.0  # of the delta, Frobenius

    @property
    def density(self) -> float:
        """`selected / numel`, a fraction in [0, 1]."""
        return self.selected / max(self.numel, 1)

    @property
    def norm(self) -> float:
        """The Frobenius norm of the delta."""
        return math.sqrt(max(self.squared_norm, 0.0))  # rounding can leave a zero's square below 0


def total_cell(cells: Mapping[Place, Cell], layer: int | None = None, projection: str | None = None) -> Cell:
    total = Cell()
    for place, cell in cells.items():
        if layer in (None, place[0]) and projection in (None, place[1]):
            total.selected += cell.selected
            total.numel += cell.numel
            total.squared_norm += cell.squared_norm
    return total


class Magnitudes:
    """
    How large entries are: a histogram of log10 |B|, twenty bins a decade, with the squares that every bin holds.

    Attributes:
        counts (`Tensor`): entries in every bin, int64.
        squares (`Tensor`): the sum of their squares, float64.
        zeros (`int`): entries that are 0.
    """

    def __init__(self):
        bins = (_DECADES[1] - _DECADES[0]) * _BINS_A_DECADE
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.squares = torch.zeros(bins, dtype=torch.float64)
        self.zeros = 0

    def add(self, entries: Tensor) -> None:
        """Count entries, any shape, float64."""
        entries = entries[entries != 0].abs()
        bins = ((entries.log10() - _DECADES[0]) * _BINS_A_DECADE).floor().long().clamp_(0, len(self.counts) - 1)
        self.counts += torch.bincount(bins, minlength=len(self.counts))
        self.squares += torch.bincount(bins, weights=entries.square(), minlength=len(self.counts))

    @property
    def numel(self) -> int:
        """All entries that were counted."""
        return int(self.counts.sum()) + self.zeros

    @property
    def span(self) -> slice:
        """The bins from the first to the last that holds an entry."""
        filled = self.counts.nonzero().flatten().tolist()
        return slice(filled[0], filled[-1] + 1) if filled else slice(0, 0)

    @property
    def edges(self) -> list[float]:
        """The edges of `span`'s bins as log10 |B|, one more than there are bins."""
        return [self.edge(i) for i in range(self.span.start, self.span.stop + 1)]

    @staticmethod
    def edge(i: int) -> float:
        """Return the lower edge of a bin as log10 |B|."""
        return _DECADES[0] + i / _BINS_A_DECADE

    def shares(self) -> tuple[list[float], list[float]]:
        """Return the cumulative curve, from the largest entries down: shares of the entries, of the squared norm."""
        span = self.span
        entries = self.counts[span].flip(0).cumsum(0) / max(self.numel, 1)
        squares = self.squares[span].flip(0).cumsum(0) / self.squares.sum().clamp(min=1e-300)
        return [0.0, *entries.tolist()], [0.0, *squares.tolist()]

    def top(self, share: float) -> float:
        """Return how much of the squared norm the largest entries hold. Inside a bin it is shared out evenly."""
        entries, squares = self.shares()
        for i in range(1, len(entries)):
            if entries[i] >= share:
                part = (share - entries[i - 1]) / (entries[i] - entries[i - 1])
                return squares[i - 1] + part * (squares[i] - squares[i - 1])
        return squares[-1]


@dataclass
class TaskStatistics:
    """What is told of one task: the delta s B A, with B reduced to the entries that belong to the task."""

    name: str  # the task; with its adapter's name before it where two adapters have a task of that name
    adapter: str  # its adapter
    masked: bool  # whether it has a mask. Without one, all of B belongs to it and `density` counts what is not 0
    selected: int  # entries on its mask
    owned: int  # entries that belong to it: where masks overlap, an entry belongs to the newest task
    density: float  # `selected` over all entries of B, a fraction in [0, 1]
    norm: float  # Frobenius norm of the delta, over all matrices
    cells: dict[Place, Cell]  # the parts, by layer and projection; a [`Cell`] each
    magnitudes: Magnitudes  # of the owned entries

    def total(self, layer: int | None = None, projection: str | None = None) -> Cell:
        """Put the cells of a layer, of a kind of projection, or all together."""
        return total_cell(self.cells, layer, projection)


@dataclass
class Overlap:
    """How far the first task's mask lies on the second's, and the other way round: fractions of the own entries."""

    shares: tuple[float, float]  # of the first's entries those on the second mask; of the second's on the first
    chance: tuple[float, float]  # the same for a mask that lies at random: the density of the other mask
    # the same where each matrix keeps its density: what is above it is not due to both tasks favouring the same
    # matrices
    chance_by_matrix: tuple[float, float]


@dataclass
class TaskPair:
    """Two tasks beside each other."""

    first: str  # the tasks' names
    second: str  # the tasks' names
    # whether both have the same A, bit for bit, wherever both change a matrix. If not, a mask's columns count other
    # directions, and an overlap says nothing about interference
    same_A: bool
    overlap: Overlap | None = None  # of the masks; `None` where it is not defined
    cosine: float | None = None  # of the deltas over all matrices; `None` where it is not defined
    # the same in every layer in which both have a delta
    cosine_by_layer: dict[int, float] = field(default_factory=dict)
    undefined: list[str] = field(default_factory=list)  # why something is not defined


@dataclass
class ProjectionPair:
    """The A of two adapters: |cosine| between rows of the one and rows of the other, over all matrices they share."""

    first: str  # the adapters' names
    second: str  # the adapters' names
    same: bool  # whether they are the same bit for bit
    mean: float  # mean |cosine|
    chance: float  # what independent random rows have: sqrt(2 / (pi in_features))
    max: float  # the largest |cosine|; 1 for a row that both have


@dataclass
class Inspection:
    """What [`inspect_adapters`] found."""

    adapters: list[AdapterStatistics]  # in the order given
    tasks: list[TaskStatistics]  # of all adapters, each adapter's oldest first
    pairs: list[TaskPair]  # every two tasks
    projections: list[ProjectionPair]  # every two adapters that can be compared
    notes: list[str]  # what a reader of the numbers must know

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with a `format_version`. What is not defined is `None`."""

        def cells(task: TaskStatistics) -> list[dict[str, Any]]:
            return [
                {"layer": layer, "projection": name, "selected": cell.selected, "numel": cell.numel}
                | {"density": cell.density, "norm": cell.norm}
                for (layer, name), cell in task.cells.items()
            ]

        def magnitudes(found: Magnitudes) -> dict[str, Any]:
            return {
                "log10_edges": found.edges,
                "counts": found.counts[found.span].tolist(),
                "squares": found.squares[found.span].tolist(),
                "zeros": found.zeros,
            }

        tasks = [vars(task) | {"cells": cells(task), "magnitudes": magnitudes(task.magnitudes)} for task in self.tasks]
        pairs = [
            vars(pair)
            | {
                "overlap": None if pair.overlap is None else {name: list(v) for name, v in vars(pair.overlap).items()},
                "cosine_by_layer": [{"layer": layer, "cosine": c} for layer, c in pair.cosine_by_layer.items()],
            }
            for pair in self.pairs
        ]
        return {
            "format_version": FORMAT_VERSION,
            "adapters": [dict(vars(adapter)) for adapter in self.adapters],
            "tasks": tasks,
            "pairs": pairs,
            "projections": [dict(vars(pair)) for pair in self.projections],
            "notes": list(self.notes),
        }
