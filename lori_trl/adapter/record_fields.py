"""What a record is made of: the facts of runs, tasks and merges."""

from dataclasses import dataclass
from typing import Any

from ..inputs.typed_values import left_out, plain, typed

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Calibration:
    """
    How the mask was found.

    Args:
        learning_rate (`float`, *optional*): of the calibration.
        steps (`int`, *optional*): optimizer steps, or batches.
        samples (`int`, *optional*): rows that they saw, each counted once; unknown for a stream.
        loss (`float`, *optional*): the mean training loss, nats a token.
        method (`str`, *optional*): a `calibration_method`; `train` where none is on record.
        seed (`int`, *optional*): of a random mask.
    """

    learning_rate: float | None = left_out()
    steps: int | None = left_out()
    samples: int | None = None
    loss: float | None = left_out()
    method: str | None = left_out()
    seed: int | None = left_out()


@dataclass(frozen=True)
class Counts:
    """
    Parameters, in entries.

    Args:
        lora (`int`): what LoRA would train, A and B.
        lora_B (`int`): all of B.
        selected (`int` or `None`): what the newest task's mask selects; unknown before that and for a merge.
        dense (`dict[str, int]`, *optional*): what is trained besides B, without a mask: name -> its entries.
    """

    lora: int
    lora_B: int
    selected: int | None
    dense: dict[str, int] | None = left_out()


@dataclass(frozen=True)
class BaseModel:
    """
    The model that the adapter changes.

    Args:
        id (`str` or `None`): its Hub name.
        name (`str` or `None`): the last part of its name or of its local folder's.
        architecture (`str`): its class.
        parameters (`int`): without the adapter's.
        quantization (`str`, *optional*): `4-bit` or `8-bit`, where bitsandbytes had packed it while it was trained on.
    """

    id: str | None
    name: str | None
    architecture: str
    parameters: int
    quantization: str | None = left_out()


@dataclass(frozen=True)
class TrainingData:
    """
    The rows that a task was trained on.

    Args:
        id (`str` or `None`): the data set's Hub name.
        rows (`int` or `None`): how many; unknown for a stream.
        conversational (`bool`): whether they are conversations.
        fingerprint (`str`, *optional*): SHA-256 of the first 100 of them.
    """

    id: str | None
    rows: int | None
    conversational: bool
    fingerprint: str | None = left_out()


@dataclass(frozen=True)
class Losses:
    """One step's losses, nats a token; `None` where one was not measured."""

    step: int
    loss: float | None
    eval_loss: float | None


@dataclass(frozen=True)
class Training:
    """
    What a card says of a run: no path and nothing secret.

    Args:
        base_model ([`BaseModel`] or `None`): what was trained on.
        dataset ([`TrainingData`], *optional*): the rows.
        license (`str` or `None`): the base model's, where the Hub names it.
        tags (`tuple[str, ...]`, *optional*): of the trainer, e.g. `sft`.
        hyperparameters (`dict[str, Scalar]`, *optional*): those that differ from their defaults.
        world_size (`int`, *optional*): processes.
        device (`str`, *optional*): of each.
        steps (`int`, *optional*): optimizer steps of the adaptation.
        epochs (`float`, *optional*): passes over the data.
        losses (`tuple[Losses, ...]`, *optional*): the course of the adaptation.
        run (`str`, *optional*): the run's identity, drawn when it began; the same where it was resumed.
    """

    base_model: BaseModel | None
    dataset: TrainingData | None = left_out()
    license: str | None = None
    tags: tuple[str, ...] | None = left_out()
    hyperparameters: dict[str, Scalar] | None = left_out()
    world_size: int | None = left_out()
    device: str | None = left_out()
    steps: int | None = left_out()
    epochs: float | None = left_out()
    losses: tuple[Losses, ...] | None = left_out()
    run: str | None = left_out()


@dataclass(frozen=True)
class TaskRecord:
    """
    A task whose entries are in B.

    Args:
        task (`str`): its name.
        selected (`int`): entries that its mask selects.
        calibration ([`Calibration`], *optional*): how that mask was found.
        training ([`Training`], *optional*): its run.
    """

    task: str
    selected: int
    calibration: Calibration | None = left_out()
    training: Training | None = left_out()

    @classmethod
    def from_dict(cls, values: Any) -> "TaskRecord":
        """Make a record from plain values. Raises `TypeError` if one has another type."""
        return typed(cls, values, "task")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return plain(self)


@dataclass(frozen=True)
class MergedAdapter:
    """
    One of the adapters that were merged.

    Args:
        task (`str`): its newest task.
        weight (`float`): in the merge.
        source (`str`): its Hub name, or the name of its folder.
        rank (`int`): its highest rank.
        offset (`int`): where its rows of A and columns of B begin in the merged ones.
        sha256 (`dict[str, str]`): file -> SHA-256.
    """

    task: str
    weight: float
    source: str
    rank: int
    offset: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Independence:
    """
    How independent the A of two merged adapters are.

    Args:
        adapters (`tuple[str, ...]`): their names.
        same_A (`bool`): whether they have the same A.
        squared_cosine_over_chance (`float`): mean squared cosine between their rows, in units of chance.
    """

    adapters: tuple[str, ...]
    same_A: bool
    squared_cosine_over_chance: float


@dataclass(frozen=True)
class Merge:
    """
    How adapters were merged.

    Args:
        method (`str`): e.g. `concat`.
        adapters (`tuple[MergedAdapter, ...]`): in the order in which they were given.
        density (`float`, *optional*): what a pruning method kept, a fraction in (0, 1].
        seed (`int`, *optional*): of its random numbers.
        search (`dict[str, Any]`, *optional*): how the weights were found.
        independence (`tuple[Independence, ...]`): of each pair's A.
        lost (`dict[str, float]`, *optional*): module path -> the share of its delta's norm that `svd` lost, in [0, 1].
    """

    method: str
    adapters: tuple[MergedAdapter, ...]
    density: float | None = left_out()
    seed: int | None = left_out()
    search: dict[str, Any] | None = left_out()
    independence: tuple[Independence, ...] = ()
    lost: dict[str, float] | None = left_out()
