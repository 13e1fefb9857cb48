"""
What an adapter trains has the values that it had, and A and B are float32.

TRL casts all that is trained on a base of 4 or 8 bits to bfloat16 while it makes a trainer. There, a step of less than
0.4 % of a value is lost, how far B moved has some thousand different values to be ranked by, and the entries of
earlier tasks would be rounded. So the cast is undone. In memory this costs 2 bytes more an entry of A and B, and
6 more for each that is trained: its gradient and AdamW's two moments.
"""

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor

from ..method.layers import lora_layers


def trained_values(model: PeftModel) -> dict[str, Tensor]:
    """Return what a model's adapter trains: name in the model -> its values, of which a cast makes a copy."""
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def undo_cast(model: PeftModel, adapter_name: str, before: Mapping[str, Tensor] | None, *, to_float32: bool) -> None:
    """
    Give what is trained the values back that it had before a cast, bit for bit, and train A and B in float32.

    Args:
        model (`PeftModel`): the model.
        adapter_name (`str`): its adapter.
        before (`Mapping[str, Tensor]` or `None`):
            [`trained_values`] of an adapter that is continued; `None` for a fresh one, whose values are the base's.
        to_float32 (`bool`): whether A and B become float32. DeepSpeed chooses their type itself.
    """
    for name, values in dict(_from_base(model, adapter_name)).items() if before is None else before.items():
        parameter = model.get_parameter(name)
        if parameter.dtype != values.dtype:
            parameter.data = values.to(parameter.device, copy=before is None)
    if not to_float32:
        return
    for layer in lora_layers(model, adapter_name).values():
        for weight in (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight):
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))


def _from_base(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """Find where PEFT took what a fresh adapter trains besides A and B: name of its parameter, the base's values."""
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            rows = module.token_adapter.trainable_tokens_original[adapter_name]
            yield f"{name}.token_adapter.trainable_tokens_delta.{adapter_name}", rows
        elif isinstance(module, ModulesToSaveWrapper):
            for part, parameter in module.original_module.named_parameters():
                yield f"{name}.modules_to_save.{adapter_name}.{part}", parameter.data
