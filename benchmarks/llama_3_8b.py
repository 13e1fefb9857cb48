"""Llama-3-8B's shapes, and LoRA adapters of them in random numbers."""

from pathlib import Path

import torch
from peft import LoraConfig
from transformers import LlamaConfig

from lori_trl.adapter.safetensors import SafetensorsWriter

RANK, LAYERS = 32, 32
SHAPES = {  # (out_features, in_features)
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
FILE = "adapter_model.safetensors"


def config(layers: int = LAYERS, **more) -> LlamaConfig:
    """Return its configuration, with its first layers alone where fewer are asked for."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        **more,
    )


def write_adapter(folder: Path, base: str, seed: int, layers: int = LAYERS) -> None:
    """Write a plain LoRA adapter of random numbers on all linear layers."""
    shapes = {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            shapes |= {f"{path}.lora_A.weight": (RANK, columns), f"{path}.lora_B.weight": (rows, RANK)}
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(folder / FILE, shapes, {"format": "pt"}) as writer:
        for name, shape in shapes.items():
            writer.write(name, 0.01 * torch.randn(shape, generator=draw))
    targets = [name.rpartition(".")[2] for name in SHAPES]
    LoraConfig(r=RANK, lora_alpha=64, target_modules=targets, base_model_name_or_path=base).save_pretrained(folder)
