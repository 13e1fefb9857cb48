"""Local data of the benchmarks, and an adapter that never heard of LoRI."""

from pathlib import Path

import pytest
from evaluation.benchmark_rows import write_data
from peft import get_peft_model
from tiny import lora_config
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Local data for every benchmark, in words that the tiny tokenizer knows."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def plain_adapter(tmp_path_factory, model_folder) -> Path:
    """A PEFT adapter that never heard of LoRI."""
    folder = tmp_path_factory.mktemp("plain") / "plain-lora"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora_config(init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(model_folder)
    model.save_pretrained(folder)
    return folder
