"""What PEFT's LoRA can be besides plain, and what LoRI makes of it."""

import copy
from collections.abc import Mapping
from dataclasses import fields

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer

from ..inputs.intervals import check_range
from .lora_fields import BEGINNINGS, DENSE, REFUSED, SUPPORTED

_KNOWN = SUPPORTED | DENSE.keys() | REFUSED.keys() | BEGINNINGS.keys()
_INTERVALS = {"r": "[1, inf)", "lora_alpha": "(0, inf)", "lora_dropout": "[0, 1)"}


def check_lora_config(config: LoraConfig, fresh: bool) -> None:
    """
    Refuse adapters that LoRI is not defined for.

    Args:
        config (`LoraConfig`): the adapter's.
        fresh (`bool`): whether it is to be made; else it is there and is continued.

    Raises:
        `TypeError`: the config is not one of LoRA.
        `ValueError`: a field asks for something besides plain LoRA, or is out of range.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"The adapter's config is a {type(config).__name__}. LoRI is a kind of LoRA: pass a `LoraConfig`."
        )
    refused, plain = {**REFUSED, **(BEGINNINGS if fresh else {})}, LoraConfig()
    for name in [each.name for each in fields(LoraConfig)]:  # an older PEFT lacks some of those that stand above
        value, default = getattr(config, name), getattr(plain, name)
        unknown = None if name in _KNOWN else "this PEFT is newer than those that LoRI was tried with"
        if (why := refused.get(name, unknown)) and value and value != default:
            raise _not_possible(name, value, why, repr(default))
    if config.bias != "none":
        raise _not_possible("bias", config.bias, REFUSED["lora_bias"], "'none'")
    if fresh and config.init_lora_weights not in (True, "gaussian"):
        why = "LoRI draws A itself and starts B at zero"
        raise _not_possible("init_lora_weights", config.init_lora_weights, why, "True or 'gaussian'")
    for name, interval in _INTERVALS.items():
        check_range(name, getattr(config, name), interval)
    for pattern, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        for module, value in (getattr(config, pattern) or {}).items():
            check_range(f"{pattern}[{module!r}]", value, _INTERVALS[name])


def for_language_part(config: LoraConfig) -> LoraConfig:
    """
    Return a config for all linear layers of a vision-language model's language part, where no modules are named.

    PEFT has no default for such models. Their language part is called `language_model` or `text_model`.
    """
    if config.target_modules is not None or config.exclude_modules is not None:
        return config
    config = copy.copy(config)
    config.target_modules, config.exclude_modules = "all-linear", r"(?!.*\b(language_model|text_model)\.).*"
    return config


def check_variants(layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """
    Refuse layers whose forward pass is not LoRA's: PEFT calls what replaces it a variant.

    Raises:
        `ValueError`: a layer has one.
    """
    for path, layer in layers.items():
        if adapter_name in layer.lora_variant:
            raise ValueError(
                f"`{path}` computes {type(layer.lora_variant[adapter_name]).__name__} in place of LoRA. LoRI trains B "
                "of plain LoRA layers. Make the adapter with a `LoraConfig` that asks for no variant."
            )


def check_one_adapter(model: PeftModel) -> None:
    """
    Refuse a model of which not exactly one adapter is active.

    Raises:
        `ValueError`: several are active.
    """
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"The model has {len(model.active_adapters)} active adapters: {', '.join(model.active_adapters)}. LoRI "
            "trains one. Choose it with `model.set_adapter(name)`."
        )


def _not_possible(name: str, value: object, why: str, allowed: str) -> ValueError:
    return ValueError(
        f"`{name}={value!r}` is not possible with LoRI: {why}. Allowed is {allowed}. Change it in the `LoraConfig`."
    )
