"""What a record is made of: the facts of runs, tasks and merges."""

from dataclasses import dataclass
from typing import Any

from ..inputs.typed_values import left_out, plain, typed

Scalar = bool | int | float | str
OPTIMIZER_CLASS = "optimizer_class"  # the key in a run's `settings`, of the optimizer that a phase really had


@dataclass(frozen=True)
class Calibration:
    """How the mask was found."""

    learning_rate: float | None = left_out()  # of the calibration
    steps: int | None = left_out()  # optimizer steps, or batches
    samples: int | None = None  # rows that they saw, each counted once; unknown for a stream
    loss: float | None = left_out()  # the mean training loss, nats a token
    method: str | None = left_out()  # a `calibration_method`; `train` where none is on record
    seed: int | None = left_out()  # of a random mask


@dataclass(frozen=True)
class Counts:
    """Parameters, in entries."""

    lora: int  # what LoRA would train, A and B
    lora_B: int  # all of B
    selected: int | None  # what the newest task's mask selects; unknown before that and for a merge
    dense: dict[str, int] | None = left_out()  # what is trained besides B, without a mask: name -> its entries


@dataclass(frozen=True)
class BaseModel:
    """The model that the adapter changes."""

    id: str | None  # its Hub name
    name: str | None  # the last part of its name or of its local folder's
    architecture: str  # its class
    parameters: int  # without the adapter's
    # `4-bit` or `8-bit`, where bitsandbytes had packed it while it was trained on
    quantization: str | None = left_out()


@dataclass(frozen=True)
class TrainingData:
    """The rows that a task was trained on."""

    id: str | None  # the data set's Hub name
    rows: int | None  # how many; unknown for a stream
    conversational: bool  # whether they are conversations
    fingerprint: str | None = left_out()  # SHA-256 of 100 of them, first and last included


@dataclass(frozen=True)
class Losses:
    """One step's losses, nats a token; `None` where one was not measured."""

    step: int
    loss: float | None
    eval_loss: float | None


@dataclass(frozen=True)
class Training:
    """What a card says of a run: no path and nothing secret."""

    base_model: BaseModel | None  # what was trained on
    dataset: TrainingData | None = left_out()  # the rows
    license: str | None = None  # the base model's, where the Hub names it
    tags: tuple[str, ...] | None = left_out()  # of the trainer, e.g. `sft`
    hyperparameters: dict[str, Scalar] | None = left_out()  # those that differ from their defaults
    # what else decides the outcome: a number, or the beginning of the SHA-256 of what may be private
    settings: dict[str, Scalar] | None = left_out()
    world_size: int | None = left_out()  # processes
    device: str | None = left_out()  # of each
    steps: int | None = left_out()  # optimizer steps of the adaptation
    epochs: float | None = left_out()  # passes over the data
    losses: tuple[Losses, ...] | None = left_out()  # the course of the adaptation
    run: str | None = left_out()  # the run's identity, drawn when it began; the same where it was resumed


@dataclass(frozen=True)
class TaskRecord:
    """A task whose entries are in B."""

    task: str  # its name
    selected: int  # entries that its mask selects
    # Where its own rows of A and columns of B begin and end, in an adapter that was grown; `None` for all of them
    columns: tuple[int, ...] | None = left_out()
    calibration: Calibration | None = left_out()  # how that mask was found
    training: Training | None = left_out()  # its run

    @classmethod
    def from_dict(cls, values: Any) -> "TaskRecord":
        """Make a record from plain values. Raises `TypeError` if one has another type."""
        return typed(cls, values, "task")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return plain(self)


@dataclass(frozen=True)
class MergedAdapter:
    """One of the adapters that were merged."""

    task: str  # its newest task
    weight: float  # in the merge
    source: str  # its Hub name, or the name of its folder
    rank: int  # its highest rank
    offset: int  # where its rows of A and columns of B begin in the merged ones
    sha256: dict[str, str]  # file -> SHA-256


@dataclass(frozen=True)
class Independence:
    """How independent the A of two merged adapters are."""

    adapters: tuple[str, ...]  # their names
    same_A: bool  # whether they have the same A
    squared_cosine_over_chance: float  # mean squared cosine between their rows, in units of chance


@dataclass(frozen=True)
class Merge:
    """How adapters were merged."""

    method: str  # e.g. `concat`
    adapters: tuple[MergedAdapter, ...]  # in the order in which they were given
    density: float | None = left_out()  # what a pruning method kept, a fraction in (0, 1]
    seed: int | None = left_out()  # of its random numbers
    search: dict[str, Any] | None = left_out()  # how the weights were found
    independence: tuple[Independence, ...] = ()  # of each pair's A
    # module path -> the share of its delta's norm that `svd` lost, in [0, 1]
    lost: dict[str, float] | None = left_out()
