"""What decides the outcome of a run: the hyperparameters that a card shows, and every other setting that does."""

import hashlib
import json
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..adapter.record_fields import Scalar
from .optimizers import ARE_PARAMETERS, OptimizerClass

# What a card shows of it. Names of folders, of the Hub and of logging services are not among them.
_HYPERPARAMETERS = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio num_train_epochs max_steps
    per_device_train_batch_size gradient_accumulation_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon
    max_grad_norm label_smoothing_factor neftune_noise_alpha seed data_seed bf16 fp16 activation_checkpointing
    max_length truncation_mode packing packing_strategy padding_free completion_only_loss assistant_only_loss
    loss_type average_tokens_across_devices optim_args dataloader_drop_last
    beta label_smoothing num_generations num_iterations steps_per_generation max_completion_length temperature top_p
    top_k epsilon entropy_coef scale_rewards desirable_weight undesirable_weight
    sparsity mask_granularity disjoint_masks calibration_method calibration_learning_rate
    calibration_num_train_epochs calibration_max_steps calibration_fraction calibration_lr_scheduler_type
    calibration_warmup_steps projection_init protect_rows protect_epsilon grow sparse_backend
""".split()
# What does not decide it beyond rounding, or is compared by what comes of it: masks, A, tokenizer, the model's type.
_FREE = """
    output_dir overwrite_output_dir disable_tqdm report_to run_name project include_num_input_tokens_seen
    include_for_metrics bf16_full_eval fp16_full_eval prediction_loss_only per_device_eval_batch_size
    batch_eval_metrics num_generations_eval enable_jit_checkpoint load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing_kwargs activation_offloading tf32
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps use_liger_kernel
    liger_kernel_config use_cache use_cpu full_determinism local_rank parallelism_config fsdp fsdp_config deepspeed
    debug skip_memory_metrics do_train do_eval do_predict dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataset_num_proc
    eval_packing ds3_gather_for_generation num_completions_to_print precompute_ref_batch_size
    model_init_kwargs trust_remote_code chat_template_path eos_token pad_token
    task_name mask_name_or_path mask_revision calibration_sparsities projection_seed protect save_moments
""".split()
_FREE_BEGINNINGS = ("log_", "logging_", "eval_", "save_", "hub_", "push_to_hub", "ddp_", "trackio_", "vllm_")
_DECIDE_ALL_THE_SAME = "vllm_importance_sampling_"


def hyperparameters(args: TrainingArguments, optimizer: OptimizerClass | None = None) -> dict[str, Scalar]:
    """
    Return what of a run's settings a card shows: what decides the outcome and differs from its default.

    Args:
        args (`TrainingArguments`): the run's.
        optimizer (`tuple[type, dict]`, *optional*): the trainer's `optimizer_cls_and_kwargs`, which overrides `optim`.
    """
    values = {name: value for name, value in _not_default(args).items() if name in _HYPERPARAMETERS}
    values = {name: json.dumps(value) if isinstance(value, (dict, list)) else value for name, value in values.items()}
    values = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
    return values if optimizer is None else values | {"optim": optimizer[0].__name__}


def other_settings(args: TrainingArguments, optimizer: OptimizerClass | None = None) -> dict[str, Scalar]:
    """
    Return what decides the outcome besides the [`hyperparameters`], and differs from its default.

    Returns:
        `dict[str, bool | int | float | str]`: name -> a number, or a digest of what is none, which may be private.
    """
    shown, values = hyperparameters(args, optimizer), _not_default(args)
    if optimizer is not None:
        values["optimizer_kwargs"] = {
            name: value for name, value in optimizer[1].items() if name not in ARE_PARAMETERS | {"lr"}
        }
    return {
        name: _digest(value)
        for name, value in values.items()
        if name not in shown
        and name not in _FREE
        and (not name.startswith(_FREE_BEGINNINGS) or name.startswith(_DECIDE_ALL_THE_SAME))
    }


def what_is_given(model: PreTrainedModel, processing_class: Any, **named: Any) -> dict[str, Scalar]:
    """
    Return what decides a run's outcome and comes from no argument.

    Args:
        model (`PreTrainedModel`): the base model.
        processing_class: the trainer's tokenizer or processor.
        **named: more of it, by name; what is `None` is left out.
    """
    tokenizer = vars(processing_class).get("tokenizer", processing_class)  # a processor has one
    named |= {"chat_template": processing_class.chat_template, "eos_token": tokenizer.eos_token}
    named |= {"pad_token": tokenizer.pad_token}
    digests = {name: _digest(value) for name, value in named.items() if value is not None}
    return {"dtype": str(model.dtype).removeprefix("torch."), **digests}


def _not_default(args: TrainingArguments) -> dict[str, Any]:
    defaults = {field.name: None if field.default is MISSING else field.default for field in fields(args)}
    defaults["accelerator_config"] = AcceleratorConfig()  # which the Trainer makes of None
    values = {name: vars(args)[name] for name, default in defaults.items() if vars(args)[name] != default}
    unset = [name for name, value in values.items() if value is None and isinstance(defaults[name], str)]  # of "auto"
    values = {name: value for name, value in values.items() if name not in unset}
    return {name: value.value if hasattr(value, "value") else value for name, value in values.items()}


def _digest(value: Any) -> Scalar:
    """Return a number as it is, and of anything else the beginning of its SHA-256."""
    if value is None or isinstance(value, (bool, int, float)):
        return "none" if value is None else value
    text = json.dumps(value, sort_keys=True, default=lambda each: vars(each) if is_dataclass(each) else str(each))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
