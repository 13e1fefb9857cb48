"""What PEFT's LoRA can be besides plain, and what LoRI makes of it: every field of `LoraConfig` stands here."""

import copy
from collections.abc import Mapping

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer

from ..inputs.intervals import check_range

# Trained as PEFT means them, or without a meaning for training.
SUPPORTED = frozenset(
    """
    r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern fan_in_fan_out init_lora_weights bias
    target_modules exclude_modules layers_to_transform layers_pattern layer_replication ensure_weight_tying
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    runtime_config megatron_core qalora_group_size
    """.split()
)

# Trained densely, without a mask, and saved by PEFT beside A and B. They cannot be merged.
DENSE = {
    "modules_to_save": "whole modules are trained",
    "trainable_token_indices": "embeddings are trained",
}

# Field -> why neither training nor merging can be right.
REFUSED = {
    "use_dora": "DoRA trains a magnitude besides B",
    "lora_bias": "biases are trained besides B",
    "target_parameters": "it adapts parameters, not linear layers",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "BD-LoRA's matrices are block diagonal",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA trains singular values besides B, and changes the base model",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA compresses A's inputs",
    "megatron_config": "Megatron's parallel layers are no linear layers of PyTorch",
}

# Field -> why an adapter that is to be made can't begin so. One that is there and is continued may have begun anyhow.
BEGINNINGS = {
    "loftq_config": "LoftQ changes the base model, and LoRI draws A itself",
    "eva_config": "EVA computes A from data, and LoRI draws A itself",
    "corda_config": "CorDA changes the base model, and LoRI draws A itself",
    "lora_ga_config": "LoRA-GA changes the base model, and LoRI draws A itself",
}

# Field -> why A and B are not all there is of a trained adapter.
NOT_PLAIN = {**REFUSED, **DENSE, "layer_replication": "its base model has copied layers"}

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
    for name, why in {**REFUSED, **(BEGINNINGS if fresh else {})}.items():
        if value := getattr(config, name):
            raise _not_possible(name, value, why, "False" if value is True else "None")
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
