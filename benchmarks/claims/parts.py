"""The parts of the study, in the order in which they are begun: which cells each of them needs."""

from collections.abc import Callable, Iterator

from .cells import CHEAP, SEEDS, STEPS, TASKS, Base, Cell, Held, Mask, Merge, Overlaps, Refusals, Rounded, Train
from .tuning import OTHER_MASKS, Tuning

# Masks other than the whole dense run's: those that decide, and those that draw the curve.
CHEAP_MASKS = (OTHER_MASKS["cheap"], Mask("train", CHEAP))
CURVE = (Mask("agreement", 8), Mask("train", 8), Mask("agreement", 15), Mask("train", 15))
CURVE_TASKS = ("gsm8k", "safety")
OTHERS = (Mask("random"), Mask("adam", CHEAP), Mask("gradient", CHEAP), Mask("fisher", CHEAP))  # on one task
MERGED = ("safety", "gsm8k")
COMPARED = ("LoRA", "LoRI-D", "LoRI-S", "random", "cheap")
COMPARED_IN_PAIRS = (*COMPARED, "short")
SEQUENCE = ("safety", "gsm8k")
SPARSITIES, SPARSITY_TASK = (0.5, 0.95, 0.99), "gsm8k"
POOLED_TASKS = ("safety",)
ROUNDED_TASKS, DTYPES = ("safety", "gsm8k"), ("", "bfloat16", "int8")
GRANULARITIES = ("module", "projection", "layer", "matrix")


def masks(tuning: Tuning) -> Iterator[Cell]:
    """What a cheap mask costs against none at all and against the whole dense run's, on all tasks."""
    for task in TASKS:
        yield Base(task)
        for method in ("LoRI-D", "LoRI-S", "random"):
            yield from tuning.cells(method, task)
        for seed in SEEDS:
            yield from (tuning.train(method, task, seed) for method in ("LoRI-D", "LoRI-S", "random"))
            yield from curve(tuning, task, CHEAP_MASKS, (seed,))
            yield Overlaps(task, seed, tuning.rate("LoRI-D", task), CHEAP)


def length(tuning: Tuning) -> Iterator[Cell]:
    """From there to the whole run, on two tasks."""
    for task in CURVE_TASKS:
        yield from curve(tuning, task, CURVE)
        yield from (Overlaps(task, seed, tuning.rate("LoRI-D", task), STEPS) for seed in SEEDS)


def saliencies(tuning: Tuning) -> Iterator[Cell]:
    """What else can be made of a few gradients."""
    yield from curve(tuning, CURVE_TASKS[0], OTHERS)


def curve(tuning: Tuning, task: str, masks: tuple[Mask, ...], seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    """LoRI-S with other masks."""
    for mask in masks:
        yield from (tuning.masked(mask, task, seed) for seed in seeds)


def merging(tuning: Tuning) -> Iterator[Cell]:
    """Two tasks in one adapter."""
    for how in ("concat", "linear"):
        for method in COMPARED_IN_PAIRS:
            yield from merges(tuning, method, MERGED, how)
    # LoRI's own explanation is that A are independent.
    yield from merges(tuning, "random", MERGED, "concat", shared_A=True)


def merges(tuning: Tuning, method: str, tasks: tuple[str, ...], how: str, **fields) -> Iterator[Cell]:
    """One method's single adapters and their merges; the weight is searched on seed 0."""
    for task in tasks:
        yield from tuning.cells(method, task)
    by_seed = [single_adapters(tuning, method, tasks, seed, **fields) for seed in SEEDS]
    searched, weight = tuning.merges(by_seed[0], how)
    yield from by_seed[0]
    yield from searched
    for adapters in by_seed:
        yield from adapters
        yield Merge(adapters, how, weight)


def single_adapters(tuning: Tuning, method: str, tasks: tuple[str, ...], seed: int, **fields) -> tuple[Train, ...]:
    return tuple(tuning.train(method, task, seed, **fields) for task in tasks)


def sequences(tuning: Tuning) -> Iterator[Cell]:
    """One adapter, two tasks one after the other: what is left of the first."""
    yield Refusals()
    for method in COMPARED:
        for seed in SEEDS:
            first, second = sequence(tuning, method, seed)
            yield from (first, Refusals(first), second, Held(second, SEQUENCE[:1]), Refusals(second))


def sequence(tuning: Tuning, method: str, seed: int) -> list[Train]:
    """One adapter's cells, task after task."""
    first = tuning.train(method, SEQUENCE[0], seed)
    return [first, tuning.train(method, SEQUENCE[1], seed, start=first)]


def single(tuning: Tuning) -> Iterator[Cell]:
    """LoRI-D against LoRA."""
    for task in TASKS:
        for method in ("LoRA", "LoRI-D", "LoRI-S"):
            yield from tuning.cells(method, task)
            yield from (tuning.train(method, task, seed) for seed in SEEDS)


def sparsity(tuning: Tuning) -> Iterator[Cell]:
    """How far up sparsity goes, on one task."""
    for sparsity in SPARSITIES:
        yield from tuning.cells(f"s={sparsity}", SPARSITY_TASK)
        yield from (tuning.train(f"s={sparsity}", SPARSITY_TASK, seed) for seed in SEEDS)


def granularity(tuning: Tuning) -> Iterator[Cell]:
    """Over what the entries of B compete."""
    for task in POOLED_TASKS:
        for name in GRANULARITIES:
            mask = Mask("train", STEPS, granularity=name)
            yield from (tuning.masked(mask, task, seed) for seed in SEEDS)


def rounding(tuning: Tuning) -> Iterator[Cell]:
    """What the compact form costs when the trained entries are rounded."""
    for task in ROUNDED_TASKS:
        yield from (Rounded(tuning.train("LoRI-S", task, seed), dtype) for seed in SEEDS for dtype in DTYPES)


PARTS: dict[str, Callable[[Tuning], Iterator[Cell]]] = {
    "masks": masks, "single": single, "length": length, "merging": merging, "sequences": sequences,
    "rounding": rounding, "sparsity": sparsity, "saliencies": saliencies, "granularity": granularity,
}  # fmt: skip


def plan(tuning: Tuning, only: tuple[str, ...] = ()) -> list[Cell]:
    """Return the cells of some parts, or of all, in order and with what they need before them."""
    cells: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        for need in cell.needs:
            add(need)
        cells.setdefault(cell.key, cell)

    for name in only or PARTS:
        for cell in PARTS[name](tuning):
            add(cell)
    return list(cells.values())
