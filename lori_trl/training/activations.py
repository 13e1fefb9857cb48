"""A from activations, for a trainer: which rows are looked at, and that every process has the same A."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational, maybe_apply_chat_template, maybe_convert_to_chatml

from ..adapter.layout import ADAPTER_WEIGHTS
from ..adapter.safetensors import opened
from ..method.contrastive import contrastive_projections
from ..method.layers import lora_layers, tensor_name
from ..method.moments import Rows
from ..method.projections import freeze_projections
from ..method.sharding import assign, full_shape, gathered
from ..recipes.data import LoriScriptArguments, load_training_data
from .config import LoriArguments

_MAX_LENGTH = 1024  # tokens of a row, where the trainer's config has no limit


def init_from_activations(
    model: PeftModel,
    adapter_name: str,
    rows: Dataset | IterableDataset,
    args: LoriArguments,
    *,
    accelerator: Accelerator,
    processing_class: Any,
    formatting_func: Callable[[dict], str] | None = None,
) -> None:
    """
    Set A by what the new task's rows and the protected ones make of the layers' inputs.

    The main process runs the rows, and the others take its A: it is the same on any number of processes.

    Args:
        model (`PeftModel`), adapter_name (`str`): the model and its fresh adapter.
        rows (`Dataset` or `IterableDataset`): the training data, as they were given.
        args ([`LoriArguments`]): `protect`, `protect_rows` and `protect_epsilon`.
        accelerator (`Accelerator`), processing_class, formatting_func: the trainer's.

    Raises:
        `ValueError`: a layer's input has fewer tokens than A has rows, or protected data are no such data.
        `FileNotFoundError`: protected data do not exist.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)

    def tokens(data: Dataset | IterableDataset, to_text: Callable[[dict], str] | None = None) -> Rows:
        return [_tokens(row, tokenizer, args, to_text) for row in spread(data, args.protect_rows)]

    protected = [row for name in args.protect or () for row in tokens(_protected_data(name, args))]
    made: dict[str, Tensor] = {}
    with gathered(model):
        if accelerator.is_main_process:
            home = next(model.parameters()).device
            moved = home.type == "cpu" != args.device.type
            if moved:
                model.to(args.device)
            made = contrastive_projections(
                model,
                adapter_name,
                rows=tokens(rows, formatting_func),
                protected=protected,
                epsilon=args.protect_epsilon,
            )
            if moved:
                model.to(home)
    for path, layer in lora_layers(model, adapter_name).items():
        weight = layer.lora_A[adapter_name].weight
        value = made[path] if path in made else torch.empty(full_shape(weight))
        assign(weight, broadcast(value.to(accelerator.device)))
    freeze_projections(model, adapter_name)


def protected_names(args: LoriArguments) -> tuple[str, ...]:
    """Return what a record says of the protected data: names on the Hub, and of files the last part."""
    return tuple(Path(name).name if _is_path(name) else name for name in args.protect or ())


def take_over_projection(model: PeftModel, adapter_name: str, folder: Path) -> None:
    """Set A to the one that a checkpoint has, bit for bit: another machine may compute other last digits."""
    with opened(folder / ADAPTER_WEIGHTS) as tensors:
        for path, layer in lora_layers(model, adapter_name).items():
            assign(layer.lora_A[adapter_name].weight, tensors.get_tensor(tensor_name(path, "lora_A")))


def spread(data: Dataset | IterableDataset, count: int) -> Iterable[dict[str, Any]]:
    """Take rows from all over the data, at equal distances; of a stream the first ones."""
    if isinstance(data, Dataset):
        count = min(count, len(data))
        return data.select([number * len(data) // count for number in range(count)])
    return islice(data, count)


def _is_path(name: str) -> bool:
    return Path(name).exists() or name.endswith((".json", ".jsonl"))


def _protected_data(name: str, args: LoriArguments) -> Dataset | IterableDataset:
    script = LoriScriptArguments()
    if _is_path(name):
        script.dataset_path = name
    else:
        script.dataset_name = name
    return load_training_data(script, _text_field(args))[script.dataset_train_split]


def _text_field(args: LoriArguments) -> str:
    return getattr(args, "dataset_text_field", "text")


def _tokens(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    args: LoriArguments,
    to_text: Callable[[dict], str] | None,
) -> list[int]:
    """Tokenize a row as it is trained on: prompt and completion, or the preferred one, or text, with EOS behind it."""
    limit = getattr(args, "max_length", None) or _MAX_LENGTH
    if "input_ids" in row:
        return list(row["input_ids"])[:limit]
    conversational = to_text is None and is_conversational(row := maybe_convert_to_chatml(row))
    row = {"text": to_text(row)} if to_text is not None else maybe_apply_chat_template(row, tokenizer)
    answer = row.get("completion") or row.get("chosen") or ""
    text = row["prompt"] + answer if "prompt" in row else answer or row.get("text") or row[_text_field(args)]
    if not conversational and (answer or "prompt" not in row) and not text.endswith(tokenizer.eos_token):
        text += tokenizer.eos_token
    return tokenizer(text, add_special_tokens=not conversational)["input_ids"][:limit]
