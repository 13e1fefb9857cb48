"""What is trained densely besides B: modules that PEFT saves whole, a reward model's head, new tokens' embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn

from .layers import VALUES, module_path
from .sharding import assign, gather


def dense_parameters(model: PeftModel, adapter_name: str) -> dict[str, nn.Parameter]:
    """
    Find what of a model is trained besides an adapter's B, dense or packed. No mask covers it.

    Returns:
        `dict[str, nn.Parameter]`: name in the model -> parameter.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and f".lora_B.{adapter_name}." not in name and f".{VALUES}." not in name
    }


def check_saved(model: PeftModel, adapter_name: str) -> None:
    """
    Refuse a model of which something is trained that PEFT would not save with the adapter.

    Raises:
        `ValueError`: something is.
    """
    wrappers = [f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    unsaved = [name for name in dense_parameters(model, adapter_name) if not name.startswith(tuple(wrappers))]
    if unsaved:
        raise ValueError(
            f"{len(unsaved)} parameters would be trained and not be saved with the adapter: {', '.join(unsaved[:3])}"
            f"{', ...' if len(unsaved) > 3 else ''}. Allowed besides B is what `modules_to_save` and "
            "`trainable_token_indices` of the `LoraConfig` name. Name them there, or freeze them with "
            "`requires_grad_(False)`."
        )


def dense_counts(model: PeftModel, adapter_name: str) -> dict[str, int]:
    """Count what is trained besides B: name in the base model -> entries."""
    counts = {}
    for name, parameter in dense_parameters(model, adapter_name).items():
        name = name.removesuffix(f".{adapter_name}").replace(f".modules_to_save.{adapter_name}", "")
        counts[module_path(name.replace(".token_adapter.trainable_tokens_delta", ""))] = parameter.numel()
    return counts


def show_bias_of_tied_head(model: PeftModel) -> None:
    """
    Let TRL's fused head read the bias of output embeddings that are tied to embeddings with trained tokens.

    TRL 1.16 reads their `weight` and `bias`; PEFT 0.21's wrapper of tied ones shows the weight alone.
    """
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and head.original_module.bias is None:
        head.bias = None


@contextmanager
def set_back(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Set what is trained densely back to what it was when the context ends. Until then a copy lies on the CPU."""
    dense = dense_parameters(model, adapter_name)
    before = {name: gather(parameter).cpu() for name, parameter in dense.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            assign(model.get_parameter(name), value)
