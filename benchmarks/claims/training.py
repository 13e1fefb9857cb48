"""Training the adapters and taking the masks: with the library's own trainers, as a user would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lori_trl import LoriMasks, LoriSFTConfig, LoriSFTTrainer, load_lori_adapter
from lori_trl.method.saliency import GradientAgreement

from .cells import BATCH, MAX_LENGTH, RANK, SALIENCIES, SNAPSHOTS, STEPS, Gradients, Train
from .data import Rows, tokenizer
from .model import model_name

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPARSITY = 0.9  # of the masks that are kept on the way

Folder = Callable[[Any], Path]  # cell -> where its files are


def base_model() -> PreTrainedModel:
    """Load the model in float32."""
    return AutoModelForCausalLM.from_pretrained(model_name(), dtype=torch.float32)


def train(cell: Train, rows: Rows, folder: Folder) -> PreTrainedModel:
    """Train a cell's adapter, save it, and return the model with the adapter merged into its weights."""
    trainer = (lora_trainer if cell.method == "LoRA" else lori_trainer)(cell, rows, folder)
    trainer.train()
    trainer.save_model()
    return trainer.model.merge_and_unload()


def lora_trainer(cell: Train, rows: Rows, folder: Folder) -> SFTTrainer:
    """Make PEFT's and TRL's own trainer."""
    model = base_model()
    if cell.start is not None:
        model = PeftModel.from_pretrained(model, folder(cell.start), is_trainable=True)
    return SFTTrainer(model, SFTConfig(**_arguments(cell, folder)), **_inputs(cell, rows))


def lori_trainer(cell: Train, rows: Rows, folder: Folder) -> LoriSFTTrainer:
    """Make the trainer of a LoRI cell, with its mask; a dense one keeps masks on its way."""
    model = _started_model(cell, folder)
    fields: dict[str, Any] = {"sparsity": 0.0 if cell.mask is None else cell.mask.sparsity}
    if cell.disjoint:
        fields |= {"disjoint_masks": True, "calibration_learning_rate": cell.mask.rate}
    elif cell.mask is not None and cell.mask.method == "random":
        fields |= {"calibration_method": "random", "mask_granularity": cell.mask.granularity}
    elif cell.mask is not None:
        fields["mask_name_or_path"] = str(mask_file(cell, folder))
    trainer = _lori_trainer(cell, model, rows, folder, fields)
    if cell.mask is None:

        def moves(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
            B0 = trainer.run.initial_weights
            return {"train": {path: B.detach() - B0[path] for path, B in trainer.weights.items()}}

        trainer.add_callback(Snapshots(trainer, folder(cell), moves))
    return trainer


def take_gradients(cell: Gradients, rows: Rows, folder: Folder) -> None:
    """Run a cell's batches through the model at B0, and keep the masks of every saliency on the way."""
    fields = {"sparsity": 0.0, "max_grad_norm": 0.0, "max_steps": cell.batches}  # and no optimizer that moves B
    inputs = {"optimizer_cls_and_kwargs": (GradientRecorder, {})}
    trainer = _lori_trainer(cell, _started_model(cell, folder), rows, folder, fields, inputs)

    def saliencies(optimizer: GradientRecorder) -> dict[str, dict[str, Tensor]]:
        by_path = {path: optimizer.saliencies(B) for path, B in trainer.weights.items()}
        return {name: {path: kinds[name] for path, kinds in by_path.items()} for name in SALIENCIES}

    trainer.add_callback(Snapshots(trainer, folder(cell), saliencies))
    try:
        trainer.train()
    except RuntimeError as error:  # a run that moves nothing is refused at its end, and here that is what is wanted
        if "moved no entry of B" not in str(error):
            raise


def mask_file(cell: Train, folder: Folder) -> Path:
    """Return the file of a cell's mask; make it where it is not one of those kept on the way."""
    mask, own = cell.mask, folder(cell) / "given"
    if (mask.sparsity, mask.granularity) == (SPARSITY, "model"):
        return folder(cell.calibration) / "masks_on_the_way" / "masks" / f"{mask.method}-{mask.batches}.safetensors"
    if (mask.method, mask.batches) != ("train", STEPS):
        raise ValueError(f"`{mask}`: other sparsities and granularities are made of whole dense runs only.")
    dense = load_lori_adapter(base_model(), folder(cell.calibration))
    saliency = {name: B for name, B in dense.named_parameters() if ".lora_B." in name}
    projection = dense.lori_masks[cell.task].projection
    masks = LoriMasks.select(saliency, mask.sparsity, mask.granularity, task=cell.task, projection=projection)
    return masks.save_pretrained(own)


class GradientRecorder(GradientAgreement):
    """Remember what every one of `SALIENCIES` needs. Nothing is moved."""

    def add(self, state: dict[str, Tensor], gradient: Tensor) -> None:
        super().add(state, gradient)
        for name in ("mean", "square_mean", "move"):
            state.setdefault(name, torch.zeros_like(gradient))
        state["step"] = step = state.get("step", 0) + 1
        mean = state["mean"].lerp_(gradient, 0.1) / (1 - 0.9**step)
        square_mean = state["square_mean"].lerp_(gradient.square(), 0.001) / (1 - 0.999**step)
        state["move"] += mean / (square_mean.sqrt_() + 1e-8)

    def saliencies(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return all saliencies of a parameter: name -> tensor of its shape."""
        state = self.state[parameter]
        squares = state["square_sum"].sqrt()
        return {
            "agreement": self.saliency(parameter), "adam": state["move"], "gradient": state["sum"], "fisher": squares
        }  # fmt: skip


class Snapshots(TrainerCallback):
    """Keep the masks of some saliencies after some steps."""

    def __init__(self, trainer: LoriSFTTrainer, folder: Path, saliencies: Callable):
        self.trainer, self.folder, self.saliencies = trainer, folder / "masks_on_the_way", saliencies

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step not in SNAPSHOTS:
            return
        for name, saliency in self.saliencies(optimizer.optimizer).items():
            task = f"{name}-{state.global_step}"
            masks = LoriMasks.select(saliency, SPARSITY, task=task, projection=self.trainer.projection)
            masks.save_pretrained(self.folder)


def _started_model(cell: Train | Gradients, folder: Folder) -> nn.Module:
    model = base_model()
    return model if cell.start is None else load_lori_adapter(model, folder(cell.start), is_trainable=True)


def _lori_trainer(cell, model, rows: Rows, folder: Folder, fields: dict, inputs: dict | None = None):
    if cell.shared_A:
        fields["projection_seed"] = cell.seed
    config = LoriSFTConfig(task_name=cell.task, **_arguments(cell, folder) | fields)
    return LoriSFTTrainer(model, config, **_inputs(cell, rows), **(inputs or {}))


def _inputs(cell: Train | Gradients, rows: Rows) -> dict[str, Any]:
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS) if cell.start is None else None
    return {
        "train_dataset": rows.train(cell.task, cell.seed),
        "processing_class": tokenizer(),
        "peft_config": lora,
    }


def _arguments(cell: Train | Gradients, folder: Folder) -> dict[str, Any]:
    return {
        "output_dir": str(folder(cell)), "seed": cell.seed, "max_steps": STEPS, "max_length": MAX_LENGTH,
        "learning_rate": getattr(cell, "rate", 1.0), "lr_scheduler_type": "constant", "warmup_steps": 0,
        "weight_decay": 0.0, "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential", "bf16": False, "activation_checkpointing": False,
        "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no", "report_to": "none",
        "logging_steps": STEPS, "disable_tqdm": True,
    }  # fmt: skip
