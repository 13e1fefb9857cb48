"""What is kept in memory and on disk: mask files, gradients and optimizer state, a checkpoint's optimizer file.

    python benchmarks/storage.py

Peers: one byte an entry; PEFT LoRA with AdamW on SmolLM2-135M, r = 32, seven projections; the hook backend.
"""

import tempfile
import time
from pathlib import Path

import torch
from common import report, summary
from peft import LoraConfig, get_peft_model
from quickstart import smollm2
from selection import SPARSITY, make_B
from step_time import PROJECTIONS
from transformers import AutoModelForCausalLM

from lori_trl import LoriMasks
from lori_trl.method.layers import lora_layers
from lori_trl.method.projections import init_projections
from lori_trl.method.sparse import sparse_training


def mask_files(folder: Path) -> dict:
    """Save and load the masks of 44 million entries."""
    masks = LoriMasks.select(make_B(), SPARSITY, task="llama3")
    saving, loading = [], []
    for _ in range(9):
        start = time.perf_counter()
        file = masks.save_pretrained(folder)
        saving.append(time.perf_counter() - start)
        start = time.perf_counter()
        loaded = LoriMasks.from_pretrained(file)
        loading.append(time.perf_counter() - start)
    assert loaded == masks
    return {
        "entries": masks.numel,
        "bytes an entry": file.stat().st_size / masks.numel,
        "seconds to save": summary(saving),
        "seconds to load": summary(loading),
    }


def training_state(kind: str, file: Path) -> dict[str, int]:
    """Make one AdamW step, and count the bytes of gradients and of the optimizer's state and file."""
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=PROJECTIONS))
    masks = None
    if kind != "peft_lora":
        init_projections(model, "default", seed=0)
        shapes = {path: layer.lora_B["default"].weight.shape for path, layer in lora_layers(model, "default").items()}
        masks = LoriMasks.select({path: torch.rand(shape) for path, shape in shapes.items()}, SPARSITY)
    with sparse_training(model, "default", masks, "packed" if kind == "packed" else "hook"):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0)
        tokens = torch.arange(64).view(1, 64)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        state = [tensor for values in optimizer.state.values() for tensor in values.values() if tensor.dim() > 0]
        torch.save(optimizer.state_dict(), file)
        return {
            "trainable parameters": sum(parameter.numel() for parameter in parameters),
            "gradients and optimizer state": sum(4 * parameter.grad.numel() for parameter in parameters)
            + sum(tensor.numel() * tensor.element_size() for tensor in state),
            "optimizer file": file.stat().st_size,
        }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        masks = mask_files(Path(folder))
        kinds = ("peft_lora", "hook", "packed")
        states = {kind: training_state(kind, Path(folder) / f"{kind}.pt") for kind in kinds}
    memory, disk = "gradients and optimizer state", "optimizer file"
    results = {
        "mask file": masks,
        "bytes": states,
        "peft_lora / packed, gradients and optimizer state": states["peft_lora"][memory] / states["packed"][memory],
        "packed / hook, optimizer file": states["packed"][disk] / states["hook"][disk],
    }
    report("storage", results)


if __name__ == "__main__":
    main()
