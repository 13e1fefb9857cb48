"""Counts and memory, from configurations alone."""

import pytest
from peft import LoraConfig
from rich.console import Console
from tiny import lora_config
from transformers import LlamaConfig

from lori_trl.recipes.base_configs import KNOWN_CONFIGS
from lori_trl.training.counting import count_parameters

LLAMA_3, MISTRAL = "meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.1"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("base", "parameters", "rank", "table_1"),
    [
        (LLAMA_3, 8_030_261_248, 32, [("84M", "1.03"), ("44M", "0.54"), ("4.4M", "0.05")]),
        (MISTRAL, 7_241_732_096, 32, [("84M", "1.15"), ("44M", "0.60"), ("4.4M", "0.06")]),
        (LLAMA_3, 8_030_261_248, 64, [("168M", "2.05"), ("88M", "1.07"), ("8.8M", "0.11")]),
        (MISTRAL, 7_241_732_096, 64, [("168M", "2.26"), ("88M", "1.19"), ("8.8M", "0.12")]),  # Table 11 prints 1.18
    ],
)
def test_dry_run_equals_table_1(base, parameters, rank, table_1):
    """Tables 1 and 11: LoRA, LoRI-D, LoRI-S. The paper counts the adapter in the whole: 88.08 / (7241.73 + 167.77)."""
    counts = count_parameters(KNOWN_CONFIGS[base], LoraConfig(r=rank, target_modules=TARGETS), 0.9)
    assert counts.base == parameters
    trained = [counts.lora, counts.lora_B, counts.selected]
    millions = [f"{count / 1e6:.1f}M" if count < 1e7 else f"{count / 1e6:.0f}M" for count in trained]
    shares = [f"{100 * count / (counts.base + counts.lora):.2f}" for count in trained]
    assert list(zip(millions, shares, strict=True)) == table_1
    console = Console(width=100)
    with console.capture() as shown:
        console.print(counts.table())
    lines = {line.split("│")[1].strip(): line for line in shown.get().splitlines() if "│" in line}
    assert [cell.strip() for cell in lines["trained"].split("│")[2:-1]] == [f"{count:,}" for count in trained]
    assert [cell.strip(" %") for cell in lines["of base and adapter"].split("│")[2:-1]] == shares


def test_a_dense_run_is_shown_beside_the_papers_sparsity():
    counts = count_parameters(LlamaConfig(hidden_size=64, num_hidden_layers=2), lora_config(), 0.0)
    console = Console(width=100)
    with console.capture() as shown:
        console.print(counts.table())
    assert "this run is LoRI-D" in shown.get() and "LoRI-S, s = 0.9" in shown.get()


def test_memory_of_llama_3_8b_in_bytes():
    """Worked out by hand: 2 bytes a weight of the base, 4 of the adapter, 12 a trained entry: gradient, moments."""
    counts = count_parameters(KNOWN_CONFIGS[LLAMA_3], LoraConfig(r=32, target_modules=TARGETS), 0.9)
    memory = counts.memory(2.0, gpus=1)
    assert memory["base weights"] == 16_060_522_496
    assert memory["adapter weights"] == 335_544_320
    assert memory["training, LoRI: gradients, optimizer"] == 12 * 4_404_019
    assert memory["training, plain LoRA: gradients, optimizer"] == 1_006_632_960
    assert memory["calibration, LoRI: gradients, optimizer"] == 528_482_304
    assert counts.memory(2.0, gpus=8)["base weights"] == 2_007_565_312
    dense = count_parameters(KNOWN_CONFIGS[LLAMA_3], LoraConfig(r=32, target_modules=TARGETS), 0.0)
    assert dense.memory(2.0, gpus=1)["calibration, LoRI: gradients, optimizer"] == 0
    assert dense.selected == 44_040_192
