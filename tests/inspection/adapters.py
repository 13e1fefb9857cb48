"""Adapters of random numbers with masks, and their deltas computed densely."""

import json
from pathlib import Path

import torch
from files_by_hand import write_record
from safetensors.torch import save_file
from torch import Tensor

from lori_trl import LoriMasks
from lori_trl.method.projections import Projection, draw_projection, fingerprint

SHAPES = {"self_attn.q_proj": (24, 16), "self_attn.v_proj": (12, 16), "mlp.down_proj": (16, 40)}
RANK, ALPHA = 4, 12
HOSTILE = '<script>alert(1)<$x^2$ & "q">'


def matrices(seed: int, layers: int = 3, rank: int = RANK, shapes=SHAPES) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> A `(rank, in_features)`, B `(out_features, rank)`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (draw_projection(path, rank, columns, seed=seed), torch.randn(rows, rank, generator=generator))
        for layer in range(layers)
        for name, (rows, columns) in shapes.items()
        for path in [f"model.layers.{layer}.{name}"]
    }


def random_masks(task: str, weights: dict, density: float, seed: int) -> LoriMasks:
    generator = torch.Generator().manual_seed(seed)
    entries = {path: torch.rand(B.shape, generator=generator) < density for path, (_, B) in weights.items()}
    return LoriMasks(entries, task=task, sparsity=1 - density)


def write(folder: Path, weights: dict, masks: list[LoriMasks] | None = None, **config) -> Path:
    """Write a plain PEFT adapter; with masks, a LoRI adapter whose B is 0 outside them."""
    folder.mkdir(parents=True)
    if masks:
        union = {path: torch.stack([mask[path] for mask in masks]).any(0) for path in weights}
        weights = {path: (A, B * union[path]) for path, (A, B) in weights.items()}
    state = {f"base_model.model.{path}.lora_A.weight": A for path, (A, _) in weights.items()}
    state |= {f"base_model.model.{path}.lora_B.weight": B for path, (_, B) in weights.items()}
    save_file(state, folder / "adapter_model.safetensors")
    rank = next(iter(weights.values()))[0].shape[0]
    peft = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "base_model_name_or_path": "/models/base"}
    (folder / "adapter_config.json").write_text(json.dumps(peft | config))
    if masks:
        for mask in masks:
            mask.save_pretrained(folder)
        A = {path: pair[0] for path, pair in weights.items()}
        write_record(folder, masks, Projection(None, None, fingerprint(A)))
    return folder


def dense(weights: dict, scaling: float = ALPHA / RANK, masks: LoriMasks | None = None) -> dict[str, Tensor]:
    return {
        path: scaling * (B * (1 if masks is None else masks[path])).double() @ A.double()
        for path, (A, B) in weights.items()
    }


def cosine(first: dict[str, Tensor], second: dict[str, Tensor], layer: int | None = None) -> float:
    here = [path for path in first if layer is None or f"layers.{layer}." in path]
    one, two = (torch.cat([delta[path].flatten() for path in here]) for delta in (first, second))
    return float(one @ two / one.norm() / two.norm())
