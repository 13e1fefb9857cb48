"""Local data of the benchmarks, and an adapter that never heard of LoRI."""

from pathlib import Path

import pytest
from evaluation.benchmark_rows import NLU, PROBLEMS, write_rows
from peft import get_peft_model
from tiny import lora_config
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Local data for every benchmark, in words that the tiny tokenizer knows."""
    folder = tmp_path_factory.mktemp("data")
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


@pytest.fixture(scope="session")
def plain_adapter(tmp_path_factory, model_folder) -> Path:
    """A PEFT adapter that never heard of LoRI."""
    folder = tmp_path_factory.mktemp("plain") / "plain-lora"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora_config(init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(model_folder)
    model.save_pretrained(folder)
    return folder
