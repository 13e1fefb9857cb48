"""Training B on a mask, by two backends that give one result.

`hook` is the paper's way and the yardstick: B stays dense, and hooks on it zero its gradient outside the mask.

`packed` makes the trained entries of a matrix one 1-D parameter, the values, and freezes B itself. Gradients,
optimizer state and the printed parameter count are then truly a tenth of B's, and every optimizer works unchanged. The
values are folded into B before B is read, so that whoever looks at B (saving, merging, another adapter) sees what was
trained.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.lora.variants import _register_frozen_peft_weight
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from .projections import lora_layers

SPARSE_BACKENDS = ("packed", "hook")
VALUES = "sparse_values"  # the layer's attribute; a name with "lora_" in it would end up in PEFT's files


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
    layers = lora_layers(model, adapter_name)
    undo: list[Callable[[], None]] = []
    try:
        for path, layer in layers.items():
            mask = None if masks is None or masks[path].all() else masks[path]
            if backend == "packed":
                undo.append(_pack(layer, adapter_name, mask))
            elif mask is not None:
                weight = layer.lora_B[adapter_name].weight
                undo.append(weight.register_hook(_zero_outside(mask.to(weight.device))).remove)
        yield
    finally:
        for restore in undo:
            restore()


def refresh_values(model: PeftModel, adapter_name: str) -> None:
    """Read the values from B again, after B was loaded from a file."""
    for layer in lora_layers(model, adapter_name).values():
        variant = layer.lora_variant.get(adapter_name)
        if isinstance(variant, SparseLora):
            variant.read(layer, adapter_name)


def _zero_outside(mask: Tensor) -> Callable[[Tensor], Tensor]:
    # Runs before a gradient is accumulated, reduced over ranks or clipped: nothing behind it sees the other entries.
    outside = ~mask
    return lambda gradient: gradient.masked_fill(outside, 0)


def _pack(layer: LoraLayer, adapter_name: str, mask: Tensor | None) -> Callable[[], None]:
    """Put a [`SparseLora`] on a layer. Returns the function that takes it off again."""
    weight = layer.lora_B[adapter_name].weight
    variant = layer.lora_variant[adapter_name] = SparseLora()
    if mask is None:
        return lambda: layer.lora_variant.pop(adapter_name)

    frozen_before = layer.frozen_peft_weight_names
    _register_frozen_peft_weight(layer, adapter_name, "lora_B")
    variant.indices = mask.flatten().nonzero().flatten().to(weight.device)
    variant.idle = variant.indices.numel() == 0 and not weight.any()
    setattr(layer, VALUES, nn.ParameterDict())
    if variant.indices.numel():
        getattr(layer, VALUES)[adapter_name] = nn.Parameter(weight.detach().flatten()[variant.indices])
    layer.adapter_layer_names = (*type(layer).adapter_layer_names, VALUES)  # `set_adapter()` freezes and thaws it
    hook = layer.register_state_dict_pre_hook(lambda *_: variant.fold(layer, adapter_name))

    def restore() -> None:
        variant.fold(layer, adapter_name)
        hook.remove()
        del layer.adapter_layer_names, layer.lora_variant[adapter_name]
        delattr(layer, VALUES)
        layer.frozen_peft_weight_names = frozen_before
        weight.requires_grad_(adapter_name in layer.active_adapters)

    return restore


class SparseLora(LoraVariant):
    """
    LoRA's branch on a frozen A as one autograd function, with B dense or packed.

    PEFT calls its `LoraVariant` interface private. This class and `_pack` are the one place that touches it.

    Attributes:
        indices (`Tensor` or `None`): flat positions in B of the values, int64; `None` where all of B is trained.
        idle (`bool`): nothing is selected and B is zero: the branch adds nothing.
    """

    def __init__(self):
        self.indices: Tensor | None = None
        self.idle = False

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        if self.idle:
            return result
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        values = getattr(module, VALUES)[active_adapter] if self.packed else None
        dropout = module.lora_dropout[active_adapter]
        drop_share = dropout.p if isinstance(dropout, nn.Dropout) and module.training else 0.0
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _SparseBranch.apply(x, result, B, values, A, self.indices, module.scaling[active_adapter], drop_share)

    @property
    def packed(self) -> bool:
        """Whether the values are a parameter of their own."""
        return self.indices is not None and self.indices.numel() > 0

    @torch.no_grad()
    def fold(self, module: LoraLayer, adapter_name: str) -> None:
        """Write the values into B."""
        if self.packed:
            _fold(module.lora_B[adapter_name].weight, self.indices, getattr(module, VALUES)[adapter_name])

    @torch.no_grad()
    def read(self, module: LoraLayer, adapter_name: str) -> None:
        """Read the values from B."""
        if self.packed:
            values = getattr(module, VALUES)[adapter_name]
            values.copy_(module.lora_B[adapter_name].weight.flatten()[self.indices])

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        self.fold(module, active_adapter)
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        self.fold(module, active_adapter)
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def _fold(B: Tensor, indices: Tensor, values: Tensor) -> None:
    # Through `.data`: the same numbers again must not count as a change of a tensor that a backward pass has saved.
    B.data.view(-1).index_copy_(0, indices, values.detach())


class _SparseBranch(torch.autograd.Function):
    """
    result + scaling * dropout(x) A^T B^T, written into `result`.

    For the backward pass it keeps x A^T (rank wide) and one byte an entry of x where there is dropout; x itself is not
    needed, since A is frozen. B is the gradient's receiver if `values` is `None`, else `values` is.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        result: Tensor,
        B: Tensor,
        values: Tensor | None,
        A: Tensor,
        indices: Tensor | None,
        scaling: float,
        drop_share: float,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if values is not None:
                _fold(B, indices, values)
            rows, drop = x.reshape(-1, x.shape[-1]), None
            if drop_share > 0:
                drop, kept_share = _draw_dropped(rows, drop_share)
                rows = rows.masked_fill(drop, 0)
                scaling = scaling / kept_share
            h = rows @ A.to(rows.dtype).T
            ctx.save_for_backward(h, A, B, values, indices, drop)
            ctx.scaling, ctx.input_dtype, ctx.input_shape = scaling, x.dtype, x.shape
            if result.dtype == h.dtype and result.is_contiguous():
                ctx.mark_dirty(result)
                result.view(-1, result.shape[-1]).addmm_(h, B.to(h.dtype).T, alpha=scaling)
                return result
            return result + (h @ B.to(h.dtype).T).mul_(scaling).view(result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, A, B, values, indices, drop = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).to(h.dtype)
        d_x = d_B = d_values = None
        if ctx.needs_input_grad[0]:
            if values is not None:
                _fold(B, indices, values)  # FSDP gathers B anew for the backward pass
            d_x = (rows @ B.to(h.dtype)).mul_(ctx.scaling) @ A.to(h.dtype)
            if drop is not None:
                d_x.masked_fill_(drop, 0)
            d_x = d_x.view(ctx.input_shape)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            d_B = rows.T @ h
            if values is not None:
                d_values = d_B.view(-1)[indices].mul_(ctx.scaling).to(values.dtype)
                d_B = None
            else:
                d_B = d_B.mul_(ctx.scaling).to(B.dtype)
        return d_x, gradient, d_B, d_values, None, None, None, None


def _draw_dropped(rows: Tensor, drop_share: float) -> tuple[Tensor, float]:
    """
    Draw which entries of the input are dropped, four from one 64-bit random number.

    Returns:
        `tuple[Tensor, float]`: a bool tensor of the rows' shape, and the exact share that is kept: `1 - drop_share`
        rounded to a multiple of 2**-16.
    """
    threshold = round(drop_share * 65536)
    bits = torch.empty(-(-rows.numel() // 4), dtype=torch.int64, device=rows.device).random_(-(2**63), None)
    drop = bits.view(torch.int16)[: rows.numel()].view(rows.shape) < threshold - 32768
    return drop, 1 - threshold / 65536
