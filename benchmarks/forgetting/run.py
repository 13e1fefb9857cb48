"""From a cell to its figures: with the library's own trainers, as a user would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lori_trl import LoriMasks, LoriSFTConfig, LoriSFTTrainer, load_lori_adapter

from ..claims.cells import Cell
from ..claims.data import tokenizer
from ..claims.model import model_name
from ..claims.store import Figures
from .cells import BATCH, DENSE, FIRST_RATE, MAX_LENGTH, POINTS, PROTECTED_ROWS, RANK, STEPS, First, Second
from .losses import StudyRows, measure_losses

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEASURED = ("gsm8k", "safety", "text")

Folder = Callable[[Any], Path]  # cell -> where its files are


def measure(cell: Cell, rows: StudyRows, folder: Folder) -> Figures:
    """Run a cell. Its files, which other cells need, are then in its folder."""
    return _first(cell, rows, folder) if isinstance(cell, First) else _second(cell, rows, folder)


def _first(cell: First, rows: StudyRows, folder: Folder) -> Figures:
    model = AutoModelForCausalLM.from_pretrained(model_name(), dtype=torch.float32)
    before = _losses(_rounded(model), rows)
    config = SFTConfig(**_arguments(cell.seed, FIRST_RATE, folder(cell)))
    trainer = SFTTrainer(model, config, **_inputs(rows.train("safety", cell.seed)))
    trainer.train()
    merged = _rounded(trainer.model.merge_and_unload())
    merged.save_pretrained(folder(cell) / "model")
    return {"base": before, "losses": _losses(merged, rows)}


def _rounded(model: PreTrainedModel) -> PreTrainedModel:
    return model.to(torch.bfloat16)


def _start(cell: Second, folder: Folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder(First(cell.seed)) / "model", dtype=torch.bfloat16)


def _second(cell: Second, rows: StudyRows, folder: Folder) -> Figures:
    data = rows.train("gsm8k", cell.seed, replay=cell.arm == "replay")
    arguments = _arguments(cell.seed, cell.learning_rate, folder(cell))
    model = _start(cell, folder)
    if cell.arm in ("LoRA", "replay"):
        trainer = SFTTrainer(model, SFTConfig(**arguments), **_inputs(data))
    else:
        config = LoriSFTConfig(task_name="gsm8k", **arguments, **_lori(cell, rows, folder))
        trainer = LoriSFTTrainer(model, config, **_inputs(data))
    curve = Curve(rows)
    trainer.add_callback(curve)
    trainer.train()
    trainer.save_model()
    return {"curve": curve.points, "norm": _norm(trainer.model)}


def _lori(cell: Second, rows: StudyRows, folder: Folder) -> dict[str, Any]:
    """Return the fields of an arm's config."""
    fields: dict[str, Any] = {"sparsity": 0.0}
    if cell.arm in DENSE:
        fields = {"sparsity": 0.9, "mask_name_or_path": str(_mask(cell, folder))}
    if cell.arm.startswith("contrastive"):
        file = folder(cell) / "protected.jsonl"
        chosen = list(rows.train("safety", cell.seed))[:PROTECTED_ROWS]
        file.write_text("\n".join(json.dumps(row) for row in chosen), encoding="utf-8")
        fields |= {"projection_init": "contrastive", "protect": [str(file)], "protect_rows": PROTECTED_ROWS}
    return fields


def _mask(cell: Second, folder: Folder) -> Path:
    """Make a sparse arm's mask as the paper does: where the whole dense run has moved B most."""
    dense = load_lori_adapter(_start(cell, folder), folder(cell.dense))
    saliency = {name: B for name, B in dense.named_parameters() if ".lora_B." in name}
    projection = dense.lori_masks["gsm8k"].projection
    masks = LoriMasks.select(saliency, 0.9, task="gsm8k", projection=projection)
    return masks.save_pretrained(folder(cell) / "given")


class Curve(TrainerCallback):
    """Measure all losses on the way."""

    def __init__(self, rows: StudyRows):
        self.rows = rows
        self.points: dict[str, dict] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in POINTS:
            self.points[str(state.global_step)] = _losses(model, self.rows)


def _losses(model: PreTrainedModel, rows: StudyRows) -> dict[str, dict]:
    return {name: measure_losses(model, rows.encoded[name]) for name in MEASURED}


@torch.no_grad()
def _norm(model: PeftModel) -> float:
    """Return the Frobenius norm of all deltas together."""
    total = 0.0
    for module in model.modules():
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {}):
            total += module.get_delta_weight("default").double().square().sum().item()
    return total**0.5


def _inputs(data: Any) -> dict[str, Any]:
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    return {"train_dataset": data, "processing_class": tokenizer(), "peft_config": lora}


def _arguments(seed: int, rate: float, output_dir: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir), "seed": seed, "max_steps": STEPS, "max_length": MAX_LENGTH,
        "learning_rate": rate, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "per_device_train_batch_size": BATCH, "train_sampling_strategy": "sequential", "bf16": True,
        "activation_checkpointing": False, "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no",
        "report_to": "none", "logging_steps": STEPS, "disable_tqdm": True,
    }  # fmt: skip
