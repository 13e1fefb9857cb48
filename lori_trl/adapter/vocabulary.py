"""New tokens: an adapter that was trained with more of them than its base model has."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..method.sharding import full_shape
from .folder import AdapterFolder
from .safetensors import opened


def embedding_rows(adapter: AdapterFolder, model: PreTrainedModel) -> int:
    """
    Return how many rows the embeddings must have for an adapter: those of the embeddings that it brings, or as many as
    the new tokens that it trains need; the model's own number where it says nothing of them.
    """
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    paths = [path for path, module in model.named_modules() if any(module is each for each in embeddings)]
    rows = _rows(model)
    indices = adapter.config.get("trainable_token_indices") or []
    listed = [index for each in (indices.values() if isinstance(indices, dict) else [indices]) for index in each]
    with opened(adapter.weights) as tensors:
        brought = [
            tensors.get_slice(name).get_shape()[0]
            for name in adapter.others
            if name.endswith(".weight") and any(f".{path}." in name for path in paths)
        ]
    return max(brought or [rows, *(index + 1 for index in listed)])


def check_rows(adapter: AdapterFolder, model: PreTrainedModel) -> None:
    """
    Check that a model's embeddings have the rows that an adapter needs.

    Raises:
        `ValueError`: they do not.
    """
    needed, there = embedding_rows(adapter, model), _rows(model)
    if needed != there:
        raise ValueError(
            f"`{adapter.name}` was trained with {needed} tokens, and the embeddings of `{model.name_or_path}` have "
            f"{there} rows. They must be as many. Call `model.resize_token_embeddings({needed})` first; what the new "
            "rows hold comes with the adapter."
        )


def make_room(model: PreTrainedModel, adapter: AdapterFolder) -> None:
    """Give a model's embeddings the rows that an adapter needs. What is in new ones comes with the adapter."""
    needed = embedding_rows(adapter, model)
    if needed != _rows(model):
        model.resize_token_embeddings(needed, mean_resizing=False)


@contextmanager
def room(model: PreTrainedModel, adapter: AdapterFolder) -> Iterator[None]:
    """Give a model's embeddings the rows that an adapter needs; afterwards they are what they were, bit for bit."""
    there = _rows(model)
    if embedding_rows(adapter, model) == there:
        yield
        return
    embeddings = (model.get_input_embeddings, model.get_output_embeddings)
    kept = [None if (module := get()) is None else module.weight.detach().clone() for get in embeddings]
    make_room(model, adapter)
    try:
        yield
    finally:
        model.resize_token_embeddings(there, mean_resizing=False)
        for get, weight in zip(embeddings, kept, strict=True):
            if weight is not None:
                with torch.no_grad():
                    get().weight.copy_(weight)


def _rows(model: PreTrainedModel) -> int:
    return full_shape(model.get_input_embeddings().weight)[0]
