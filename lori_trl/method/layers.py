"""Which layers carry an adapter, and what their modules and tensors are called."""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer

# A layer's attribute with the values that are trained; a name with "lora_" in it would end up in PEFT's file.
VALUES = "sparse_values"
# Name parts that wrappers put between a module and its parent: torch.compile, FSDP1, activation checkpointing.
_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def module_path(name: str) -> str:
    """
    Reduce a module or parameter name to the module's path in the base model.

    Args:
        name (`str`):
            A name as `named_modules`, `named_parameters` or a state dict gives it, with any DDP, FSDP, compile,
            checkpoint or PEFT prefix and with or without `lora_A`/`lora_B` and an adapter name behind it.

    ```python
    >>> module_path("module.base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight")
    'model.layers.0.self_attn.q_proj'

    ```
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    return re.sub(r"\.lora_[AB](\..*)?$", "", name)


def tensor_name(path: str, part: str) -> str:
    """Return the name that PEFT's file has for a module's `lora_A` or `lora_B`."""
    return f"base_model.model.{path}.{part}.weight"


def lora_layers(model: "PeftModel", adapter_name: str) -> dict[str, "LoraLayer"]:
    """
    Find the LoRA layers of one adapter.

    Returns:
        `dict[str, LoraLayer]`: module path in the base model -> PEFT's layer, sorted by path.

    Raises:
        `ValueError`: the adapter sits on something other than linear layers (embeddings, convolutions, the fused
            parameters of mixture-of-experts blocks, whatever `target_parameters` names): LoRI masks are defined on
            `lora_B` `(out_features, rank)`.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from transformers.pytorch_utils import Conv1D

    layers, unsupported = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        linear = isinstance(module.get_base_layer(), (nn.Linear, Conv1D)) and not isinstance(module, ParamWrapper)
        if adapter_name in module.lora_A and linear:
            layers[module_path(name)] = module
        elif adapter_name in module.lora_A or adapter_name in module.lora_embedding_A:
            unsupported.append(f"{module_path(name)} ({type(module.get_base_layer()).__name__})")
    if unsupported:
        raise ValueError(
            f"The adapter targets {len(unsupported)} modules that are not linear layers: "
            f"{', '.join(unsupported[:3])}{', ...' if len(unsupported) > 3 else ''}. LoRI trains `lora_B` of "
            "linear layers. Name those in `target_modules`, e.g. `target_modules='all-linear'`, and leave "
            "`target_parameters` unset."
        )
    return dict(sorted(layers.items()))


def layer_of(path: str) -> str:
    """Return the layer's number in a module path, the first number there; -1 where there is none."""
    number = re.search(r"\.(\d+)\.", f".{path}.")
    return number.group(1) if number else "-1"


def _module_of(path: str) -> str:
    name = re.search(r"\.\d+\.(\w+)", f".{path}")
    return name.group(1) if name else path


def projection_of(path: str) -> str:
    """Return the projection's name in a module path, its last part, e.g. `q_proj`."""
    return path.rpartition(".")[2]


# What makes a pool of entries that compete with each other: module path -> the pool's name (paper section 3.5).
GRANULARITIES: dict[str, Callable[[str], str]] = {
    "model": lambda path: "model",
    "module": _module_of,
    "projection": projection_of,
    "layer": layer_of,
    "matrix": lambda path: path,
}


def pools(paths: Iterable[str], granularity: str) -> dict[str, list[str]]:
    """Group module paths into the pools within which entries compete: the pool's name -> its paths."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(GRANULARITIES[granularity](path), []).append(path)
    return groups
