"""The rows, and the losses on them."""

import random
from functools import cached_property
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..claims.data import Row, Rows, tokenizer
from .cells import BATCH, REPLAY, STEPS, TEST_ROWS

EVAL_BATCH = 8


class StudyRows:
    """
    The rows of this study.

    Args:
        rows ([`Rows`]): safety's and GSM8K's, those of fewer than 160 tokens.
    """

    def __init__(self, rows: Rows):
        self.rows = rows

    def train(self, task: str, seed: int, replay: bool = False) -> Dataset:
        """Draw the rows of a run in the order in which they are trained on: batches of like lengths."""
        chance = random.Random(f"forgetting/{task}/{seed}")
        drawn = chance.sample(self.rows.short(task, "train"), STEPS * BATCH)
        if replay:
            again = round(REPLAY * len(drawn))
            drawn[:again] = chance.sample(list(self.train("safety", seed)), again)
        drawn.sort(key=lambda row: len(_ids(row["prompt"] + row["completion"])))
        batches = [drawn[first : first + BATCH] for first in range(0, len(drawn), BATCH)]
        return Dataset.from_list([row for batch in chance.sample(batches, len(batches)) for row in batch])

    @cached_property
    def encoded(self) -> dict[str, list[tuple[list[int], int]]]:
        """The rows that losses are measured on: name -> token ids, and where what counts begins."""
        kinds = {task: self.rows.short(task, "test")[: TEST_ROWS[task]] for task in ("gsm8k", "safety")}
        encoded = {name: [_encode(row) for row in rows] for name, rows in kinds.items()}
        return encoded | {"text": [(ids, 1) for ids in _passages(TEST_ROWS["text"])]}


def _ids(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def _encode(row: Row) -> tuple[list[int], int]:
    ids = _ids(row["prompt"] + row["completion"] + tokenizer().eos_token)
    return ids, len(_ids(row["prompt"]))


def _passages(count: int) -> list[list[int]]:
    """General text: the beginnings of Python's language reference, which comes with Python."""
    passages = [_ids(topics[name])[:128] for name in sorted(topics)]
    return [ids for ids in passages if len(ids) == 128][:count]


@torch.no_grad()
def measure_losses(model: PreTrainedModel, rows: list[tuple[list[int], int]]) -> dict:
    """
    Measure the loss: nats a token that counts, over all rows together, and the nats and tokens of each row.

    The model's body runs under bfloat16, as in training; the loss is taken of logits in float32.
    """
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
    nats, counts = [0.0] * len(rows), [len(ids) - start for ids, start in rows]
    training = model.training
    model.eval()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for first in range(0, len(rows), EVAL_BATCH):
        batch = order[first : first + EVAL_BATCH]
        length = max(len(rows[number][0]) for number in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, number in enumerate(batch):
            ids[place, : len(rows[number][0])] = torch.tensor(rows[number][0])
            mask[place, : len(rows[number][0])] = 1
        with torch.autocast("cpu", torch.bfloat16):
            hidden = base.model(input_ids=ids, attention_mask=mask).last_hidden_state
            for place, number in enumerate(batch):
                own, start = rows[number]
                logits = base.lm_head(hidden[place, start - 1 : len(own) - 1]).float()
                target = torch.tensor(own[start:])
                nats[number] = torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
    model.train(training)
    return {"loss": sum(nats) / sum(counts), "nats": [round(value, 4) for value in nats], "tokens": counts}
