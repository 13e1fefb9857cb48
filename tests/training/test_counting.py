"""Counts and memory, from configurations alone."""

from dataclasses import replace

import pytest
from peft import LoraConfig
from rich.console import Console
from tiny import lora_config
from transformers import LlamaConfig

from lori_trl.recipes.base_configs import KNOWN_CONFIGS
from lori_trl.training.counting import ParameterCounts, count_parameters, optimizer_steps
from lori_trl.training.parallel_engines import Engine

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


def shown(table) -> dict[str, list[str]]:
    """The cells of a table as it is printed: row -> the others."""
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    rows = [line.split("│")[1:-1] for line in captured.get().splitlines() if "│" in line]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def test_memory_of_llama_3_8b_in_bytes():
    """By hand: 2 bytes a weight of the base, 4 of the adapter, 12 a trained entry: gradient, moments."""
    counts = count_parameters(KNOWN_CONFIGS[LLAMA_3], LoraConfig(r=32, target_modules=TARGETS), 0.9)
    one = {name: size for name, (size, _) in Engine("one device", 1).held(counts, 2.0, "packed").items()}
    assert one == {
        "base weights": 16_060_522_496,
        "adapter weights": 335_544_320,
        "calibration: gradients, optimizer": 528_482_304,
        "adaptation: gradients, optimizer": 12 * 4_404_019,
        "adaptation: values": 4 * 4_404_019,
        "adaptation: positions": 8 * 4_404_019,
    }
    hook = Engine("one device", 1).held(counts, 2.0, "hook")
    assert hook["adaptation: gradients, optimizer"] == (528_482_304, False)
    assert hook["adaptation: mask"] == (44_040_192, False) and "adaptation: values" not in hook
    sharded = Engine("FSDP2", 8).held(counts, 2.0, "hook")
    assert sharded["base weights"] == (2_007_565_312, True) and sharded["adaptation: mask"] == (5_505_024, True)
    zero2 = Engine("ZeRO-2", 4).held(counts, 2.0, "packed")
    assert zero2["adapter weights"] == (167_772_160, False) and zero2["adaptation: values"] == (2 * 4_404_019, False)
    assert zero2["adaptation: gradients, optimizer"] == (14 * 4_404_019 / 4, True)
    dense = count_parameters(KNOWN_CONFIGS[LLAMA_3], LoraConfig(r=32, target_modules=TARGETS), 0.0)
    assert dense.selected == 44_040_192 and not dense.calibrated
    assert [name for name in Engine("DDP", 2).held(dense, 2.0, "packed") if ":" in name] == [
        "adaptation: gradients, optimizer"
    ]


def test_the_peak_is_the_higher_phases():
    counts = ParameterCounts(
        base=0, lora_A=1e9, lora_B=1e9, selected=1e8, dense=0, sparsity=0.9, calibrated=True, own_B=1e9
    )
    assert (
        shown(Engine("one device", 1).table(counts, 0.0, "packed"))["at the peak, in the calibration"][0] == "20.000"
    )
    assert shown(Engine("one device", 1).table(counts, 0.0, "hook"))["at the peak, in the adaptation"][0] == "21.000"
    counts = replace(counts, calibrated=False)
    assert shown(Engine("one device", 1).table(counts, 0.0, "packed"))["at the peak, in the adaptation"][0] == "10.400"


def test_what_is_trained_besides_B_counts():
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=1000)
    plain = count_parameters(config, lora_config(target_modules=["q_proj"]), 0.5)
    with_head = lora_config(target_modules=["q_proj"], modules_to_save=["lm_head"])
    counts = count_parameters(config, with_head, 0.5)
    assert counts.dense == 64_000 and (counts.base, counts.lora) == (plain.base, plain.lora)
    assert counts.adapter_bytes == plain.adapter_bytes + 256_000
    rows = shown(counts.table())
    assert rows["whole modules and tokens, without a mask"] == ["64,000"] * 3
    assert rows["trained"] == [f"{count + 64_000:,}" for count in (counts.lora, counts.lora_B, counts.selected)]
    assert rows["of B: the density"][2] == "0.50000000"
    held, without = (Engine("one device", 1).held(each, 2.0, "packed") for each in (counts, plain))
    for part in ("calibration: gradients, optimizer", "adaptation: gradients, optimizer"):
        assert held[part][0] - without[part][0] == 12 * 64_000
    tokens = lora_config(target_modules=["q_proj"], trainable_token_indices=[5, 6, 7])
    assert count_parameters(config, tokens, 0.5).dense == 3 * 64


def test_a_saved_adapters_config_counts_as_one_that_is_trained():
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=1000)
    saved = lora_config(target_modules=["q_proj"], modules_to_save=["lm_head"], inference_mode=True)
    assert count_parameters(config, saved, 0.5).dense == 64_000 and saved.inference_mode


def test_every_pool_is_rounded_down_by_itself(make_trainer):
    """As the masks are: a half of 13 entries is 6, in each of 14 matrices."""
    trainer = make_trainer(mask_granularity="matrix", sparsity=0.93, calibration_method="random")
    counts = count_parameters(trainer.model.config, lora_config(), 0.93, "matrix")
    assert (
        counts.selected
        == trainer.masks.num_selected
        < count_parameters(trainer.model.config, lora_config(), 0.93).selected
    )


def test_given_masks_say_what_is_selected():
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1)
    counts = count_parameters(config, lora_config(), 0.9, selected=123, calibrated=False)
    assert counts.selected == 123 and not counts.calibrated and "LoRI-S" in shown_title(counts)


def shown_title(counts) -> str:
    return str(counts.table().title)


@pytest.mark.parametrize("fraction", [0.29, 0.57, 0.07, 0.001])
def test_a_dry_run_rounds_the_calibrations_rows_as_the_trainer_does(make_trainer, rows, fraction):
    """29 of 100 rows are 8 steps of 4, and the 28 that floating point makes of them are 7."""
    hundred = rows.select([number % len(rows) for number in range(100)])
    changes = {"calibration_max_steps": -1, "calibration_num_train_epochs": 1, "save_strategy": "no"}
    trainer = make_trainer(train_dataset=hundred, calibration_fraction=fraction, **changes)
    trainer.calibrate()
    told = optimizer_steps(trainer.args.for_calibration(), 100, 1, fraction)
    assert trainer.run.calibration.steps == told
    if fraction == 0.29:
        assert told == 8
