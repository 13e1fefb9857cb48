"""From cells to means with intervals, and from these to verdicts."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cells import SEEDS, Cell
from .store import Store

MARGIN = 0.02  # nats a token: losses that lie closer are as good as the same
LEVEL = 0.05  # how often verdicts of a page without any effect may name one

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
        planned (`int`): how many it shall be the mean of.
    """

    mean: float
    stderr: float
    seeds: int
    planned: int = len(SEEDS)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval: Student's t over the seeds."""
        return t_quantile(self.seeds - 1) * self.stderr

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """Write the estimate with its interval, and over how many seeds where these are not all."""
        if self.seeds == 0:
            return "–"
        number = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        if self.seeds > 1:
            number += f" ± {self.half_width:.{digits}f}"
        return number if self.seeds == self.planned else f"{number} ({self.seeds} of {self.planned} seeds)"

    def p(self, null: float) -> float:
        """Return the two-sided p of a mean of `null`."""
        if self.stderr == 0:
            return 1.0 if self.mean == null else 0.0
        return t_tails((self.mean - null) / self.stderr, self.seeds - 1)


def estimate(values: list[float], planned: int = len(SEEDS)) -> Estimate:
    """Return the mean of one value a seed."""
    if not values:
        return Estimate(float("nan"), float("nan"), 0, planned)
    stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(statistics.fmean(values), stderr, len(values), planned)


def t_tails(t: float, freedom: int) -> float:
    """
    Return the probability of Student's t beyond `t` on both sides.

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    if freedom % 2:
        for power in range(1, freedom - 1, 2):
            term = math.cos(angle) if power == 1 else term * cosine**2 * (power - 1) / power
            total += term
        return max(0.0, 1 - 2 / math.pi * (angle + math.sin(angle) * total))
    for power in range(0, freedom - 1, 2):
        term = 1.0 if power == 0 else term * cosine**2 * (power - 1) / power
        total += term
    return max(0.0, 1 - math.sin(angle) * total)


def t_quantile(freedom: int) -> float:
    """Return the t that 95 % lie within."""
    low, high = 0.0, 1e3
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if t_tails(middle, freedom) > 0.05 else (low, middle)
    return low


@dataclass(frozen=True)
class Claim:
    """
    A claim about a paired difference of losses: that it lies below `null`.

    Args:
        text (`str`): in words.
        difference ([`Estimate`]): the difference.
        null (`float`): 0 where something is claimed to be lower, [`MARGIN`] where it is claimed to be as good.
    """

    text: str
    difference: Estimate
    null: float = 0.0


def verdicts(claims: Sequence[Claim]) -> list[tuple[str, float]]:
    """
    Judge the claims of a page together: each with its p, adjusted for all of them (Holm).

    Returns:
        `list[tuple[str, float]]`: the verdict and the adjusted p of every claim, NaN where it is not measured.
    """
    complete = [claim.difference.seeds == claim.difference.planned for claim in claims]
    ps = {number: claims[number].difference.p(claims[number].null) for number, done in enumerate(complete) if done}
    adjusted, largest = {}, 0.0
    for place, number in enumerate(sorted(ps, key=lambda number: ps[number])):
        largest = adjusted[number] = max(largest, min(1.0, (len(ps) - place) * ps[number]))
    return [
        (_verdict(claim, adjusted[number]), adjusted[number])
        if number in adjusted
        else (f"not measured yet ({claim.difference.seeds} of {claim.difference.planned} seeds)", math.nan)
        for number, claim in enumerate(claims)
    ]


def _verdict(claim: Claim, p: float) -> str:
    if p >= LEVEL:
        return "can't be told"
    return "**holds here**" if claim.difference.mean < claim.null else "**does not hold here**"


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


def pooled(figures: Sequence[BySeed], seeds: Sequence[int] = SEEDS) -> Estimate:
    """Return the mean over figures of the same kind, say of all tasks; a seed counts where all are measured."""
    by_seed = [[figure(seed) for figure in figures] for seed in seeds]
    return estimate([statistics.fmean(values) for values in by_seed if None not in values], len(seeds))
