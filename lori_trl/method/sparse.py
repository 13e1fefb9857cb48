"""Training B on a mask, by two backends.

`hook` is the paper's way and the yardstick: B stays dense, and hooks on it zero its gradient outside the mask.

`packed` makes the trained entries of a matrix one 1-D parameter, the values, and freezes B itself. Gradients,
optimizer state and the printed parameter count are then truly a tenth of B's. An optimizer that treats every entry by
itself (SGD, Adam, Lion, ...) gives the same values as with `hook`. One whose update depends on a parameter's shape
does not: Adafactor estimates a matrix's second moments from its rows and columns, which a vector does not have.

The values are folded into B before B is read, so that whoever looks at B (saving, merging, another adapter) sees what
was trained; after an optimizer's step, [`fold_values`] does it.

Masks and positions are buffers of the layer, so that they follow it to any device; they are in no state dict.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.lora.variants import _register_frozen_peft_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as module_hooks
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from .branch import Branch, LayerWithBranch, Unpacked, fold_into
from .layers import VALUES, lora_layers
from .sharding import flat_range

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
    with ExitStack() as undo:
        for path, layer in lora_layers(model, adapter_name).items():
            if not layer.lora_B[adapter_name].weight.requires_grad:
                continue  # frozen by hand, and so it stays
            mask = None if masks is None or masks[path].all() else masks[path]
            if backend == "packed":
                undo.callback(_pack(layer, adapter_name, mask))
            elif mask is not None:
                undo.callback(_zero_gradient_outside(layer, adapter_name, mask))
        undo.callback(_keep_to_this_rank(model))
        yield


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
    ours = [name for name, _ in model.named_buffers() if name.rpartition(".")[2] in (INDICES, MASK)]
    others = vars(model).get("_ddp_params_and_buffers_to_ignore")  # what somebody else wants DDP to leave alone
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*(others or ()), *ours])

    def restore() -> None:
        del model._ddp_params_and_buffers_to_ignore
        if others is not None:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)

    return restore


def _zero_gradient_outside(layer: LoraLayer, adapter_name: str, mask: Tensor) -> Callable[[], None]:
    """Zero the gradient of a layer's B outside a mask. Returns the function that ends it."""
    weight = layer.lora_B[adapter_name].weight
    # A buffer, which `model.to(device)` moves; the hook below reads it anew each time.
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
        return lambda: layer.lora_variant.pop(adapter_name, None)  # nothing is there if the adapter was deleted

    # `set_adapter()` thaws all weights of the adapter that it activates, but for those in PEFT's registry.
    frozen_before = layer.frozen_peft_weight_names
    _register_frozen_peft_weight(layer, adapter_name, "lora_B")
    indices = mask.flatten().nonzero().flatten().to(weight.device)
    variant = layer.lora_variant[adapter_name] = SparseLora(packed=indices.numel() > 0)
    variant.idle = not variant.packed and not weight.any()
    layer.register_buffer(INDICES, indices, persistent=False)
    setattr(layer, VALUES, nn.ParameterDict())
    if variant.packed:
        # float32 whatever B's type. In bfloat16 a step of less than 0.4 % of a value would be lost.
        values = weight.detach().flatten()[indices].to(torch.promote_types(weight.dtype, torch.float32))
        getattr(layer, VALUES)[adapter_name] = nn.Parameter(values)
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
        if self.packed:
            B = Unpacked.apply(*self._values(module, active_adapter), B)
        dropout = module.lora_dropout[active_adapter]
        drop_share = dropout.p if isinstance(dropout, nn.Dropout) and module.training else 0.0
        device, base, scaling = x.device.type, module.get_base_layer(), module.scaling[active_adapter]
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast:
            x = x.to(torch.get_autocast_dtype(device))
        # Under autocast the base layer computes with a copy of W in another type, which is not at hand here.
        fused = not autocast and x.requires_grad and x.dtype == base.weight.dtype and result.is_contiguous()
        if fused and len(module.active_adapters) == 1 and _is_untouched(base) and _is_frozen_linear(base):
            return LayerWithBranch.apply(x, result.detach(), base.weight, A, B, scaling, drop_share)
        # The types are chosen by now; autocast would choose them once more for every product.
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            return Branch.apply(result, x, A, B, scaling, drop_share, _is_untouched(base))

    def _values(self, module: LoraLayer, adapter_name: str) -> tuple[Any, Tensor]:
        return getattr(module, VALUES)[adapter_name], getattr(module, INDICES)

    @torch.no_grad()
    def fold(self, module: LoraLayer, adapter_name: str) -> None:
        """Write the values into B. Where FSDP has sharded them, every rank must call this."""
        if not self.packed:
            return
        B, (values, indices) = module.lora_B[adapter_name].weight, self._values(module, adapter_name)
        if isinstance(B, DTensor):
            # B is sharded by rows and the values evenly: most of a rank's values belong into other ranks' rows.
            start, end = flat_range(B)
            mine = (indices >= start) & (indices < end)
            B, indices, values = B.to_local(), indices[mine] - start, values.full_tensor()[mine]
        fold_into(B, indices, values)

    @torch.no_grad()
    def read(self, module: LoraLayer, adapter_name: str) -> None:
        """Read the values from B. Where FSDP has sharded them, every rank must call this."""
        B = module.lora_B[adapter_name].weight
        if not self.packed:
            self.idle = self.idle and not B.any()
            return
        values, indices = self._values(module, adapter_name)
        if isinstance(B, DTensor):
            # The other way round: this rank's values may lie in any rank's rows.
            start, end = flat_range(values)
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


def _is_untouched(base: nn.Module) -> bool:
    """Say whether a base layer's output is its own x W^T + b, which nobody else has seen or needs to keep."""
    # A class of somebody's own may end in an activation that keeps its output for the backward pass.
    return type(base) in (nn.Linear, Conv1D) and "forward" not in vars(base) and not _has_hooks(base)


def _is_frozen_linear(base: nn.Module) -> bool:
    """Say whether a base layer's gradient for x is g W, with nothing to train and the whole of W here."""
    trained = any(parameter.requires_grad for parameter in base.parameters())
    return type(base) is nn.Linear and not trained and not isinstance(base.weight, DTensor)


def _has_hooks(module: nn.Module) -> bool:
    """Say whether somebody looks at what goes through a module, forward or backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_hooks._has_any_global_hook()
    )
