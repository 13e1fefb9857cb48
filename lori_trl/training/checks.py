"""What a trainer is asked for: refused before a model is loaded, or before the first step, where it can't be right."""

from collections.abc import Mapping
from typing import Any

from accelerate.logging import get_logger
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor, nn

from ..adapter.masks import LoriMasks
from ..method.dense_parameters import check_saved, dense_parameters
from ..method.layers import pools
from ..method.lora_options import check_lora_config, check_one_adapter
from ..method.projections import CONTRASTIVE
from ..method.sparsity import num_to_select
from .compat import check_versions
from .config import LoriArguments
from .training_rows import check_not_empty, check_text, have_images

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
    args, model = given.get("args"), given["model"]
    rows, evaluated = given.get("train_dataset"), given.get("eval_dataset") or {}
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
    if args.projection_init == CONTRASTIVE:
        _check_contrastive(given)
    check_not_empty(rows)
    check_versions(given)
    if given.get("formatting_func") is None:
        text_field = getattr(args, "dataset_text_field", None)
        check_text(rows, "train_dataset", text_field)
        for name, more in (evaluated if isinstance(evaluated, dict) else {"eval_dataset": evaluated}).items():
            check_text(more, name, text_field)
    if isinstance(rows, IterableDataset):
        args.check_streaming()
    if args.warmup_steps and args.lr_scheduler_type == "constant":
        logger.warning(
            f"`warmup_steps={args.warmup_steps}` has no effect with `lr_scheduler_type='constant'`. Pass "
            "'constant_with_warmup', or leave `warmup_steps` unset."
        )


def _check_contrastive(given: Mapping[str, Any]) -> None:
    """Refuse a contrastive A where there is no A to make, or no text to make it from."""
    if given.get("peft_config") is None:
        raise ValueError(
            "`projection_init='contrastive'` with an adapter that is continued: it keeps the A that it has. Allowed "
            "is a fresh adapter. Merge the earlier adapter into the base and pass a `peft_config`, or leave "
            "`projection_init` unset."
        )
    if given.get("train_dataset") is not None and have_images(given["train_dataset"]):
        raise ValueError(
            "`projection_init='contrastive'` with image rows: activations are taken of text alone. Allowed are rows "
            "without images. Leave `projection_init` unset."
        )


def check_trained(
    model: PeftModel, adapter_name: str, weights: Mapping[str, nn.Parameter], args: LoriArguments
) -> None:
    """
    Check what of a model is trained; warn of B that is frozen in part, and of a weight decay that decays nothing.

    Raises:
        `ValueError`: B is frozen, something is trained that would not be saved, or that tasks can't share.
    """
    if not any(weight.requires_grad for weight in weights.values()):
        raise ValueError(
            f"Nothing of adapter {adapter_name!r} can be trained: every lora_B is frozen. LoRI trains B. "
            "Load the adapter with `is_trainable=True`."
        )
    if frozen := [path for path, weight in weights.items() if not weight.requires_grad]:
        logger.warning(
            f"{len(frozen)} of {len(weights)} modules have a frozen lora_B and are not trained, e.g. {frozen[0]}. To "
            "train them too, set `requires_grad_()`."
        )
    check_saved(model, adapter_name)
    dense = dense_parameters(model, adapter_name)
    if dense and args.disjoint_masks:
        raise ValueError(
            f"`disjoint_masks=True`, but {len(dense)} parameters besides B are trained, e.g. {next(iter(dense))}. "
            "Every task would change them for the others. Allowed is B alone. Leave `modules_to_save` and "
            "`trainable_token_indices` out of the `LoraConfig`, or `disjoint_masks` unset."
        )
    if args.weight_decay and not dense:
        logger.warning(
            f"`weight_decay={args.weight_decay}` has no effect: B is exempt, for decay would pull the entries outside "
            "the mask towards zero. Leave it unset to silence this."
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
