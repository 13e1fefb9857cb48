"""The rows: short ones, so that a cell takes minutes. They come from a folder that is not part of the repository."""

import json
import random
from functools import cache
from itertools import chain
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lori_trl.recipes.raw_rows import alpaca_prompt

from .cells import BATCH, DEV_ROWS, MAX_LENGTH, STEPS, TEST_ROWS
from .model import model_name
from .setting import QUICKSTART

Row = dict[str, str]


class Rows:
    """
    The rows of a task: `train` (drawn by the seed), `dev` and `test` (always the same).

    Args:
        folder (`Path`):
            With safety/, gsm8k/ and code/, each with train.jsonl and test.jsonl in TRL's
            prompt-completion form.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def train(self, task: str, seed: int) -> Dataset:
        """Draw the rows of a run, without those of the dev split, in the order in which they are trained on."""
        chance = random.Random(f"{task}/{seed}")
        drawn = sorted(chance.sample(self.short(task, "train")[DEV_ROWS:], STEPS * BATCH), key=_length)
        batches = [drawn[first : first + BATCH] for first in range(0, len(drawn), BATCH)]  # of like lengths
        return Dataset.from_list(list(chain.from_iterable(chance.sample(batches, len(batches)))))

    def dev(self, task: str) -> list[Row]:
        """Return the rows that learning rates and weights are chosen on."""
        return self.short(task, "train")[:DEV_ROWS]

    def test(self, task: str) -> list[Row]:
        """Return the rows that results are measured on."""
        return self.short(task, "test")[:TEST_ROWS]

    def harmful(self) -> list[Row]:
        """Return harmful requests that no run is trained on."""
        return self._file(self.folder / "safety" / "test.jsonl")

    @cache  # noqa: B019
    def short(self, task: str, split: str) -> list[Row]:
        rows = self._file(self.folder / task / f"{split}.jsonl")
        if task == "safety":
            return _in_turn(rows, self._harmless(split))
        return rows

    def _harmless(self, split: str) -> list[Row]:
        """Harmless instructions that are answered: everyday questions, and the code rows that no code run sees."""
        questions = [
            {"prompt": alpaca_prompt(_question(row["prompt"])), "completion": row["completion"].strip()}
            for row in self._file(QUICKSTART / f"{split}.jsonl")
        ]
        code = self._file(self.folder / "code" / "train.jsonl")[::-1]
        return _in_turn(questions, code[:300] if split == "train" else code[300:400])

    def _file(self, file: Path) -> list[Row]:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").strip("\n").split("\n")]
        rows = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
        lengths = tokenizer()([row["prompt"] + row["completion"] for row in rows])["input_ids"]
        return [row for row, ids in zip(rows, lengths, strict=True) if len(ids) < MAX_LENGTH]


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the model's tokenizer."""
    return AutoTokenizer.from_pretrained(model_name())


def _length(row: Row) -> int:
    return len(tokenizer()(row["prompt"] + row["completion"])["input_ids"])


def _in_turn(*sets: list[Row]) -> list[Row]:
    return list(chain.from_iterable(zip(*sets, strict=False)))


def _question(prompt: str) -> str:
    return prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
