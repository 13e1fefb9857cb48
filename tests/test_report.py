"""Counts and memory, from configurations alone."""

import pytest
from conftest import lora_config
from peft import LoraConfig
from transformers import LlamaConfig

from lori_trl.report import count_parameters

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.mark.parametrize(("rank", "lora", "lora_B", "selected"), [(32, 84e6, 44e6, 4.4e6), (64, 168e6, 88e6, 8.8e6)])
def test_llama_3_8b_has_the_papers_counts(rank, lora, lora_B, selected):
    """Table 1: LoRA 84M (1.03 %), LoRI-D 44M (0.54 %), LoRI-S 4.4M (0.05 %)."""
    counts = count_parameters(LLAMA_3_8B, LoraConfig(r=rank, target_modules="all-linear"), 0.9)
    assert counts.base == 8_030_261_248
    assert counts.lora == pytest.approx(lora, rel=0.005)
    assert counts.lora_B == pytest.approx(lora_B, rel=0.005)
    assert counts.selected == pytest.approx(selected, rel=0.005)
    if rank == 32:
        # The paper counts the adapter in the whole.
        shares = [100 * part / (counts.base + counts.lora) for part in (counts.lora, counts.lora_B, counts.selected)]
        assert [round(share, 2) for share in shares] == [1.03, 0.54, 0.05]


def test_memory_follows_its_formula():
    counts = count_parameters(LlamaConfig(hidden_size=64, num_hidden_layers=2), lora_config(), 0.9)
    memory = counts.memory(2.0, gpus=1)
    assert memory["base weights"] == 2 * counts.base
    assert memory["adapter weights"] == 4 * counts.lora
    assert memory["training, LoRI: gradients, optimizer"] == 12 * counts.selected
    assert memory["training, plain LoRA: gradients, optimizer"] == 12 * counts.lora
    assert memory["calibration, LoRI: gradients, optimizer"] == 12 * counts.lora_B
    assert counts.memory(2.0, gpus=8) == {name: size / 8 for name, size in memory.items()}
    dense = count_parameters(LlamaConfig(hidden_size=64, num_hidden_layers=2), lora_config(), 0.0)
    assert dense.memory(2.0, gpus=1)["calibration, LoRI: gradients, optimizer"] == 0
    assert dense.selected == dense.lora_B
