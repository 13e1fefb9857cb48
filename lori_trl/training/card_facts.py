"""What a card says of a run, gathered while it runs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from trl import is_conversational

from ..adapter.card import hub_id
from ..adapter.record_fields import OPTIMIZER_CLASS, BaseModel, Losses, Scalar, Training, TrainingData
from ..hub.compat import httpx
from .base_model import quantization
from .optimizers import OptimizerClass, optimizer_name
from .run_settings import hyperparameters, other_settings
from .training_rows import fingerprint_rows

_OF_ADAPTERS = re.compile(r"\.(lora_|modules_to_save\.|trainable_tokens_)")
_MAX_LOSSES = 20  # rows of the card's table


class CardFacts(TrainerCallback):
    """
    Gather what a card says of a run, while it runs.

    Args:
        model (`PreTrainedModel`): the base model.
        rows (`Dataset` or `IterableDataset`): the training data as they were given.
        tags (`Sequence[str]`): the trainer's.
        given (`Mapping[str, bool | int | float | str]`): what decides the outcome and comes from no argument.

    Attributes:
        training ([`Training`]): the facts so far.
        optimizer (`tuple[type, dict]` or `None`): the `optimizer_cls_and_kwargs` that the trainer was given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Dataset | IterableDataset,
        tags: Sequence[str],
        given: Mapping[str, Scalar],
    ):
        self.given = given
        self.optimizer: OptimizerClass | None = None
        self.training = Training(
            base_model=_base_model_facts(model),
            dataset=_dataset_facts(rows),
            tags=tuple(tag for tag in tags if tag not in ("trl", "lori")),
        )

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        training = self.of_phase(args)
        settings = {**(training.settings or {}), OPTIMIZER_CLASS: optimizer_name(optimizer)}
        self.training = replace(training, settings=settings, device=_device_name(args.device))
        base_model = self.training.base_model
        base_id = base_model.id if base_model is not None else None
        if base_id is not None and self.training.license is None and state.is_world_process_zero:
            self.training = replace(self.training, license=_license_of(base_id))

    def on_log(self, args, state, control, logs, **kwargs):
        if any(name.startswith("calibration_") for name in logs):
            return  # a card tells of the adaptation
        self.training = replace(
            self.training,
            steps=state.global_step,
            epochs=round(state.epoch or 0, 2),
            losses=_losses(state.log_history),
        )

    def of_phase(self, args: TrainingArguments) -> Training:
        """Return the facts with the settings of a phase."""
        return replace(
            self.training,
            hyperparameters=hyperparameters(args, self.optimizer),
            settings=dict(self.given) | other_settings(args, self.optimizer),
            world_size=args.world_size,
        )

    @property
    def rows(self) -> int | None:
        """How many rows were given; None for a stream."""
        return None if self.training.dataset is None else self.training.dataset.rows

    def name_dataset(self, dataset_name: str | None) -> None:
        """Note the data set's Hub name, as TRL's `push_to_hub(dataset_name=...)` gives it."""
        dataset = self.training.dataset
        if dataset is not None and hub_id(dataset_name) is not None:
            self.training = replace(self.training, dataset=replace(dataset, id=dataset_name))


def _base_model_facts(model: PreTrainedModel) -> BaseModel:
    name = model.config.name_or_path
    return BaseModel(
        id=hub_id(name),
        name=Path(name).name or None,  # of a local folder, not where it lies
        architecture=type(model).__name__,
        parameters=sum(_entries(weight) for path, weight in model.named_parameters() if not _OF_ADAPTERS.search(path)),
        quantization=quantization(model),
    )


def _entries(weight: nn.Parameter) -> int:
    """Count a weight's entries, of which bitsandbytes packs two into a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()


def _dataset_facts(rows: Dataset | IterableDataset) -> TrainingData:
    sources = [re.match(r"hf://datasets/([^@]+)@", url) for url in rows.info.download_checksums or {}]
    known = isinstance(rows, Dataset)
    return TrainingData(
        id=next((source[1] for source in sources if source), None),
        rows=len(rows) if known else None,
        conversational=is_conversational(rows[0]) if known and len(rows) else False,
        fingerprint=fingerprint_rows(rows),
    )


def _license_of(base_model: str) -> str | None:
    """Ask the Hub for the base model's licence; None where it does not answer."""
    try:
        card_data = HfApi().model_info(base_model, timeout=5).card_data
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, ValueError):
        return None
    return card_data.license if card_data is not None and isinstance(card_data.license, str) else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _losses(log_history: Sequence[Mapping[str, Any]]) -> tuple[Losses, ...]:
    """Take the losses from the Trainer's log: those of every step, thinned to a short table."""
    rows: dict[int, Losses] = {}
    for entry in log_history:
        for name in ("loss", "eval_loss"):
            if name in entry:
                row = rows.get(entry["step"], Losses(entry["step"], None, None))
                rows[row.step] = replace(row, **{name: round(entry[name], 4)})
    losses = [rows[step] for step in sorted(rows)]
    if len(losses) > _MAX_LOSSES:
        losses = [losses[round(i * (len(losses) - 1) / (_MAX_LOSSES - 1))] for i in range(_MAX_LOSSES)]
    return tuple(losses)
