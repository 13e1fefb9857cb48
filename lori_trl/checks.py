"""What a trainer is asked for: refused before a model is loaded, or before the first step, where it can't be right."""

from collections.abc import Mapping
from typing import Any

from accelerate.logging import get_logger
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor, nn

from .config import LoriArguments
from .dense import dense_parameters
from .lora_options import check_lora_config, check_one_adapter
from .masks import LoriMasks, pools
from .rows import check_not_empty, check_text
from .selection import num_to_select

logger = get_logger(__name__)


def check_arguments(given: Mapping[str, Any]) -> None:
    """
    Check the arguments of a trainer, before it loads a model. Warn of a warm-up that the schedule does not have.

    Args:
        given (`Mapping[str, Any]`): name -> value of those that were passed.

    Raises:
        `TypeError`: `args` has no LoRI fields, or the adapter is none of LoRA.
        `ValueError`: an optimizer or scheduler object, no adapter, one that LoRI is not defined for, or rows that are
            no text.
    """
    args, model, rows = given.get("args"), given["model"], given.get("train_dataset")
    if not isinstance(args, LoriArguments):
        raise TypeError(
            f"`args` is a {type(args).__name__}, which has no LoRI fields. Pass a `LoriSFTConfig`, or a config "
            "class that mixes in `LoriArguments`."
        )
    if any(each is not None for each in given.get("optimizers", ())):
        raise ValueError(
            "`optimizers` holds an optimizer or a scheduler. Each phase needs fresh ones, so only classes and names "
            "are allowed. Pass `optimizer_cls_and_kwargs` instead, or set `lr_scheduler_type` in `args`."
        )
    if given.get("peft_config") is not None:
        check_lora_config(given["peft_config"], fresh=True)
    elif isinstance(model, PeftModel):
        check_one_adapter(model)
        check_lora_config(model.peft_config[model.active_adapters[0]], fresh=False)
    else:
        raise ValueError(
            "`peft_config` is missing. LoRI trains an adapter: pass e.g. `peft_config=LoraConfig(r=32, lora_alpha=64, "
            "target_modules='all-linear')`, or a `PeftModel` as `model` to continue its adapter."
        )
    check_not_empty(rows)
    if given.get("formatting_func") is None:
        check_text(rows)
    if isinstance(rows, IterableDataset):
        args.check_streaming()
    if args.warmup_steps and args.lr_scheduler_type == "constant":
        logger.warning(
            f"`warmup_steps={args.warmup_steps}` has no effect with `lr_scheduler_type='constant'`. Pass "
            "'constant_with_warmup', or leave `warmup_steps` unset."
        )


def check_trained(
    model: PeftModel, adapter_name: str, weights: Mapping[str, nn.Parameter], weight_decay: float
) -> None:
    """
    Check what of a model is trained; warn of a weight decay that decays nothing.

    Raises:
        `ValueError`: B is frozen, or something is trained that would not be saved.
    """
    if not any(weight.requires_grad for weight in weights.values()):
        raise ValueError(
            f"Nothing of adapter {adapter_name!r} can be trained: every lora_B is frozen. LoRI trains B. "
            "Load the adapter with `is_trainable=True`."
        )
    if not dense_parameters(model, adapter_name) and weight_decay:
        logger.warning(
            f"`weight_decay={weight_decay}` has no effect: B is exempt, for decay would pull the entries outside the "
            "mask towards zero. Leave it unset to silence this."
        )


def check_selection(masks: LoriMasks | None, weights: Mapping[str, Tensor], sparsity: float, granularity: str) -> None:
    """
    Check that a sparsity selects something; warn where masks that are there override it.

    Raises:
        `ValueError`: it selects nothing.
    """
    if masks is None:
        sizes = [sum(weights[path].numel() for path in paths) for paths in pools(weights, granularity).values()]
        if not any(num_to_select(sparsity, size) for size in sizes):
            raise ValueError(
                f"`sparsity={sparsity}` with `mask_granularity={granularity!r}` selects none of the {sum(sizes):,} "
                "entries of B. At least one must be trained. Lower `sparsity`."
            )
    elif masks.sparsity not in (None, sparsity):
        logger.warning(
            f"`sparsity={sparsity}` has no effect: the task's masks have sparsity {masks.sparsity}. Pass that to "
            "silence this, or leave `mask_name_or_path` unset and give the task a new name to calibrate."
        )
