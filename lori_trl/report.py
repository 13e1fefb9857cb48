"""Counts and tables: what is trained, what is frozen, how large it is."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from .projections import lora_layers
from .selection import num_to_select


@dataclass
class ParameterCounts:
    """
    How many parameters a run has.

    Args:
        base (`int`): of the base model; all frozen.
        lora_A (`int`): of the projections; all frozen. Plain LoRA trains them.
        lora_B (`int`): of the expansions.
        selected (`int`): entries of B on the mask: what LoRI trains.
        sparsity (`float`): the share of B that stays untouched, a fraction in [0, 1).
    """

    base: int
    lora_A: int
    lora_B: int
    selected: int
    sparsity: float

    @property
    def lora(self) -> int:
        """What plain LoRA would train: A and B."""
        return self.lora_A + self.lora_B

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter's file: A and B in float32, as PEFT saves them."""
        return 4 * self.lora

    def table(self) -> Table:
        """Return the counts as a table for the terminal."""
        table = Table(
            title="LoRI-D" if self.sparsity == 0 else f"LoRI-S, sparsity {self.sparsity}", title_justify="left"
        )
        for column, justify in (("parameters", "left"), ("count", "right"), ("share of the base", "right")):
            table.add_column(column, justify=justify)
        for name, count in (
            ("base model, frozen", self.base),
            ("adapter: A and B; plain LoRA trains all of it", self.lora),
            ("A, frozen", self.lora_A),
            ("B", self.lora_B),
            ("B outside the mask, frozen", self.lora_B - self.selected),
            ("B on the mask: what LoRI trains", self.selected),
        ):
            table.add_row(name, f"{count:,}", f"{100 * count / self.base:.2f} %")
        table.add_section()
        table.add_row(
            "density, trained / B", f"{self.selected:,} / {self.lora_B:,}", f"{self.selected / self.lora_B:.8f}"
        )
        table.add_row("trained / plain LoRA", "", f"{100 * self.selected / self.lora:.2f} %")
        table.add_row("adapter file, float32", f"{self.adapter_bytes / 1e6:,.1f} MB", "")
        return table


def count_parameters(config: PreTrainedConfig, peft_config: LoraConfig, sparsity: float) -> ParameterCounts:
    """
    Count the parameters of a run from configurations alone: no weights are loaded or allocated.

    Args:
        config (`PreTrainedConfig`): the base model's configuration.
        peft_config (`LoraConfig`): the adapter.
        sparsity (`float`): a fraction in [0, 1).

    Source: the counts of the paper's Tables 1 and 2.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        base = model.num_parameters()
        layers = lora_layers(get_peft_model(model, peft_config), "default").values()
    lora_A = sum(layer.lora_A["default"].weight.numel() for layer in layers)
    lora_B = sum(layer.lora_B["default"].weight.numel() for layer in layers)
    return ParameterCounts(base, lora_A, lora_B, num_to_select(sparsity, lora_B), sparsity)
