"""From cells to numbers with standard errors, and from these to verdicts."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cells import SEEDS, Cell
from .store import Store

MARGIN = 0.02  # nats a token: losses that lie closer are as good as the same

SeededCell = Callable[[int], Cell]  # seed -> cell
BySeed = Callable[[int], float | None]  # seed -> a figure, None where it is not measured


@dataclass(frozen=True)
class Estimate:
    """
    A mean over seeds.

    Args:
        mean (`float`): the mean; NaN where nothing is measured.
        stderr (`float`): its standard error over seeds; NaN for fewer than two.
        seeds (`int`): how many seeds it is the mean of.
    """

    mean: float
    stderr: float
    seeds: int

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """Write the estimate, and over how many seeds where these are not all."""
        if self.seeds == 0:
            return "–"
        number = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        if self.seeds > 1:
            number += f" ± {self.stderr:.{digits}f}"
        return number if self.seeds == len(SEEDS) else f"{number} ({self.seeds} of {len(SEEDS)} seeds)"


def estimate(values: list[float]) -> Estimate:
    """Return the mean of one value a seed."""
    if not values:
        return Estimate(float("nan"), float("nan"), 0)
    stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(statistics.fmean(values), stderr, len(values))


def is_no_worse(difference: Estimate) -> str:
    """
    Judge the claim that a loss is not higher, from its paired difference.

    One standard error is allowed, and two of them must not reach beyond `MARGIN`: noise alone proves nothing.
    """
    upper = difference.mean + 2 * difference.stderr
    return _verdict(difference, difference.mean <= difference.stderr and upper <= MARGIN)


def is_lower(difference: Estimate) -> str:
    """Judge the claim that something is lower, from its paired difference: by more than two standard errors."""
    return _verdict(difference, difference.mean < -2 * difference.stderr)


def _verdict(difference: Estimate, holds: bool) -> str:
    if difference.seeds < len(SEEDS):
        return f"not measured yet ({difference.seeds} of {len(SEEDS)} seeds)"
    if holds:
        return "**holds here**"
    return "**does not hold here**" if difference.mean > 2 * difference.stderr else "**can't be told at this size**"


class Evidence:
    """
    What the results say of cells over all seeds.

    Args:
        store ([`Store`]): the results.
    """

    def __init__(self, store: Store):
        self.store = store

    def value(self, cell: Cell, *path: str) -> float | None:
        """Return a figure of a cell, `loss` by default; `None` where it is not measured."""
        if cell not in self.store:
            return None
        figure = self.store.figures(cell)
        for name in path or ("loss",):
            figure = figure[name]
        return figure

    def mean(self, cell: SeededCell, *path: str) -> Estimate:
        """Return a figure's mean over the seeds that are measured."""
        return pooled([lambda seed: self.value(cell(seed), *path)])

    def paired(self, cell: SeededCell, other: SeededCell) -> BySeed:
        """Return how much higher a cell's loss is than that of another of the same seed, and so of the same rows."""
        return minus(lambda seed: self.value(cell(seed)), lambda seed: self.value(other(seed)))

    def difference(self, cell: SeededCell, other: SeededCell) -> Estimate:
        """Return the mean of the paired differences."""
        return pooled([self.paired(cell, other)])


def minus(figure: BySeed, other: BySeed) -> BySeed:
    """Return the difference of two figures of the same seed."""

    def difference(seed: int) -> float | None:
        pair = figure(seed), other(seed)
        return None if None in pair else pair[0] - pair[1]

    return difference


def pooled(figures: Sequence[BySeed]) -> Estimate:
    """Return the mean over figures of the same kind, say of all tasks; a seed counts where all are measured."""
    by_seed = [[figure(seed) for figure in figures] for seed in SEEDS]
    return estimate([statistics.fmean(values) for values in by_seed if None not in values])
