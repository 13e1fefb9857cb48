"""The loss on held-out completions."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..recipes.data import rows_of_files
from ..recipes.data_files import split_files
from ..recipes.raw_rows import RowFault
from ..training.base_model import precision
from .processes import share_out
from .results import Result, rows_hash, versions

_COMPLETED = "a prompt and a completion, messages with an answer of the assistant, or text"


@dataclass(frozen=True)
class CompletionLoss:
    """The loss on held-out completions."""

    loss: float  # mean negative log-likelihood of a completion token, in nats
    tokens: int  # how many tokens that is the mean of
    stderr: float  # standard error of the loss, rows taken as drawn at random; in nats


@torch.no_grad()
def completion_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> CompletionLoss:
    """
    Measure the loss on completions: total negative log-likelihood over the number of tokens, of all rows together.

    Args:
        model (`PreTrainedModel`): any causal model, with or without adapters.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        rows (`Iterable[Mapping[str, Any]]`):
            TRL's rows. Of `prompt` and `completion`, the completion counts; of `messages`, each answer of the
            assistant is a completion of what was said before it; of `text`, all of it counts. They are tokenized as
            `SFTTrainer` does it, plain text with the EOS token at its end.
        batch_size (`int`, *optional*, defaults to `8`): rows a forward pass.
        max_length (`int`, *optional*):
            Cut longer rows to so many tokens, as `SFTConfig.max_length` does; rows without a completion token left
            do not count. By default nothing is cut.

    Raises:
        `ValueError`: there are no rows, a row has nothing that is completed, or no completion token is left.

    Source: the mean differs from `Trainer.evaluate()`, which averages the means of batches.
    """
    pairs = [each for number, row in enumerate(rows) for each in _completions(row, number, "rows")]
    encoded = sorted(
        (_tokenize_completion(tokenizer, each) for each in pairs), key=lambda pair: len(pair[0]), reverse=True
    )
    if not encoded:
        raise ValueError("`rows` has no rows. At least one with `prompt` and `completion` is needed. Pass other data.")
    if max_length is not None:
        encoded = [(ids[:max_length], start) for ids, start in encoded if start < max_length]
    batches = [encoded[first : first + batch_size] for first in range(0, len(encoded), batch_size)]
    was_training = model.training
    model.eval()
    try:
        measured = share_out(lambda number: _row_losses(model, batches[number]), len(batches), "completion loss")
    finally:
        model.train(was_training)
    losses = [loss for of_rows, _ in measured for loss in of_rows]
    counts = [count for _, of_rows in measured for count in of_rows]
    tokens = sum(counts)
    if tokens == 0:
        raise ValueError(
            f"`max_length={max_length}` leaves no completion token in any row. A row needs room for its prompt and "
            "more. Pass a larger one."
        )
    mean = math.fsum(losses) / tokens
    return CompletionLoss(mean, tokens, _ratio_stderr(losses, counts, mean))


def measure_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    rows: Dataset,
    batch_size: int,
    name: str | None = None,
) -> Result:
    """Return [`completion_loss`] as a result, under a name, by default that of [`name_of_rows`]."""
    measured = completion_loss(model, tokenizer, rows, batch_size=batch_size)
    return Result(
        task=name or name_of_rows(path),
        metric="loss",
        value=measured.loss,
        n=measured.tokens,
        stderr=None if math.isnan(measured.stderr) else measured.stderr,
        data={"source": Path(path).name, "rows": len(rows), "sha256": rows_hash(rows)},
        settings={"batch_size": batch_size, **precision(model), "versions": versions()},
    )


def name_of_rows(path: str) -> str:
    """Name held-out rows after their file, or after its folder for a split."""
    file = Path(path)
    return file.resolve().parent.name if file.stem in ("train", "test", "validation") else file.stem


def held_out_rows(path: str, limit: int | None = None) -> Dataset:
    """
    Read rows to measure the loss on, in any form that training takes.

    Args:
        path (`str`): a file of rows, or a folder with a split `test`.
        limit (`int`, *optional*): take the first so many.

    Raises:
        `ValueError`: there are no rows, the folder has none to test on, or a row has nothing that is completed.
        `FileNotFoundError`: `path` does not exist.
    """
    splits = split_files(path)
    files = splits.get("test") if Path(path).is_dir() else splits["train"]
    if files is None:
        raise ValueError(
            f"`--dataset_path {path}` has {', '.join(splits)}, and no test. The loss is measured on a file, or on the "
            "test split of a folder. Pass the file."
        )
    rows = rows_of_files(files)
    for number, row in enumerate(rows):
        _completions(row, number, files[0].name)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _completions(row: Mapping[str, Any], number: int, source: str) -> list[Mapping[str, Any]]:
    """Return the prompt-completion rows of a row. Raise `ValueError` with its number where nothing is completed."""
    if {"prompt", "completion"} <= row.keys():
        return [row]
    if "text" in row:
        return [{"prompt": "", "completion": row["text"]}]
    messages = row.get("messages", [])
    answers = [place for place, each in enumerate(messages) if place and each["role"] == "assistant"]
    if not answers:
        raise RowFault(f"has {', '.join(row)} and nothing that is completed", _COMPLETED).at(number, source)
    return [{**row, "prompt": messages[:place], "completion": [messages[place]]} for place in answers]


def _tokenize_completion(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> tuple[list[int], int]:
    """Return a row's tokens and where its completion starts, as `SFTTrainer._prepare_dataset` finds them."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, list):
        tools = json.loads(tools) if isinstance(tools := row.get("tools"), str) else tools
        settings = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
        settings |= {"tokenize": True, "return_dict": True}
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **settings)["input_ids"]
        ids = tokenizer.apply_chat_template([*prompt, *completion], **settings)["input_ids"]
    else:
        if not completion.endswith(tokenizer.eos_token):
            completion += tokenizer.eos_token
        prompt_ids = tokenizer(text=prompt)["input_ids"]
        ids = tokenizer(text=prompt + completion)["input_ids"]
    return ids, len(os.path.commonprefix([prompt_ids, ids]))  # lists, too


def _row_losses(model: PreTrainedModel, batch: list[tuple[list[int], int]]) -> tuple[list[float], list[int]]:
    """Return for every row the sum of its completion's negative log-likelihoods, and of how many tokens."""
    length = max(len(ids) for ids, _ in batch)
    input_ids = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full((len(batch), length), -100)
    for row, (ids, start) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, max(start, 1) : len(ids)] = torch.tensor(ids[max(start, 1) :])  # nothing predicts the first token
    present = torch.arange(length) < torch.tensor([[len(ids)] for ids, _ in batch])
    logits = model(input_ids=input_ids.to(model.device), attention_mask=present.long().to(model.device)).logits
    labels = labels[:, 1:].to(logits.device)
    counted = labels != -100
    scored = logits[:, :-1][counted].float()
    nll = torch.zeros(labels.shape, dtype=torch.float64, device="cpu")
    nll[counted.cpu()] = torch.nn.functional.cross_entropy(scored, labels[counted], reduction="none").double().cpu()
    return nll.sum(1).tolist(), counted.sum(1).tolist()


def _ratio_stderr(sums: list[float], counts: list[int], ratio: float) -> float:
    """Standard error of `sum(sums) / sum(counts)` over independent rows (linearised)."""
    n = len(sums)
    if n < 2:
        return math.nan
    squares = math.fsum((total - ratio * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return math.sqrt(squares * n / (n - 1)) / sum(counts)
