"""How many parameters a run has: from configurations alone."""

import copy
import math
from dataclasses import dataclass
from decimal import Decimal

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from transformers import PreTrainedConfig, TrainingArguments
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ..method.dense_parameters import dense_counts
from ..method.layers import lora_layers, pools
from ..method.projections import freeze_projections
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
        selected (`int`): entries of B on the mask: what LoRI trains of B.
        dense (`int`): what is trained besides B, by LoRA too: `modules_to_save`, `trainable_token_indices`.
        sparsity (`float`): the share of B that stays untouched, a fraction in [0, 1).
        calibrated (`bool`): whether all of B is trained first, to find the mask.
        own_B (`int`): entries of B that the run's task may have: all, or the columns that the adapter was grown by.
    """

    base: int
    lora_A: int
    lora_B: int
    selected: int
    dense: int
    sparsity: float
    calibrated: bool
    own_B: int

    @property
    def lora(self) -> int:
        """What plain LoRA would train: A and B."""
        return self.lora_A + self.lora_B

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter's file: A, B and what is trained besides, in float32, as PEFT saves them."""
        return 4 * (self.lora + self.dense)

    def table(self) -> Table:
        """
        Return the counts as a table for the terminal: LoRA, LoRI-D and LoRI-S side by side.

        Source: the column "# Params (%)" of Table 1; its shares are of the base and the adapter together.
        """
        is_sparse = self.selected < self.own_B
        sparsity = self.sparsity if is_sparse else DEFAULT_SPARSITY
        selected = self.selected if is_sparse else num_to_select(DEFAULT_SPARSITY, self.own_B)
        of_adapter = {"LoRA": self.lora, "LoRI-D": self.own_B, f"LoRI-S, s = {sparsity:g}": selected}
        columns = {name: trained + self.dense for name, trained in of_adapter.items()}
        title = f"what would be trained; this run is LoRI-{'S' if is_sparse else 'D'}"
        table = Table(title=title, title_justify="left")
        table.add_column("parameters")
        for name in columns:
            table.add_column(name, justify="right")
        for name, count in (
            ("base model, frozen", self.base),
            ("adapter, A", self.lora_A),
            ("adapter, B", self.lora_B),
            *([("whole modules and tokens, without a mask", self.dense)] if self.dense else []),
        ):
            table.add_row(name, *[f"{count:,}"] * len(columns))
        table.add_row("trained", *(f"{trained:,}" for trained in columns.values()))
        adapter = self.lora + self.dense
        for name, whole in (("of base and adapter", self.base + adapter), ("of plain LoRA", adapter)):
            table.add_row(name, *(f"{100 * trained / whole:.2f} %" for trained in columns.values()))
        of_B = [f"{trained / self.lora_B:.8f}" for trained in of_adapter.values()]
        table.add_row("of B: the density", "", *of_B[1:])
        table.add_section()
        table.add_row("adapter file, float32", *[f"{self.adapter_bytes / 1e6:,.1f} MB"] * len(columns))
        return table


def count_parameters(
    config: PreTrainedConfig,
    peft_config: LoraConfig,
    sparsity: float,
    granularity: str = "model",
    *,
    selected: int | None = None,
    calibrated: bool = True,
    columns: int | None = None,
) -> ParameterCounts:
    """
    Count the parameters of a run from configurations alone: no weights are loaded or allocated.

    Args:
        config (`PreTrainedConfig`): the base model's configuration.
        peft_config (`LoraConfig`): the adapter.
        sparsity (`float`): a fraction in [0, 1).
        granularity (`str`, *optional*, defaults to `"model"`): over what the entries of B compete.
        selected (`int`, *optional*): how many entries given masks select; by default what the sparsity leaves.
        calibrated (`bool`, *optional*, defaults to `True`): whether the mask is to be found by training.
        columns (`int`, *optional*): columns of B that the adapter was grown by, where it was.

    Source: the counts of the paper's Tables 1 and 2.
    """
    peft_config = copy.copy(peft_config)
    peft_config.inference_mode = False  # as a saved adapter has it, though its training goes on
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        base = model.num_parameters()
        model = get_peft_model(model, peft_config)
    freeze_projections(model, "default")
    layers = lora_layers(model, "default")
    lora_A = sum(layer.lora_A["default"].weight.numel() for layer in layers.values())
    sizes = {path: layer.lora_B["default"].weight.numel() for path, layer in layers.items()}
    own = sizes
    if columns is not None:
        own = {path: len(layer.lora_B["default"].weight) * columns for path, layer in layers.items()}
    if selected is None:
        of_pools = [sum(own[path] for path in paths) for paths in pools(own, granularity).values()]
        selected = sum(num_to_select(sparsity, size) for size in of_pools)  # rounded down in each of them
    lora_B, dense = sum(sizes.values()), sum(dense_counts(model, "default").values())
    own_B = sum(own.values())
    calibrated = calibrated and selected < own_B
    return ParameterCounts(base, lora_A, lora_B, selected, dense, sparsity, calibrated, own_B)


def optimizer_steps(args: TrainingArguments, rows: int | None, devices: int, fraction: float = 1) -> int | None:
    """
    Count the optimizer steps of a phase, as the Trainer does.

    Args:
        args (`TrainingArguments`): the phase's.
        rows (`int` or `None`): how many there are.
        devices (`int`): over how many the rows are shared out.
        fraction (`float`, *optional*, defaults to `1`): the share of the rows that the phase sees, in (0, 1].

    Returns:
        `int` or `None`: the steps; `None` where they follow from the rows, and their number is not known.
    """
    if args.max_steps > 0:
        return args.max_steps
    if rows is None:
        return None
    batches = math.ceil(share_of_rows(rows, fraction) / (args.per_device_train_batch_size * devices))
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def share_of_rows(rows: int, fraction: float) -> int:
    """
    Return how many of so many rows a share of them is: rounded down, and one at least.

    ```python
    >>> share_of_rows(100, 0.29)  # though 0.29 * 100 is below 29
    29

    ```
    """
    return max(1, int(Decimal(str(fraction)) * rows))
