"""What a run knows: its adapter, its task's masks, and how far it has come."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from ..adapter.masks import LoriMasks
from ..adapter.memory import remembered
from ..adapter.record_fields import Calibration, TaskRecord
from ..continual import feasible_entries, tasks_that_fit
from ..method.dense_parameters import show_bias_of_tied_head
from ..method.growth import columns_of
from ..method.layers import lora_layers
from ..method.lora_options import check_variants
from ..method.moments import LowRank
from ..method.projections import Fingerprint, Projection
from ..method.sharding import gather
from ..method.sparsity import num_to_select
from .base_model import keep_4bit_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer
    from torch.utils.hooks import RemovableHandle

logger = get_logger(__name__)


@dataclass
class LoriRun:
    """The state of a run: all that [`LoriTrainerMixin`] keeps beside what the Trainer has."""

    task: str  # the task that is trained
    adapter_name: str  # the adapter that is trained, as PEFT knows it
    lora_layers: dict[str, "LoraLayer"]  # module path -> PEFT's layer, sorted by path
    earlier_masks: dict[str, LoriMasks]  # the adapter's other tasks, oldest first -> their masks
    earlier_tasks: list[TaskRecord]  # what is on record of them
    trainer_attributes: frozenset[str]  # what TRL's trainer made; see [`counters_set_back`]
    masks: LoriMasks | None = None  # M, the entries of B that this task trains; `None` until they are selected
    projection: Projection = field(default_factory=lambda: Projection(None, None, ""))  # which A the adapter has
    # Where the task's own columns of B begin and end, in an adapter that was grown; `None` for all of them
    columns: tuple[int, ...] | None = None
    # The entries that no earlier task has; `None` where all are free, or may be shared
    feasible: LoriMasks | None = None
    phase: str = "new"  # how far the run is: one of `lori_trl.adapter.record.PHASES`
    calibration: Calibration | None = None  # how the masks were found; `None` where they were given
    calibration_log: list[dict[str, Any]] = field(default_factory=list)  # what the calibration logged
    id: str | None = None  # the run's identity, drawn when it begins; the same where it is resumed
    # the hooks that mask FSDP2's shards in the phase that goes on
    shard_hooks: list["RemovableHandle"] = field(default_factory=list)
    moments: dict[str, LowRank] | None = None  # module path -> those of its input, where the adapter carries them
    # module path -> B0 `(out_features, rank)`, B as it is now, on the CPU
    initial_weights: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        self.initial_weights = {path: weight.detach().to("cpu", copy=True) for path, weight in self.weights.items()}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """B: module path -> lora_B's weight `(out_features, rank)`."""
        return {path: layer.lora_B[self.adapter_name].weight for path, layer in self.lora_layers.items()}

    @property
    def all_masks(self) -> dict[str, LoriMasks]:
        """Every task's masks, oldest first."""
        return {**self.earlier_masks, **({} if self.masks is None else {self.task: self.masks})}

    @property
    def trained_masks(self) -> LoriMasks | None:
        """The entries that the phase trains; `None` for all of B."""
        return self.feasible if self.phase == "calibrating" else self.masks

    @property
    def own_weights(self) -> dict[str, Tensor]:
        """B's columns that the task may train: module path -> `(out_features, columns)`."""
        return columns_of(self.weights, self.columns)

    def rename_A(self, projection: Projection) -> None:
        """Note what is known of A, also with the earlier masks that were calibrated on it."""
        for task, masks in self.earlier_masks.items():
            if masks.projection == self.projection:
                self.earlier_masks[task] = LoriMasks(masks, **vars(masks.metadata) | {"projection": projection})
        self.projection = projection

    def fingerprint(self, dtype: torch.dtype = torch.float32) -> str:
        """Fingerprint A, rounded to the type in which an engine holds it."""
        taken = Fingerprint()
        for path, layer in self.lora_layers.items():
            taken.add(path, gather(layer.lora_A[self.adapter_name].weight).to(dtype))
        return str(taken)

    def keep_disjoint(self, sparsity: float, granularity: str) -> None:
        """
        Take the entries of earlier tasks out of the race.

        Raises:
            `ValueError`: trained entries belong to no task that is known, or this task does not fit beside the others.
        """
        feasible = feasible_entries({path: weight.shape for path, weight in self.weights.items()}, self.earlier_masks)
        owned = ~feasible if self.masks is None else self.masks | ~feasible
        if any((weight != 0)[~owned[path]].any() for path, weight in self.initial_weights.items()):
            raise ValueError(
                "`disjoint_masks=True`, but this adapter has trained entries of B that belong to no task on record. "
                "Every task's entries must be known. Load the adapter with `load_lori_adapter`, which brings its "
                "masks, or leave `disjoint_masks` unset."
            )
        if self.masks is None and not tasks_that_fit(feasible, sparsity, granularity):
            raise ValueError(
                f"`sparsity={sparsity}`, `mask_granularity={granularity!r}`, `disjoint_masks=True`: the task needs "
                f"{num_to_select(sparsity, feasible.numel):,} of {feasible.numel:,} entries of B, and "
                f"{', '.join(self.earlier_masks)} left {feasible.num_selected:,} free. Over the whole model, a "
                f"sparsity from {1 - feasible.density:.6f} on fits. Raise `sparsity`, begin another adapter, or leave "
                "`disjoint_masks` unset."
            )
        self.feasible = feasible if self.earlier_masks else None

    def adopt(self, masks: LoriMasks) -> None:
        """
        Take masks from a file as this task's.

        Raises:
            `ValueError`: they do not fit the adapter, are others than the task's own, or an earlier task has some of
                their entries.
        """
        masks.check_shapes({path: weight.shape for path, weight in self.weights.items()})
        if self.masks is not None and masks != self.masks:
            raise ValueError(
                f"`task_name={self.task!r}`: the adapter has this task with other masks than those given. A task "
                "has one set of masks. Leave `mask_name_or_path` unset to go on with it, or give the task a new name."
            )
        if self.feasible is not None and (masks - self.feasible).num_selected:
            raise ValueError(
                f"`disjoint_masks=True`, but {(masks - self.feasible).num_selected:,} entries of the given masks "
                f"belong to {', '.join(self.earlier_masks)}. Disjoint masks share none. Leave `mask_name_or_path` "
                "unset to calibrate on what is free, or leave `disjoint_masks` unset."
            )
        own, given = self.projection, masks.projection
        if given is None or given.fingerprint != own.fingerprint and not own.same_draw(given):
            logger.warning(
                "The masks were not calibrated on this adapter's A, so their entries stand for other random "
                "directions. To calibrate on this adapter, leave `mask_name_or_path` unset; for a fresh adapter, "
                "leave `projection_seed` unset, which takes the masks' own A."
            )
        self.masks = LoriMasks(masks, **vars(masks.metadata) | {"task": self.task})


def begin_with_adapter(model: "PeftModel", task: str, *, trainer_attributes: frozenset[str]) -> LoriRun:
    """
    Take stock of the adapter that is trained: its layers, its B0, and the tasks that it has.

    Args:
        model (`PeftModel`): the model that TRL's trainer has made ready.
        task (`str`): the task that is trained.
        trainer_attributes (`frozenset[str]`): what TRL's trainer made.

    Raises:
        `ValueError`: its layers are no plain LoRA, or A is not the one that its tasks were trained on.
    """
    adapter_name = model.active_adapters[0]
    layers = lora_layers(model, adapter_name)
    check_variants(layers, adapter_name)
    keep_4bit_layers(model)
    show_bias_of_tied_head(model)
    masks, noted, fingerprint = remembered(model, adapter_name)
    tasks = [TaskRecord.from_dict(each) for each in noted]
    run = LoriRun(
        task,
        adapter_name,
        layers,
        earlier_masks={name: masks[name] for name in masks if name != task},
        earlier_tasks=[each for each in tasks if each.task in masks and each.task != task],
        columns=next((each.columns for each in tasks if each.task == task), None),
        trainer_attributes=trainer_attributes,
        masks=masks.get(task),
    )
    if fingerprint not in (None, run.fingerprint()):
        raise ValueError(
            f"Adapter {adapter_name!r} has another A than the one that its tasks were trained on: it was changed "
            "or cast since. B and the masks mean nothing on another A. Load it again with `load_lori_adapter`."
        )
    return run
