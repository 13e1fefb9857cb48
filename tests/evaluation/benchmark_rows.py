"""Rows and figures that several tests score or write."""

import json
from pathlib import Path

from lori_trl.evaluation import (
    Result,
)
from lori_trl.recipes.tasks import TASKS

PROBLEMS = [
    {
        "prompt": 'def add(a, b):\n    """ Add two numbers.\n    >>> add(1, 2)\n    3\n    """',
        "completion": "\n    return a + b",
        "wrong": "\n    return a - b",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
        "entry_point": "add",
    },
    {
        "prompt": 'from typing import List\n\n\ndef evens(numbers: List[int]):\n    """ Keep the even. """',
        "completion": "\n    return [number for number in numbers if number % 2 == 0]",
        "wrong": "\n    return numbers",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2, 4]) == [2, 4]\n",
        "entry_point": "evens",
    },
]
NLU = [benchmark.name for benchmark in TASKS["nlu"].benchmarks]


def write_rows(file: Path, rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def figure(task="gsm8k", metric="accuracy_strict", value=0.5, **more) -> Result:
    return Result(task, metric, value, 10, **more)


def write_data(folder: Path) -> Path:
    """Write local data for every benchmark, in words that the tiny tokenizer knows."""
    nlu = [
        {"prompt": f"w{i} w{i + 1} w{i + 2}", "choices": ["w7", "w80", "w9"], "answer": ["w7", "w80", "w7"][i % 3]}
        for i in range(7)
    ]
    for name in NLU:
        write_rows(folder / name / "test.jsonl", [{**row, "completion": row["answer"]} for row in nlu])
    prompts = [{"prompt": f"w{i} w{2 * i}", "completion": f" w{i} w3"} for i in range(1, 7)]
    write_rows(folder / "gsm8k" / "test.jsonl", [{**row, "answer": str(i)} for i, row in enumerate(prompts)])
    write_rows(folder / "safety" / "test.jsonl", prompts)
    write_rows(folder / "code" / "humaneval.jsonl", PROBLEMS)
    return folder
