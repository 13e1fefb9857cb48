"""What is chosen on dev rows: learning rates, per method and task, and weights of merges."""

from collections.abc import Callable
from dataclasses import replace

from .cells import CHEAP, STEPS, UNTUNED, Cell, Mask, Merge, Train
from .store import Store

RATES = (1.5e-5, 5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2, 0.15, 0.5)
WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
FIRST_RATES, FIRST_WEIGHTS = (3, 6), (2, 5)  # every search begins with these: positions, the end excluded
# LoRI-S with other masks than the paper's, where these are compared with the other methods.
OTHER_MASKS = {"cheap": Mask("agreement", CHEAP), "short": Mask("train", 8)}


class Tuning:
    """
    The searches on seed 0: from the same three values for every method, on to one side while the best is at the edge.

    Args:
        store ([`Store`]): the results so far.
    """

    def __init__(self, store: Store):
        self.store = store

    def cells(self, method: str, task: str) -> list[Cell]:
        """Return the cells of a method's search on a task, as far as it has come."""
        return self._search_rate(method, task)[0]

    def rate(self, method: str, task: str) -> float:
        """Return a method's learning rate for a task, `UNTUNED` while it is not chosen."""
        return self._search_rate(method, task)[1]

    def train(self, method: str, task: str, seed: int, **fields) -> Train:
        """Return the cell of a method on a task, at its own learning rate."""
        if method in OTHER_MASKS:
            return self.masked(OTHER_MASKS[method], task, seed, **fields)
        return self._train(method, task, seed, self.rate(method, task), **fields)

    def masked(self, mask: Mask, task: str, seed: int, **fields) -> Train:
        """Return the cell of LoRI-S with another mask, at the rate chosen for LoRI-S's own."""
        if mask.method == "train":  # a dense run has a rate
            mask = replace(mask, rate=self.rate("LoRI-D", task))
        return Train("LoRI", task, seed, self.rate("LoRI-S", task), mask, **fields)

    def merges(self, adapters: tuple[Train, ...], how: str) -> tuple[list[Merge], float]:
        """Return the merges of adapters at the weights of the search so far, and the weight with the lowest loss."""
        return self._search(lambda weight: Merge(adapters, how, weight, "dev"), WEIGHTS, FIRST_WEIGHTS)

    def _search_rate(self, method: str, task: str) -> tuple[list[Cell], float]:
        searched = "LoRI-S" if method in OTHER_MASKS else method
        return self._search(lambda rate: self._train(searched, task, 0, rate), RATES, FIRST_RATES)

    def _train(self, method: str, task: str, seed: int, rate: float, **fields) -> Train:
        if method == "LoRA":
            return Train("LoRA", task, seed, rate, **fields)
        if method == "LoRI-D":
            return Train("LoRI", task, seed, rate, **fields)
        if method == "random":
            return Train("LoRI", task, seed, rate, Mask("random", granularity="matrix"), **fields)
        sparsity = 0.9 if method == "LoRI-S" else float(method.removeprefix("s="))
        mask = Mask("train", STEPS, self.rate("LoRI-D", task), sparsity)  # the paper's: that of a whole dense run
        return Train("LoRI", task, seed, rate, mask, **fields)

    def _search(
        self, make: Callable[[float], Cell], ladder: tuple[float, ...], window: tuple[int, int]
    ) -> tuple[list[Cell], float]:
        start, end = window
        while True:
            cells = [make(value) for value in ladder[start:end]]
            if not all(cell in self.store for cell in cells):
                return cells, UNTUNED
            losses = [_dev_loss(self.store.figures(cell)) for cell in cells]
            best = start + losses.index(min(losses))
            if start < best < end - 1 or best in (0, len(ladder) - 1):
                return cells, ladder[best]
            start, end = (start - 1, end) if best == start else (start, end + 1)


def _dev_loss(figures: dict) -> float:
    """Return a cell's loss on dev rows, the mean over its tasks."""
    losses = [figures["dev_loss"]] if "dev_loss" in figures else [task["dev_loss"] for task in figures.values()]
    return sum(losses) / len(losses)
