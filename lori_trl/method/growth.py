"""More rank for an adapter: new rows of A and columns of B behind those that are there, whose delta stays the same."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .layers import lora_layers

if TYPE_CHECKING:
    from peft import PeftModel


def alpha_for(scaling: float, rank: int, *, use_rslora: bool = False) -> int | float | None:
    """
    Return the `lora_alpha` with which an adapter of another rank has a scaling, to the last bit.

    Args:
        scaling (`float`): alpha / rank, or alpha / sqrt(rank) with rsLoRA, as PEFT computes it.
        rank (`int`): the other rank.
        use_rslora (`bool`, *optional*, defaults to `False`): whether that has the square root.

    Returns:
        `int`, `float` or `None`: whole where that will do; `None` where no float64 gives this scaling.

    ```python
    >>> alpha_for(64 / 32, 48)
    96

    ```
    """
    divisor = math.sqrt(rank) if use_rslora else rank
    near = scaling * divisor
    for alpha in (round(near), near, math.nextafter(near, 0), math.nextafter(near, math.inf)):
        if alpha > 0 and alpha / divisor == scaling:
            return alpha
    return None


@torch.no_grad()
def grow_layers(model: "PeftModel", adapter_name: str, rows: Mapping[str, Tensor], alpha: float) -> None:
    """
    Put more rows behind every A of an adapter, and columns of zeros behind every B.

    Args:
        model (`PeftModel`): the model. Its adapter's config is replaced, and not changed.
        adapter_name (`str`): the adapter, of one rank in all modules.
        rows (`Mapping[str, Tensor]`): module path -> the new rows of A `(more_rank, in_features)`.
        alpha (`float`): that keeps the scaling; see [`alpha_for`].
    """
    for path, layer in lora_layers(model, adapter_name).items():
        lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        A, B = lora_A.weight, lora_B.weight  # (rank, in), (out, rank)
        new_A, new_B = rows[path].to(A), B.new_zeros(len(B), len(rows[path]))
        lora_A.weight = nn.Parameter(torch.cat([A, new_A]), requires_grad=False)
        lora_B.weight = nn.Parameter(torch.cat([B, new_B], dim=1), requires_grad=B.requires_grad)
        rank = lora_A.out_features = lora_B.in_features = len(lora_A.weight)
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
    config = copy.copy(model.peft_config[adapter_name])
    config.r, config.lora_alpha = rank, alpha
    model.peft_config[adapter_name] = config


def widened(masks: Mapping[str, Tensor], rank: int, start: int = 0) -> dict[str, Tensor]:
    """
    Return masks of some of B's columns as masks of all of them.

    Args:
        masks (`Mapping[str, Tensor]`): module path -> bool tensor `(out_features, columns)`.
        rank (`int`): all columns.
        start (`int`, *optional*, defaults to 0): where these begin.
    """
    return {
        path: nn.functional.pad(mask, (start, rank - start - mask.shape[1]), value=False)
        for path, mask in masks.items()
    }


def columns_of(tensors: Mapping[str, Tensor], columns: Sequence[int] | None) -> dict[str, Tensor]:
    """Return some columns of B, or of what is shaped like it: from the first number to below the second, or all."""
    return {path: tensor if columns is None else tensor[:, slice(*columns)] for path, tensor in tensors.items()}
