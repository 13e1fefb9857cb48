"""Adapters that several tests merge."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_llama, make_trainer, trained_adapter


@pytest.fixture(scope="session")
def peft_adapters(tmp_path_factory) -> list[Path]:
    """Three LoRA adapters of the tiny model with different scalings, one of them on fewer modules."""
    folders = []
    for seed, alpha, targets in ((1, 8, "all-linear"), (2, 6, ["q_proj", "v_proj", "up_proj"]), (3, 8, "all-linear")):
        model = get_peft_model(make_llama(), LoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_(0, 0.1)
        folders.append(tmp_path_factory.mktemp("peft") / f"task{seed}")
        model.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="session")
def lori_adapters(tmp_path_factory) -> list[Path]:
    """Two LoRI-S adapters of different tasks."""
    second = tmp_path_factory.mktemp("lori") / "math-lori-s"
    trainer = make_trainer(second, task_name="math")
    trainer.train()
    trainer.save_model()
    return [trained_adapter(), second]
