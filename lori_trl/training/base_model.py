"""The base model, from safetensors alone."""

from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from trl.trainer.utils import create_model_from_path


def quantization(model: PreTrainedModel) -> str | None:
    """Return `4-bit` or `8-bit` for a model that bitsandbytes has packed."""
    for bits in ("4", "8"):
        if getattr(model, f"is_loaded_in_{bits}bit", False):
            return f"{bits}-bit"
    return None


def precision(model: PreTrainedModel) -> dict[str, str]:
    """Return a model's dtype, and how it is packed if it is, for the settings of a result."""
    packed = quantization(model)
    return {"dtype": str(model.dtype)} | ({} if packed is None else {"quantization": packed})


def keep_4bit_layers(model: PreTrainedModel) -> None:
    """
    Keep bitsandbytes from repacking 4-bit layers, which it does at their first inference on a CPU with AVX512-BF16.

    No gradient goes through a repacked layer, so training after an evaluation would be silently wrong; and a layer
    narrower than the 64 entries of a block fails.

    Raises:
        `ValueError`: layers have been repacked already.
    """
    for name, layer in model.named_modules():
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            continue
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit layer {name} was repacked by bitsandbytes when the model was run for inference on this "
                "CPU, and no gradient goes through it. Allowed is a model as it was loaded. Load it again."
            )
        layer.support_avx512bf16_for_cpu = False


def load_base_model(name_or_path: str, **arguments: Any) -> PreTrainedModel:
    """
    Load a base model, and never a pickle.

    Args:
        name_or_path (`str`): a folder, or a name on the Hub.
        **arguments (`Any`, *optional*): as of `from_pretrained`.

    Raises:
        `FileNotFoundError`: it has no safetensors, which pickled weights (`pytorch_model.bin`) are not.
        `ValueError`: its safetensors are damaged.
        `OSError`: there is no such model.
    """
    try:
        model = create_model_from_path(name_or_path, **arguments | {"use_safetensors": True})
    except SafetensorError as error:
        raise ValueError(
            f"`model_name_or_path={name_or_path}` has a damaged file of weights: {error}. Whole safetensors are "
            "needed. Fetch or save the model again."
        ) from error
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise FileNotFoundError(
            f"`model_name_or_path={name_or_path}` has no model.safetensors. Pickled weights (pytorch_model.bin) can "
            "run code when they are read, and are left alone. Where you trust them, convert them once: "
            "`AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER)`. Then pass that folder."
        ) from error
    keep_4bit_layers(model)
    return model
