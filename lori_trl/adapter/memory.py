"""What an adapter on a model remembers: its tasks' masks, and what is on record of their runs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..method.layers import lora_layers
from .masks import LoriMasks

if TYPE_CHECKING:
    from peft import PeftModel

# An attribute of one of the adapter's own modules. So it is copied with the adapter, and gone with it, and no other
# adapter of the model has it.
_MEMORY = "lori_memory"


def remember(
    model: "PeftModel",
    adapter_name: str,
    masks: Mapping[str, LoriMasks],
    tasks: Sequence[Mapping[str, Any]],
    fingerprint: str,
) -> None:
    """
    Note on an adapter which tasks it has. `model.lori_masks` and `model.lori_tasks` show those of the last one noted.

    Args:
        model (`PeftModel`): the model.
        adapter_name (`str`): its adapter.
        masks (`Mapping[str, LoriMasks]`): task -> its masks, oldest first.
        tasks (`Sequence[Mapping[str, Any]]`): what is on record of the tasks' runs, as plain values.
        fingerprint (`str`): A's, on which B was trained.
    """
    model.lori_masks, model.lori_tasks = dict(masks), list(tasks)
    setattr(_home(model, adapter_name), _MEMORY, (dict(masks), list(tasks), fingerprint))


def remembered(model: "PeftModel", adapter_name: str) -> tuple[dict[str, LoriMasks], list[dict[str, Any]], str | None]:
    """Return the masks, records and A's fingerprint that [`remember`] noted; of an adapter without a task, nothing."""
    masks, tasks, fingerprint = getattr(_home(model, adapter_name), _MEMORY, ({}, [], None))
    return dict(masks), list(tasks), fingerprint


def _home(model: "PeftModel", adapter_name: str) -> Any:
    return next(iter(lora_layers(model, adapter_name).values())).lora_B[adapter_name]
