"""Every field of PEFT's `LoraConfig`: what it means for LoRI, and which of them decide what an adapter does."""

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

UNSET: tuple = (None, False, 0, "none", [], {})  # values by which a field asks for nothing

KNOWN = SUPPORTED | REFUSED.keys() | DENSE.keys() | BEGINNINGS.keys()

# The fields that decide the delta of an adapter whose tensors are known. The others say how it was trained, where its
# modules and its base model are, or who wrote the file.
DECIDE_THE_DELTA = frozenset(
    ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"]
) | (NOT_PLAIN.keys() | BEGINNINGS.keys())
