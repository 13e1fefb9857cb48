"""Training B on a mask, by two backends that give one result.

`hook` is the paper's way and the yardstick: B stays dense, and hooks on it zero its gradient outside the mask.

`packed` makes the trained entries of a matrix one 1-D parameter, the values, and freezes B itself. Gradients,
optimizer state and the printed parameter count are then truly a tenth of B's, and every optimizer works unchanged. The
values are folded into B before B is read, so that whoever looks at B (saving, merging, another adapter) sees what was
trained; after an optimizer's step, [`fold_values`] does it.

Masks and positions are buffers of the layer, so that they follow it to any device; they are in no state dict.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.lora.variants import _register_frozen_peft_weight
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as module_hooks
from torch.nn.parallel import DistributedDataParallel

from .layers import VALUES, lora_layers

SPARSE_BACKENDS = ("packed", "hook")
# The layer's other attributes. As with `VALUES`, there is no "lora_" in them.
INDICES = "sparse_indices"
MASK = "sparse_mask"


@contextmanager
def sparse_training(
    model: PeftModel, adapter_name: str, masks: Mapping[str, Tensor] | None, backend: str = "packed"
) -> Iterator[None]:
    """
    Restrict training of an adapter's B to a mask while the context lasts; afterwards it is plain PEFT again.

    Args:
        model (`PeftModel`): the model.
        adapter_name (`str`): its adapter.
        masks (`Mapping[str, Tensor]`, *optional*):
            Module path -> bool tensor `(out_features, rank)`; True is trained. `None` trains all of B.
        backend (`str`, *optional*, defaults to `"packed"`): `"packed"` or `"hook"`.

    Source: Algorithm 1, line 18.
    """
    undo: list[Callable[[], None]] = []
    try:
        for path, layer in lora_layers(model, adapter_name).items():
            if not layer.lora_B[adapter_name].weight.requires_grad:
                continue  # frozen by hand, and so it stays
            mask = None if masks is None or masks[path].all() else masks[path]
            if backend == "packed":
                undo.append(_pack(layer, adapter_name, mask))
            elif mask is not None:
                undo.append(_zero_gradient_outside(layer, adapter_name, mask))
        undo.append(_keep_to_this_rank(model))
        yield
    finally:
        for restore in undo:
            restore()


def fold_values(model: PeftModel, adapter_name: str) -> None:
    """Write the values into B after an optimizer has changed them. Where FSDP shards B, every rank must call this."""
    for layer, variant in _packed_layers(model, adapter_name):
        variant.fold(layer, adapter_name)


def refresh_values(model: PeftModel, adapter_name: str) -> None:
    """Read the values from B again after B was loaded from a file. Where FSDP shards B, every rank must call this."""
    for layer, variant in _packed_layers(model, adapter_name):
        variant.read(layer, adapter_name)


@contextmanager
def values_in_state_dict(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """
    Let state dicts hold the values as parameters of their own while the context lasts, and leave B as it is.

    For those that shard a model: accelerate takes its state dict, empties the model, and fills the shards from it.
    """
    variants = [variant for _, variant in _packed_layers(model, adapter_name)]
    for variant in variants:
        variant.folded_on_save = False
    try:
        yield
    finally:
        for variant in variants:
            variant.folded_on_save = True


def _packed_layers(model: PeftModel, adapter_name: str) -> Iterator[tuple[LoraLayer, "SparseLora"]]:
    for layer in lora_layers(model, adapter_name).values():
        variant = layer.lora_variant.get(adapter_name)
        if isinstance(variant, SparseLora):
            yield layer, variant


def _keep_to_this_rank(model: PeftModel) -> Callable[[], None]:
    """Keep DDP from sending masks and positions, which are the same on every rank, with every forward pass."""
    names = [name for name, _ in model.named_buffers() if name.rpartition(".")[2] in (INDICES, MASK)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return lambda: delattr(model, "_ddp_params_and_buffers_to_ignore")


def _zero_gradient_outside(layer: LoraLayer, adapter_name: str, mask: Tensor) -> Callable[[], None]:
    """Zero the gradient of a layer's B outside a mask. Returns the function that ends it."""
    weight = layer.lora_B[adapter_name].weight
    layer.register_buffer(MASK, mask.to(weight.device), persistent=False)
    # Runs before a gradient is accumulated, reduced over ranks or clipped: nothing behind it sees the other entries.
    hook = weight.register_hook(lambda gradient: gradient.masked_fill(~getattr(layer, MASK), 0))

    def restore() -> None:
        hook.remove()
        delattr(layer, MASK)

    return restore


def _pack(layer: LoraLayer, adapter_name: str, mask: Tensor | None) -> Callable[[], None]:
    """Put a [`SparseLora`] on a layer. Returns the function that takes it off again."""
    weight = layer.lora_B[adapter_name].weight
    if mask is None:
        layer.lora_variant[adapter_name] = SparseLora(packed=False)
        return lambda: layer.lora_variant.pop(adapter_name)

    frozen_before = layer.frozen_peft_weight_names
    _register_frozen_peft_weight(layer, adapter_name, "lora_B")
    indices = mask.flatten().nonzero().flatten().to(weight.device)
    variant = layer.lora_variant[adapter_name] = SparseLora(packed=indices.numel() > 0)
    variant.idle = not variant.packed and not weight.any()
    layer.register_buffer(INDICES, indices, persistent=False)
    setattr(layer, VALUES, nn.ParameterDict())
    if variant.packed:
        getattr(layer, VALUES)[adapter_name] = nn.Parameter(weight.detach().flatten()[indices])
    layer.adapter_layer_names = (*type(layer).adapter_layer_names, VALUES)  # `set_adapter()` freezes and thaws it
    hooks = [
        layer.register_state_dict_pre_hook(_fold_layer),
        layer.register_state_dict_post_hook(_leave_out_values),
    ]

    def restore() -> None:
        for hook in hooks:
            hook.remove()
        del layer.adapter_layer_names
        if layer.lora_variant.pop(adapter_name, None) is variant:  # else the adapter was deleted
            variant.fold(layer, adapter_name)
            layer.frozen_peft_weight_names = frozen_before
            layer.lora_B[adapter_name].weight.requires_grad_(adapter_name in layer.active_adapters)
        delattr(layer, VALUES)
        delattr(layer, INDICES)

    return restore


# The hooks are functions of the module, and take what they need from the layer: a copied or pickled model has its own.


def _fold_layer(layer: LoraLayer, *_) -> None:
    for adapter_name, variant in layer.lora_variant.items():
        if isinstance(variant, SparseLora) and variant.folded_on_save:
            variant.fold(layer, adapter_name)


def _leave_out_values(layer: LoraLayer, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    # A state dict is plain PEFT's: the values are in B.
    for adapter_name, variant in layer.lora_variant.items():
        if isinstance(variant, SparseLora) and variant.folded_on_save:
            state_dict.pop(f"{prefix}{VALUES}.{adapter_name}", None)


class SparseLora(LoraVariant):
    """
    LoRA's branch on a frozen A as one autograd function, with B dense or packed.

    PEFT calls its `LoraVariant` interface private. This class and `_pack` are the one place that touches it.

    Attributes:
        packed (`bool`):
            whether the values are a parameter of their own, at the flat positions in B that the layer's buffer
            `sparse_indices` holds, int64.
        idle (`bool`): nothing is selected and B is zero: the branch adds nothing.
        folded_on_save (`bool`): whether a state dict has the values in B, as PEFT knows it, and not beside it.
    """

    def __init__(self, packed: bool = False):
        self.packed = packed
        self.idle = False
        self.folded_on_save = True

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        if self.idle:
            return result
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        values, indices = self._values(module, active_adapter) if self.packed else (None, None)
        dropout = module.lora_dropout[active_adapter]
        drop_share = dropout.p if isinstance(dropout, nn.Dropout) and module.training else 0.0
        device, base, W = x.device.type, module.get_base_layer(), None
        in_place = not _hooks(base)  # a hook may have kept the base layer's output
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast:
            x = x.to(torch.get_autocast_dtype(device))
        elif x.requires_grad and x.dtype == base.weight.dtype and len(module.active_adapters) == 1 and _is_plain(base):
            # One backward function for the layer and its branch: the branch's part of the gradient is added in place.
            result, W = result.detach(), base.weight
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            scaling = module.scaling[active_adapter]
            return _SparseBranch.apply(result, x, B, values, A, W, indices, scaling, drop_share, in_place)

    def _values(self, module: LoraLayer, adapter_name: str) -> tuple[Any, Tensor]:
        return getattr(module, VALUES)[adapter_name], getattr(module, INDICES)

    @torch.no_grad()
    def fold(self, module: LoraLayer, adapter_name: str) -> None:
        """Write the values into B. Where FSDP has sharded them, every rank must call this."""
        if not self.packed:
            return
        B, (values, indices) = module.lora_B[adapter_name].weight, self._values(module, adapter_name)
        if isinstance(B, DTensor):
            start, end = _flat_range(B)
            mine = (indices >= start) & (indices < end)
            B, indices, values = B.to_local(), indices[mine] - start, values.full_tensor()[mine]
        _fold(B, indices, values)

    @torch.no_grad()
    def read(self, module: LoraLayer, adapter_name: str) -> None:
        """Read the values from B. Where FSDP has sharded them, every rank must call this."""
        B = module.lora_B[adapter_name].weight
        if not self.packed:
            self.idle = self.idle and not B.any()
            return
        values, indices = self._values(module, adapter_name)
        if isinstance(B, DTensor):
            start, end = _flat_range(values)
            B, values, indices = B.full_tensor(), values.to_local(), indices[start:end]
        values.copy_(B.flatten()[indices])

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        self.fold(module, active_adapter)
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        self.fold(module, active_adapter)
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def _is_plain(base: nn.Module) -> bool:
    """Say whether a frozen base layer is x W^T and nothing else, whose gradient for x is g W."""
    trained = any(parameter.requires_grad for parameter in base.parameters())
    replaced = "forward" in vars(base)
    return type(base) is nn.Linear and not (_hooks(base) or replaced or trained or isinstance(base.weight, DTensor))


def _hooks(module: nn.Module) -> bool:
    """Say whether somebody looks at what goes through a module, forward or backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_hooks._has_any_global_hook()
    )


def _flat_range(sharded: DTensor) -> tuple[int, int]:
    """Return which flat positions of a tensor sharded by rows this rank holds. Rows are dealt out as by `chunk`."""
    rows, ranks = sharded.shape[0], sharded.device_mesh.size()
    row_size = sharded.numel() // rows
    first = min(-(-rows // ranks) * sharded.device_mesh.get_local_rank(), rows)
    return first * row_size, first * row_size + sharded.to_local().numel()


def _fold(B: Tensor, indices: Tensor, values: Tensor) -> None:
    # Through `.data`: the same numbers again must not count as a change of a tensor that a backward pass has saved.
    B.data.view(-1).index_copy_(0, indices, values.detach())


class _SparseBranch(torch.autograd.Function):
    """
    result + scaling * dropout(x) A^T B^T, written into `result` where `in_place` says so.

    Where the base layer's W is given, `result` is that layer's output, detached, and the backward pass that of both.

    For the backward pass it keeps x A^T (rank wide) and the positions that dropout zeroed; x itself is not
    needed, since A is frozen. B is the gradient's receiver if `values` is `None`, else `values` is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,  # first, as autograd wants it where it is a view that is written to
        x: Tensor,
        B: Tensor,
        values: Tensor | None,
        A: Tensor,
        W: Tensor | None,
        indices: Tensor | None,
        scaling: float,
        drop_share: float,
        in_place: bool,
    ) -> Tensor:
        if values is not None and indices is not None:
            _fold(B, indices, values)
        rows, dropped = x.reshape(-1, x.shape[-1]), None
        if drop_share > 0:
            dropped = _draw_dropped(x.numel(), drop_share, x.device)
            rows = rows.flatten().index_fill(0, dropped, 0).view(rows.shape)
            scaling = scaling / (1 - drop_share)
        h = rows @ A.to(rows.dtype).T
        ctx.save_for_backward(h, A, B, values, W, indices, dropped)
        ctx.scaling, ctx.input_shape = scaling, x.shape
        if in_place and result.dtype == h.dtype and result.is_contiguous():
            ctx.mark_dirty(result)
            result.view(-1, result.shape[-1]).addmm_(h, B.to(h.dtype).T, alpha=scaling)
            return result
        return result + (h @ B.to(h.dtype).T).mul_(scaling).view(result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, A, B, values, W, indices, dropped = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).to(h.dtype)
        d_x = d_B = d_values = None
        if ctx.needs_input_grad[1]:
            if values is not None and dist.is_available() and dist.is_initialized():
                _fold(B, indices, values)  # FSDP gathers B anew for the backward pass
            d_h, A = rows @ B.to(h.dtype), A.to(h.dtype)
            if W is not None and dropped is None:
                d_x = (rows @ W).addmm_(d_h, A, alpha=ctx.scaling)
            else:
                d_x = d_h.mul_(ctx.scaling) @ A
                if dropped is not None:
                    d_x.view(-1).index_fill_(0, dropped, 0)
                if W is not None:
                    d_x.addmm_(rows, W)
            d_x = d_x.view(ctx.input_shape)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            d_B = rows.T @ h
            if values is not None:
                d_values = d_B.view(-1)[indices].mul_(ctx.scaling).to(values.dtype)
                d_B = None
            else:
                d_B = d_B.mul_(ctx.scaling).to(B.dtype)
        return gradient if W is None else None, d_x, d_B, d_values, None, None, None, None, None, None


def _draw_dropped(numel: int, drop_share: float, device: torch.device) -> Tensor:
    """
    Draw which of `numel` entries are dropped: each with probability `drop_share`, independently.

    Instead of one random number an entry it draws one a dropped entry, the gap to the next one, which is geometrically
    distributed. On a CPU most of the time that dropout takes goes into random numbers.

    Returns:
        `Tensor`: flat positions, int64, rising; some positions stand there more than once.
    """
    expected = numel * drop_share
    count = int(expected + 6 * math.sqrt(expected) + 10)  # so that they reach the end, but for once in 1e9
    gaps = torch.rand(count, device=device).neg_().log1p_().div_(math.log1p(-drop_share)).long()
    positions = gaps.add_(1).cumsum(0).sub_(1)
    # Those beyond the end repeat the first one: no data-dependent shape, so that a GPU need not be waited for.
    return torch.where(positions < numel, positions, positions[0].clamp(max=numel - 1))
