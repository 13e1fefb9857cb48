"""What is measured, and in which order: the cells and the plan."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..claims.cells import Cell

PROTOCOL = 5  # to be raised when rows, lengths or anything else that all cells share is changed
SEEDS = (0, 1, 2, 3, 4)
RANK, STEPS, BATCH, MAX_LENGTH = 32, 30, 2, 160
POINTS = (8, 15, 30)  # steps after which all losses are measured; before the first, they are the first adapter's
TEST_ROWS = {"gsm8k": 40, "safety": 60, "text": 16}
PROTECTED_ROWS = 40
REPLAY = 0.08  # of the rows are the first task's
FIRST_RATE = 9e-4  # of the first task's LoRA, which all arms of a seed have in common

DENSE = {"LoRI-S": "LoRI-D", "contrastive S": "contrastive D"}  # a sparse arm's mask comes from this arm's run
# Each arm's rate: those that the first study tuned for GSM8K; the contrastive arms have those of random A.
RATES = {"LoRI-D": 5e-4, "LoRA": 5e-4, "contrastive D": 5e-4, "LoRI-S": 5e-3, "contrastive S": 5e-3, "replay": 5e-4}
ARMS = tuple(RATES)
FACTOR = 1.8  # between neighbouring rates


class Study(Cell):
    """A cell of this study."""

    @property
    def settings(self) -> dict:
        return super().settings | {"protocol": PROTOCOL}


@dataclass(frozen=True)
class First(Study):
    """The first task: plain LoRA on safety, merged into the base. All arms of a seed begin there."""

    seed: int


@dataclass(frozen=True)
class Second(Study):
    """
    GSM8K, by a fresh adapter on the first task's model.

    Args:
        arm (`str`): one of `ARMS`; `"replay"` is LoRA with rows of the first task among its own.
        seed (`int`): draws rows, their order and random A.
        rate (`int`): which rate: 0 is the arm's, -1 and 1 its neighbours.
    """

    arm: str
    seed: int
    rate: int = 0

    @property
    def learning_rate(self) -> float:
        return float(f"{RATES[self.arm] * FACTOR**self.rate:.2g}")

    @property
    def needs(self) -> tuple[Cell, ...]:
        first = (First(self.seed),)
        return (*first, self.dense) if self.arm in DENSE else first

    @property
    def dense(self) -> "Second":
        """The run that a sparse arm's mask is taken from."""
        return Second(DENSE[self.arm], self.seed)


def plan() -> list[Cell]:
    """Return all cells in the order in which they are run, with what they need before them."""
    cells: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        for need in cell.needs:
            add(need)
        cells.setdefault(cell.key, cell)

    for cell in _planned():
        add(cell)
    return list(cells.values())


def _planned() -> Iterator[Cell]:
    """What decides first: every seed at the arms' own rates; then replay, then the neighbouring rates."""
    compared = [arm for arm in ARMS if arm != "replay"]
    for seed in SEEDS:
        yield from (Second(arm, seed) for arm in compared)
    yield from (Second("replay", seed) for seed in SEEDS)
    for rate in (-1, 1):
        for seed in SEEDS:
            yield from (Second(arm, seed, rate) for arm in ARMS)
