"""Adapters of random numbers, and what merging them must give."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lori_trl import merge_lori_adapters
from lori_trl.method.layers import module_path

SHAPES = {  # (out_features, in_features)
    "model.layers.0.mlp.up_proj": (24, 16),
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.1.self_attn.v_proj": (8, 16),
}


def write_adapter(
    folder: Path,
    seed: int = 0,
    *,
    rank: int = 4,
    alpha: float = 8,
    shapes: dict = SHAPES,
    dtype: torch.dtype = torch.float32,
    change=lambda tensors: None,
    **config,
) -> Path:
    """Write a plain LoRA adapter of random numbers."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (rows, columns) in shapes.items():
        own = config.get("rank_pattern", {}).get(path, rank)
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(own, columns, generator=draw).to(dtype)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(rows, own, generator=draw).to(dtype)
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    base = config.pop("base", "me/base")
    targets = sorted({path.rpartition(".")[2] for path in shapes})
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "base_model_name_or_path": base}
    LoraConfig(**settings | config).save_pretrained(folder)
    return folder


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Module path -> A, B in float64, and alpha / rank, read the way PEFT reads them."""
    config = LoraConfig.from_pretrained(folder)
    state = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in state:
        if ".lora_A." in name:
            path = module_path(name)
            rank = config.rank_pattern.get(path, config.r)
            alpha = config.alpha_pattern.get(path, config.lora_alpha)
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            found[path] = (state[name].double(), state[name.replace("lora_A", "lora_B")].double(), scaling)
    return found


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {path: scaling * B @ A for path, (A, B, scaling) in factors(folder).items()}


def assert_close(found: dict, expected: dict, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for path in expected:
        assert (found[path] - expected[path]).norm() <= tolerance * expected[path].norm(), path


def refuse(what: str, adapters, output_dir: Path, error=ValueError, **arguments) -> None:
    """The error says what was given, what is allowed and what to do; and nothing is written."""
    with pytest.raises(error, match=what) as raised:
        merge_lori_adapters(adapters, output_dir=output_dir, **arguments)
    assert len(str(raised.value).split(". ")) >= 3
    assert not output_dir.exists()
