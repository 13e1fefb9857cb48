"""GRPO's and RLOO's rollouts with vLLM, which leave the base model as it was."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..method.sharding import assign, gather
from .trainer import LoriTrainerMixin

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer


class HeldBase:
    """
    The base weights below an adapter, held on the CPU while a run lasts.

    TRL sends vLLM the model with the adapter merged into it, and then takes the adapter out again: each time the base
    moves by rounding. It has no synchronisation of the adapter alone.

    Args:
        layers (`Mapping[str, LoraLayer]`): module path -> PEFT's layer.
    """

    def __init__(self, layers: Mapping[str, "LoraLayer"]):
        self.layers = layers
        self.parameters = {path: layer.get_base_layer().weight for path, layer in layers.items()}
        self.values = {path: gather(weight).cpu() for path, weight in self.parameters.items()}

    def set_back(self) -> None:
        """Set the base back to what it was."""
        for path, layer in self.layers.items():
            layer.get_base_layer().weight = self.parameters[path]  # PEFT makes a new one of what is in 4 or 8 bits
            assign(self.parameters[path], self.values[path])

    def check(self) -> None:
        """
        Check that the base is what it was.

        Raises:
            `RuntimeError`: it is not.
        """
        for path, layer in self.layers.items():
            if not torch.equal(gather(layer.get_base_layer().weight).cpu(), self.values[path]):
                raise RuntimeError(
                    f"The base weight of {path} is not what it was when the run began. The base is frozen, and the "
                    "adapter fits no other. Look for what merges adapters into it while the run lasts, e.g. a "
                    "callback, and leave that out."
                )


class RolloutTrainerMixin(LoriTrainerMixin):
    """[`LoriTrainerMixin`] for trainers that may generate with vLLM."""

    vllm_generation: Any

    def __init__(self, model: Any, *positional: Any, **named: Any):
        super().__init__(model, *positional, **named)
        self.held_base = HeldBase(self.run.lora_layers) if self.args.use_vllm else None
        if self.held_base is not None:
            sync_weights, held_base = self.vllm_generation.sync_weights, self.held_base

            def sync_and_set_back() -> None:
                try:
                    sync_weights()
                finally:
                    held_base.set_back()

            self.vllm_generation.sync_weights = sync_and_set_back

    def check_frozen_entries(self) -> None:
        """Check the method's promise, and with vLLM that the base is what it was, which TRL merges adapters into."""
        super().check_frozen_entries()
        if self.held_base is not None:
            self.held_base.check()
