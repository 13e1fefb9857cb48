"""A from activations, for a trainer: which rows are looked at, and that every process has the same A."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational, maybe_apply_chat_template, maybe_convert_to_chatml

from ..adapter.layout import ADAPTER_WEIGHTS, RECORD_NAME
from ..adapter.moments_file import read_moments
from ..adapter.safetensors import opened
from ..method.contrastive import contrastive_projections
from ..method.layers import lora_layers, tensor_name
from ..method.moments import LowRank, Rows, collect_moments
from ..method.projections import freeze_projections
from ..method.sharding import assign, full_shape, gathered
from ..recipes.data import LoriScriptArguments, load_training_data
from .config import LoriArguments

logger = get_logger(__name__)

_MAX_LENGTH = 1024  # tokens of a row, where the trainer's config has no limit


class Activations:
    """
    What rows make of the layers' inputs: the new task's, and those that are to be left alone.

    The main process runs the rows, and the others take its A: it is the same on any number of processes.

    Args:
        model (`PeftModel`), adapter_name (`str`): the model and its adapter, before it is trained.
        given (`Mapping[str, Any]`): the arguments of the trainer, for the rows and their `formatting_func`.
        args ([`LoriArguments`]): `protect`, `protect_rows` and `protect_epsilon`.
        accelerator (`Accelerator`), processing_class: the trainer's.
    """

    def __init__(
        self,
        model: PeftModel,
        adapter_name: str,
        given: Mapping[str, Any],
        args: LoriArguments,
        *,
        accelerator: Accelerator,
        processing_class: Any,
    ):
        self.model, self.adapter_name, self.args, self.accelerator = model, adapter_name, args, accelerator
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.rows = self._tokens(given["train_dataset"], given.get("formatting_func"))

    def make_A(self) -> None:
        """Set A to [`Activations.directions`], and freeze it. Raises as that."""
        made = self.directions()
        for path, layer in lora_layers(self.model, self.adapter_name).items():
            assign(layer.lora_A[self.adapter_name].weight, made[path])
        freeze_projections(self.model, self.adapter_name)

    def directions(self, rank: int | None = None) -> dict[str, Tensor]:
        """
        Find the directions that the new task's rows use and protected ones do not.

        Args:
            rank (`int`, *optional*): how many; by default as many as A has rows.

        Returns:
            `dict[str, Tensor]`: module path -> rows of A `(rank, in_features)`, the same on every process.

        Raises:
            `ValueError`: a layer's input has fewer tokens than A has rows, or protected data are no such data.
            `FileNotFoundError`: protected data do not exist, or an adapter carries no moments.
        """
        names = self.args.protect or ()
        protected = [row for name in names if not _is_adapter(name) for row in self._tokens(self._data(name))]
        known = [read_moments(name) for name in names if _is_adapter(name)]
        made: dict[str, Tensor] = {}
        with self._whole_model() as main:
            if main:
                made = contrastive_projections(
                    self.model,
                    self.adapter_name,
                    rows=self.rows,
                    protected=protected,
                    known=known,
                    epsilon=self.args.protect_epsilon,
                    rank=rank,
                )
        for path, layer in lora_layers(self.model, self.adapter_name).items():
            rows, width = full_shape(layer.lora_A[self.adapter_name].weight)
            value = made[path] if path in made else torch.empty(rank or rows, width)
            made[path] = broadcast(value.to(self.accelerator.device))
        return made

    def moments(self) -> dict[str, LowRank] | None:
        """Return the moments that an adapter carries: module path -> those of its input; on the main process alone."""
        taken: dict[str, LowRank] = {}
        with self._whole_model() as main:
            if not main:
                return None
            for by_path in collect_moments(self.model, lora_layers(self.model, self.adapter_name), [self.rows]):
                shared: dict[int, LowRank] = {}
                for path, moments in by_path.items():
                    if id(moments) not in shared:
                        shared[id(moments)] = moments[0].compress()
                    taken[path] = shared[id(moments)]
        size = sum(2 * each.factor.numel() for each in {id(each): each for each in taken.values()}.values())
        logger.info(f"`save_moments=True`: the adapter carries {size / 1e6:.1f} MB of moments.")
        return taken

    @contextmanager
    def _whole_model(self) -> Iterator[bool]:
        """Hold the whole model where it can run; yields whether this process is the one that runs it."""
        with gathered(self.model):
            main, home = self.accelerator.is_main_process, next(self.model.parameters()).device
            moved = main and home.type == "cpu" != self.args.device.type
            if moved:
                self.model.to(self.args.device)
            yield main
            if moved:
                self.model.to(home)

    def _data(self, name: str) -> Dataset | IterableDataset:
        script = LoriScriptArguments()
        if _is_path(name):
            script.dataset_path = name
        else:
            script.dataset_name = name
        return load_training_data(script, _text_field(self.args))[script.dataset_train_split]

    def _tokens(self, data: Dataset | IterableDataset, to_text: Callable[[dict], str] | None = None) -> Rows:
        return [_tokens(row, self.tokenizer, self.args, to_text) for row in spread(data, self.args.protect_rows)]


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


def _is_adapter(name: str) -> bool:
    return Path(name, RECORD_NAME).is_file()


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
