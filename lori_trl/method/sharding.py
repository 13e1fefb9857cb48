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


def is_sharded(weight: nn.Parameter) -> bool:
    """Say whether only a part of a parameter is here."""
    return isinstance(weight, DTensor) or full_shape(weight) != weight.shape


def local(tensor: Tensor) -> Tensor:
    """Return what of a tensor is here: all of it, but for a `DTensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, model: Tensor) -> Tensor:
    """Shard what every rank has whole as another tensor is sharded, if it is; nothing is sent. Its type stays."""
    if not isinstance(model, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(whole.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def gather_like(shard: Tensor, model: DTensor) -> Tensor:
    """Put the ranks' parts of a bool tensor together that is sharded as another one is."""
    whole = DTensor.from_local(  # as bytes: gloo exchanges no bools
        shard.byte(), model.device_mesh, model.placements, shape=model.shape, stride=model.stride()
    )
    return whole.full_tensor().bool()


def flat_range(sharded: DTensor) -> tuple[int, int]:
    """Return which flat positions of a tensor sharded by rows this rank holds. Rows are dealt out as by `chunk`."""
    rows, ranks = sharded.shape[0], sharded.device_mesh.size()
    row_size = sharded.numel() // rows
    # All ranks but the last few have the same number of rows, rounded up. So those last ones have fewer, or none.
    first = min(-(-rows // ranks) * sharded.device_mesh.get_local_rank(), rows)
    return first * row_size, first * row_size + sharded.to_local().numel()


@torch.no_grad()
def gather(weight: Tensor) -> Tensor:
    """Return a copy of the whole parameter, on its device."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    with _gathered(weight):  # outside of this context, ZeRO-3's parameter is empty
        return weight.detach().clone()


def to_cpu(tensor: Tensor) -> Tensor:
    """Bring a tensor to the CPU, where masks and what they are selected from lie. A `DTensor` stays one."""
    return tensor if isinstance(tensor, DTensor) else tensor.cpu()


@torch.no_grad()
def assign(weight: nn.Parameter, value: Tensor) -> None:
    """
    Set a parameter, shard by shard.

    Args:
        weight (`nn.Parameter`): the parameter.
        value (`Tensor`): the whole of what it shall be, the same on every rank.
    """
    if isinstance(weight, DTensor):
        weight.copy_(shard_like(value.to(weight.dtype), weight))
        return
    with _gathered(weight, modified_by=0):  # at its end, every rank takes its part of what rank 0 has
        weight.copy_(value)


@torch.no_grad()
def change(weight: nn.Parameter, before: Tensor, *, with_deepspeed: bool = False) -> Tensor:
    """
    Return how far a parameter has moved, in float32: a `DTensor` stays one, everything else comes to the CPU, whole.

    Args:
        weight (`nn.Parameter`): the parameter.
        before (`Tensor`): the whole of what it was, on the CPU.
        with_deepspeed (`bool`, *optional*, defaults to `False`):
            whether DeepSpeed trains it: what counts is then its copy in float32, of which the parameter is a rounding.
    """
    if isinstance(weight, DTensor):
        return weight.detach().float() - shard_like(before.float(), weight)
    exact = _float32_copy(weight) if with_deepspeed and weight.requires_grad else None
    return (gather(weight) if exact is None else exact).cpu().float() - before.float()


def _float32_copy(weight: nn.Parameter) -> Tensor | None:
    """Return DeepSpeed's copy of what it trains, whole on every rank; None where it has none."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(weight)


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
        weight.register_post_accumulate_grad_hook(_zero_outside(local(shard_like(masks[path], weight))))
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
        whole = gather(weight)  # on every rank, for all must take part
        if keep:
            state[name] = whole.cpu()
    return state


def _adapter_weights(model: "PeftModel", adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, weight in model.named_parameters():
        matrix = f".lora_A.{adapter_name}." in name or f".lora_B.{adapter_name}." in name
        if (matrix or weight.requires_grad) and f".{VALUES}." not in name:  # the values are in B
            yield name, weight


def _zero_outside(mask: Tensor) -> Callable[[Any], Any]:
    outside = ~mask  # inverted once, not in every step
    return lambda shard: shard.grad.to_local().masked_fill_(outside, 0)


def _gathered(weight: Tensor, modified_by: int | None = None) -> AbstractContextManager:
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([weight], modifier_rank=modified_by)


def gathered(model: nn.Module) -> AbstractContextManager:
    """Hold all of a model on this device for a while, where ZeRO-3 has spread it; every rank must take part."""
    parameters = [weight for weight in model.parameters() if hasattr(weight, "ds_id")]
    if not parameters:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)


def engine_dtype(accelerator: "Accelerator") -> torch.dtype:
    """Return the type in which the engine holds the adapter: DeepSpeed casts all weights to the one it trains in."""
    plugin = accelerator.state.deepspeed_plugin
    return torch.float32 if plugin is None else plugin.hf_ds_config.dtype()
