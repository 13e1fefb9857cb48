"""What is measured: one frozen dataclass a kind of cell. A cell's settings are its name in the results."""

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

TASKS = ("gsm8k", "safety", "code")
SEEDS = (0, 1, 2)
RANK, STEPS, BATCH = 32, 30, 2
MAX_LENGTH = 160  # tokens; longer rows are left out
DEV_ROWS, TEST_ROWS = 16, 32
PROTOCOL = 3  # to be raised when rows, lengths or anything else that all cells share is changed
UNTUNED = -1.0  # in place of a learning rate or weight that is not chosen yet
CHEAP = 3  # batches: a tenth of a run
SNAPSHOTS = (CHEAP, 8, 15, 30)  # steps, or batches, after which a mask is taken
SALIENCIES = ("agreement", "adam", "gradient", "fisher")  # of gradients at B0


@dataclass(frozen=True)
class Mask:
    """
    Where a mask comes from.

    Args:
        method (`str`):
            `"train"`: |B - B0| after some steps of a dense run; `"random"`; or one of `SALIENCIES`, from gradients
            at B0.
        batches (`int`): how many steps or batches were looked at.
        rate (`float`, *optional*): the dense run's learning rate.
        sparsity (`float`), granularity (`str`): as in `LoriMasks.select`.
    """

    method: str
    batches: int = 0
    rate: float | None = None
    sparsity: float = 0.9
    granularity: str = "model"


@dataclass(frozen=True)
class Cell:
    """What all cells share: a key made of their settings."""

    @property
    def settings(self) -> dict:
        """The settings as JSON has them, the kind of cell first."""
        return json.loads(json.dumps({"protocol": PROTOCOL} | _settings(self)))

    @property
    def key(self) -> str:
        """16 hexadecimal digits that stand for the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def settled(self) -> bool:
        """Whether everything that is chosen on dev rows is chosen."""
        return f": {UNTUNED}" not in json.dumps(self.settings)

    @property
    def needs(self) -> tuple["Cell", ...]:
        """The cells whose files this one reads."""
        return ()


def _settings(value: Any) -> Any:
    """Return a cell's settings, nested as they are, without the fields that have their defaults."""
    if isinstance(value, tuple):
        return [_settings(item) for item in value]
    if not is_dataclass(value):
        return value
    # A field that is added later leaves the keys of older cells as they are.
    changed = [field for field in fields(value) if getattr(value, field.name) != field.default]
    return {"kind": type(value).__name__} | {field.name: _settings(getattr(value, field.name)) for field in changed}


@dataclass(frozen=True)
class Base(Cell):
    """The model without an adapter, measured on a task."""

    task: str


@dataclass(frozen=True)
class Train(Cell):
    """
    An adapter trained on a task: the same rows in the same order for all of one seed.

    Args:
        method (`str`): `"LoRA"` or `"LoRI"`.
        task (`str`), seed (`int`), rate (`float`): what on, from which seed, the learning rate.
        mask ([`Mask`], *optional*): what LoRI trains; by default all of B (LoRI-D).
        start ([`Train`], *optional*): the adapter to go on from; by default a fresh one.
        disjoint (`bool`): whether the masks of earlier tasks are out of the race (LoRAF).
        shared_A (`bool`): whether A is the same for all tasks of a seed.
    """

    method: str
    task: str
    seed: int
    rate: float
    mask: Mask | None = None
    start: "Train | None" = None
    disjoint: bool = False
    shared_A: bool = False

    @property
    def needs(self) -> tuple[Cell, ...]:
        start = () if self.start is None else (self.start,)
        if self.mask is None or self.mask.method == "random" or self.disjoint:
            return start
        return (*start, self.calibration)

    @property
    def calibration(self) -> "Train | Gradients":
        """The cell that the mask is taken from."""
        if self.mask.method == "train":
            return Train("LoRI", self.task, self.seed, self.mask.rate, start=self.start, shared_A=self.shared_A)
        batches = CHEAP if self.mask.batches == CHEAP else STEPS
        return Gradients(self.task, self.seed, batches, start=self.start, shared_A=self.shared_A)


@dataclass(frozen=True)
class Gradients(Cell):
    """The gradients of batches at B0, the same rows in the same order as in training; nothing is moved."""

    task: str
    seed: int
    batches: int
    start: Train | None = None
    shared_A: bool = False

    @property
    def needs(self) -> tuple[Cell, ...]:
        return () if self.start is None else (self.start,)


@dataclass(frozen=True)
class Overlaps(Cell):
    """How far cheap masks agree with that of a whole dense run: the share of entries that both select."""

    task: str
    seed: int
    rate: float
    batches: int

    @property
    def needs(self) -> tuple[Cell, ...]:
        return Train("LoRI", self.task, self.seed, self.rate), Gradients(self.task, self.seed, self.batches)


@dataclass(frozen=True)
class Merge(Cell):
    """
    Adapters of several tasks in one.

    Args:
        adapters (`tuple[Train, ...]`): what is merged.
        how (`str`): a method of `merge_lori_adapters`.
        weight (`float`): every adapter's weight.
        rows (`str`): what it is measured on, `"test"` or `"dev"`.
    """

    adapters: tuple[Train, ...]
    how: str
    weight: float
    rows: str = "test"

    @property
    def needs(self) -> tuple[Cell, ...]:
        return self.adapters


@dataclass(frozen=True)
class Held(Cell):
    """What an adapter or a merge of them does on other tasks than it was trained on last."""

    of: Train | Merge
    tasks: tuple[str, ...]

    @property
    def needs(self) -> tuple[Cell, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Refusals(Cell):
    """The share of harmful and of harmless requests that are refused."""

    of: Train | Merge | None = None

    @property
    def needs(self) -> tuple[Cell, ...]:
        return () if self.of is None else (self.of,)


@dataclass(frozen=True)
class Rounded(Cell):
    """
    An adapter that went through the compact form.

    Args:
        of ([`Train`]): the adapter.
        dtype (`str`): `"bfloat16"` or `"int8"`, what its trained entries are rounded to; `""` keeps them.
    """

    of: Train
    dtype: str

    @property
    def needs(self) -> tuple[Cell, ...]:
        return (self.of,)
