"""The adapter's matrices where FSDP2 or DeepSpeed spreads a model over devices.

FSDP2 replaces every parameter by a `DTensor`, of which each rank holds some rows. ZeRO-3 keeps the parameter, but
empties it and holds a part of it aside. Under ZeRO-2 and DDP it is whole on every rank. Whoever reads or writes A and
B through these functions need not know which it is; where a matrix is sharded, every rank must call them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle

from .layers import VALUES

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel


def full_shape(weight: nn.Parameter) -> torch.Size:
    """Return a parameter's shape, whatever part of it is here."""
    return getattr(weight, "ds_shape", weight.shape)  # ZeRO-3's name for it


@torch.no_grad()
def gather(weight: Tensor) -> Tensor:
    """Return a copy of the whole parameter, on its device."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    with _gathered(weight):
        return weight.detach().clone()


@torch.no_grad()
def assign(weight: nn.Parameter, value: Tensor) -> None:
    """
    Set a parameter, shard by shard.

    Args:
        weight (`nn.Parameter`): the parameter.
        value (`Tensor`): the whole of what it shall be, the same on every rank.
    """
    if isinstance(weight, DTensor):
        weight.copy_(_shard_like(value, weight))
        return
    with _gathered(weight, modified_by=0):
        weight.copy_(value)


@torch.no_grad()
def change(weight: nn.Parameter, before: Tensor) -> Tensor:
    """
    Return how far a parameter has moved: a `DTensor` stays one, everything else comes to the CPU, whole.

    Args:
        weight (`nn.Parameter`): the parameter.
        before (`Tensor`): the whole of what it was, on the CPU.
    """
    if isinstance(weight, DTensor):
        return weight.detach() - _shard_like(before, weight)
    return gather(weight).cpu() - before.to(weight.dtype)


def mask_shards(weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor] | None) -> list[RemovableHandle]:
    """
    Zero the gradients of FSDP2's shards outside the masks, which are sharded alike.

    FSDP2 reduces gradients behind autograd's back, so that a hook on a sharded parameter never fires. It does call the
    hooks for accumulated gradients when a shard's gradient is complete: before clipping and the optimizer see it.
    Parameters that are no `DTensor` have their hooks from [`~lori_trl.method.sparse.sparse_training`].

    Args:
        weights (`Mapping[str, nn.Parameter]`): module path -> B.
        masks (`Mapping[str, Tensor]`, *optional*): module path -> bool tensor; `None` trains all of B.
    """
    if masks is None:
        return []
    return [
        weight.register_post_accumulate_grad_hook(_zero_outside(_shard_like(masks[path], weight).to_local()))
        for path, weight in weights.items()
        if isinstance(weight, DTensor) and weight.requires_grad
    ]


def adapter_state(model: "PeftModel", adapter_name: str, keep: bool) -> dict[str, Tensor]:
    """
    Gather the weights of an adapter and all else that is trained, one by one. The base model stays where it is.

    Args:
        model (`PeftModel`): the sharded model.
        adapter_name (`str`): its adapter.
        keep (`bool`): whether this rank wants them, on the CPU; the others only take part.

    Returns:
        `dict[str, Tensor]`: name in the model's state dict -> whole tensor; empty without `keep`.
    """
    state = {}
    for name, weight in _adapter_weights(model, adapter_name):
        whole = gather(weight)
        if keep:
            state[name] = whole.cpu()
    return state


def _adapter_weights(model: "PeftModel", adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, weight in model.named_parameters():
        matrix = f".lora_A.{adapter_name}." in name or f".lora_B.{adapter_name}." in name
        if (matrix or weight.requires_grad) and f".{VALUES}." not in name:  # the values are in B
            yield name, weight


def _shard_like(whole: Tensor, sharded: DTensor) -> DTensor:
    """Take this rank's part of what every rank has whole: nothing is sent."""
    whole = whole.to(sharded.device, sharded.dtype if whole.is_floating_point() else None)
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)


def _zero_outside(mask: Tensor) -> Callable[[Any], Any]:
    outside = ~mask
    return lambda shard: shard.grad.to_local().masked_fill_(outside, 0)


def _gathered(weight: Tensor, modified_by: int | None = None) -> AbstractContextManager:
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([weight], modifier_rank=modified_by)


def engine_dtype(accelerator: "Accelerator") -> torch.dtype:
    """Return the type in which the engine holds the adapter: DeepSpeed casts all weights to the one it trains in."""
    plugin = accelerator.state.deepspeed_plugin
    return torch.float32 if plugin is None else plugin.hf_ds_config.dtype()
