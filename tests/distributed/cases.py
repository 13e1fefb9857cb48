"""The runs that are made on one process and on two ranks of every engine. All have a global batch of 4."""

import os
from pathlib import Path

import torch
from tiny import lora_config, make_rows, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lori_trl import LoriSFTConfig, LoriSFTTrainer, load_lori_adapter

SGD = {"optim": "sgd", "learning_rate": 0.5, "calibration_learning_rate": 0.5, "max_grad_norm": 0.05}
SAVING = {"save_strategy": "steps", "save_steps": 2}
CASES = {
    "sgd, model-wide": SGD,
    "adamw, accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "matrix-wise": {"mask_granularity": "matrix"},
    "LoRI-D": {"sparsity": 0.0},
    "contrastive": {"sparsity": 0.0, "projection_init": "contrastive"},
    "given masks": {"mask_name_or_path": "sgd, model-wide"},
    "continued, disjoint": {"adapter_name_or_path": "adamw, accumulated", "task_name": "math", "disjoint_masks": True},
    "grown": {"adapter_name_or_path": "adamw, accumulated", "task_name": "math", "grow": 2},
    "grown, contrastive": {
        "adapter_name_or_path": "adamw, accumulated",
        "task_name": "math",
        "grow": 2,
        "sparsity": 0.0,
        "projection_init": "contrastive",
    },
    "gradients' agreement": {"calibration_method": "gradient"},
    "with a head": {"modules_to_save": ["lm_head"]},
    "with embeddings": {"modules_to_save": ["embed_tokens"]},
    "with new tokens": {"trainable_token_indices": [3, 5]},
    "packed": {"sparse_backend": "packed"},
    "packed, given masks": {"sparse_backend": "packed", "mask_name_or_path": "sgd, model-wide"},
    "chosen backend": {"sparse_backend": "auto"},
    "bfloat16": {"bf16": True},
    "undisturbed": {},
    "undisturbed, again": {},
    "interrupted": SAVING,
    "killed": SAVING,
    "interrupted, packed": {**SAVING, "sparse_backend": "packed", "mask_name_or_path": "sgd, model-wide"},
}
# One process needs no second run of these.
REFERENCE = {name: name for name in CASES} | dict.fromkeys(
    ["undisturbed, again", "interrupted", "killed"], "undisturbed"
)
KILLED = ("fsdp2", "zero2")
ROUNDED = ("zero2", "zero3")  # DeepSpeed holds all in bfloat16, the others the adapter in float32
# What an engine refuses, and with which words.
REFUSED = {
    "ddp": {},
    "fsdp2": {
        "packed": "packed values come to be after the calibration",
        "with a head": "nothing adds up its gradient over the devices",
    },
    "zero2": {"gradients' agreement": "flat parts"},
    "zero3": {
        "gradients' agreement": "flat parts",
        "packed": "keeps it partitioned",
        "packed, given masks": "keeps it partitioned",
        "interrupted, packed": "keeps it partitioned",
    },
}
ONLY = {
    "killed": KILLED,
    "bfloat16": ROUNDED,
    "with new tokens": ("ddp", "fsdp2", "zero2"),  # under ZeRO-3, PEFT asks for CUDA
}
RUNS = {
    engine: [name for name in CASES if name not in refused and engine in ONLY.get(name, REFUSED)]
    for engine, refused in REFUSED.items()
}


def make_model() -> LlamaForCausalLM:
    """A Llama whose B have numbers of rows that two ranks cannot share evenly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=33,
        intermediate_size=65,
        num_hidden_layers=2,
        num_attention_heads=3,
        head_dim=12,
        num_key_value_heads=3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_trainer(name: str, folder: Path, references: Path, **changes) -> LoriSFTTrainer:
    """
    Make the trainer of a case.

    Args:
        name (`str`): the case.
        folder (`Path`): where it saves.
        references (`Path`): where the cases that one process ran lie.
        **changes: configuration on top.
    """
    case = CASES[name] | changes
    beside = {key: case.pop(key) for key in ("modules_to_save", "trainable_token_indices") if key in case}
    model, peft_config = make_model(), lora_config(**beside)
    if started := case.pop("adapter_name_or_path", None):
        model, peft_config = load_lori_adapter(model, references / started, is_trainable=True), None
    if "mask_name_or_path" in case:
        case["mask_name_or_path"] = str(references / case["mask_name_or_path"])
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    case["per_device_train_batch_size"] = case.get("per_device_train_batch_size", 4) // ranks
    config = {
        "output_dir": str(folder),
        "task_name": "code",
        "sparse_backend": "hook",
        "learning_rate": 5e-3,
        "calibration_learning_rate": 5e-3,
        "max_steps": 4,
        "calibration_max_steps": 4,
        "lr_scheduler_type": "cosine",
        "activation_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_backend": "gloo" if ranks > 1 else None,
        "use_cpu": ranks == 1,
    }
    return LoriSFTTrainer(
        model,
        LoriSFTConfig(**config | case),
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )
