"""How many parameters a run has, and how much memory it takes: from configurations alone."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ..method.layers import lora_layers
from ..method.sparsity import num_to_select

DEFAULT_SPARSITY = 0.9  # the paper's LoRI-S, for comparison in a LoRI-D run


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
        """
        Return the counts as a table for the terminal: LoRA, LoRI-D and LoRI-S side by side.

        Source: the column "# Params (%)" of Table 1; its shares are of the base and the adapter together.
        """
        sparsity = self.sparsity or DEFAULT_SPARSITY
        columns = {
            "LoRA": self.lora,
            "LoRI-D": self.lora_B,
            f"LoRI-S, s = {sparsity:g}": num_to_select(sparsity, self.lora_B),
        }
        table = Table(
            title=f"what would be trained; this run is LoRI-{'S' if self.sparsity else 'D'}", title_justify="left"
        )
        table.add_column("parameters")
        for name in columns:
            table.add_column(name, justify="right")
        for name, count in (
            ("base model, frozen", self.base),
            ("adapter, A", self.lora_A),
            ("adapter, B", self.lora_B),
        ):
            table.add_row(name, *[f"{count:,}"] * len(columns))
        table.add_row("trained", *(f"{trained:,}" for trained in columns.values()))
        for name, whole in (("of base and adapter", self.base + self.lora), ("of plain LoRA", self.lora)):
            table.add_row(name, *(f"{100 * trained / whole:.2f} %" for trained in columns.values()))
        of_B = [f"{trained / self.lora_B:.8f}" for trained in columns.values()]
        table.add_row("of B: the density", "", *of_B[1:])
        table.add_section()
        table.add_row("adapter file, float32", *[f"{self.adapter_bytes / 1e6:,.1f} MB"] * len(columns))
        return table

    def memory(self, base_bytes: float, gpus: int) -> dict[str, float]:
        """
        Return the bytes per GPU that a run needs before activations, when everything is sharded over `gpus`.

        With P parameters of the base, N = A + B of the adapter in float32, and T trained ones:

            weights = base_bytes * P,  adapter = 4 N,  gradients = 4 T,  optimizer = 8 T  (AdamW's two moments),
            positions = 8 T  (where in B the packed values lie)

        divided by `gpus`. T is what the adaptation trains (`selected`), all of B while calibrating, A and B in LoRA.
        Activations come on top: they depend on batch size, length and checkpointing.

        Args:
            base_bytes (`float`): bytes a parameter of the base: 4 float32, 2 bfloat16, 0.56 NF4.
            gpus (`int`): over how many GPUs FSDP or ZeRO-3 shards; 1 for no sharding, as with DDP.
        """
        calibrated = self.lora_B if self.sparsity > 0 else 0
        parts = {
            "base weights": base_bytes * self.base,
            "adapter weights": 4 * self.lora,
            "training, LoRI: gradients, optimizer": 12 * self.selected,
            "training, LoRI: positions": 8 * self.selected if calibrated else 0,
            "calibration, LoRI: gradients, optimizer": 12 * calibrated,
            "training, plain LoRA: gradients, optimizer": 12 * self.lora,
        }
        return {name: size / gpus for name, size in parts.items()}

    def memory_table(self, base_bytes: float) -> Table:
        """Return the memory per GPU as a table for the terminal."""
        table = Table(title="memory per GPU before activations", title_justify="left")
        table.add_column("GB")
        columns = [self.memory(base_bytes, gpus) for gpus in (1, 8)]
        for gpus in (1, 8):
            table.add_column(f"{gpus} GPU{'s, sharded' if gpus > 1 else ''}", justify="right")
        for name in columns[0]:
            table.add_row(name, *(f"{column[name] / 1e9:,.3f}" for column in columns))
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
