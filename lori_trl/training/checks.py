"""What a trainer is asked for: refused before a model is loaded, or before the first step, where it can't be right."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import get_scheduler
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..adapter.layout import check_task_name
from ..adapter.masks import LoriMasks
from ..adapter.memory import remembered
from ..adapter.write import check_output
from ..method.dense_parameters import check_saved, dense_parameters
from ..method.layers import lora_layers, pools
from ..method.lora_options import check_lora_config, check_one_adapter
from ..method.projections import CONTRASTIVE
from ..method.sparsity import num_to_select
from .compat import check_versions
from .config import LoriArguments
from .growth import check_growth
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
        config = model.peft_config[model.active_adapters[0]]
        check_lora_config(config, fresh=False)  # before its layers are looked at: they may be no linear ones
        if is_fresh(model):
            check_lora_config(config, fresh=True)
        _check_adapters(model)
    else:
        raise ValueError(
            "`peft_config` is missing. LoRI trains an adapter: pass e.g. `peft_config=LoraConfig(r=32, lora_alpha=64, "
            "target_modules='all-linear')`, or a `PeftModel` as `model` to continue its adapter."
        )
    fresh = given.get("peft_config") is not None or is_fresh(model)
    if args.grow is not None:
        check_growth(args, args.grow, model, fresh=fresh)
    if args.projection_init == CONTRASTIVE or args.save_moments:
        _check_activations(given, fresh=fresh)
    check_not_empty(rows)
    check_versions(given)
    if given.get("formatting_func") is None:
        text_field = getattr(args, "dataset_text_field", None)
        check_text(rows, "train_dataset", text_field)
        for name, more in (evaluated if isinstance(evaluated, dict) else {"eval_dataset": evaluated}).items():
            check_text(more, name, text_field)
    if isinstance(rows, IterableDataset):
        args.check_streaming()
    check_output(args.output_dir, overwrite=True)
    _check_rollouts(args)
    _check_trackers(args)
    _check_schedule(args)
    if args.warmup_steps and args.lr_scheduler_type == "constant":
        logger.warning(
            f"`warmup_steps={args.warmup_steps}` has no effect with `lr_scheduler_type='constant'`. Pass "
            "'constant_with_warmup', or leave `warmup_steps` unset."
        )


def _check_activations(given: Mapping[str, Any], *, fresh: bool) -> None:
    """Refuse a contrastive A where there is no A to make, and activations where there is no text to take them of."""
    args = given["args"]
    if args.projection_init == CONTRASTIVE and not fresh and args.grow is None:
        raise ValueError(
            "`projection_init='contrastive'` with an adapter that is continued: it keeps the A that it has. Allowed "
            "are a fresh adapter, and rows of A that it gets for the new task. Pass `grow`, e.g. `grow=32`, or leave "
            "`projection_init` unset."
        )
    if given.get("train_dataset") is not None and have_images(given["train_dataset"]):
        raise ValueError(
            f"`projection_init={args.projection_init!r}`, `save_moments={args.save_moments}` with image rows: "
            "activations are taken of text alone. Allowed are rows without images. Leave both unset."
        )


def is_fresh(model: PeftModel) -> bool:
    """Say whether a model's adapter was only just made: its B is zero, and no task is on record."""
    name = model.active_adapters[0]
    layers = lora_layers(model, name)
    return not remembered(model, name)[0] and not any(layer.lora_B[name].weight.any() for layer in layers.values())


def _check_adapters(model: PeftModel) -> None:
    """Refuse adapters that are merged into the base, and names of adapters by which PEFT would lose tensors."""
    merged = sorted(
        {name for module in model.modules() if isinstance(module, LoraLayer) for name in module.merged_adapters}
    )
    if merged:
        raise ValueError(
            f"The adapters {', '.join(merged)} are merged into the base model, where nothing of them can be trained. "
            "LoRI trains an adapter beside its base. Call `model.unmerge_adapter()` first."
        )
    own = ("lora_", "modules_to_save", "token_adapter")
    parts = {
        part
        for name, _ in model.named_modules()
        for part in takewhile(lambda part: not part.startswith(own), name.split("."))
    }
    if clashing := [name for name in model.peft_config if name in parts]:
        raise ValueError(
            f"The adapter's name {clashing[0]!r} is a part of the names of the model's modules. PEFT would leave out "
            "tensors when it saves. Allowed is a name that no module has. Make or load the adapter under another "
            "`adapter_name`."
        )


def _check_rollouts(args: LoriArguments) -> None:
    """Refuse rollouts for which GRPO and RLOO cast the model in place, with all that is trained."""
    half = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    if half is not None and vars(args).get("use_transformers_continuous_batching"):
        raise ValueError(
            f"`use_transformers_continuous_batching=True` with `{'bf16' if args.bf16 else 'fp16'}=True`: the model "
            f"would be cast to {half} at each generation, A and B with it. Allowed with it is float32, or rollouts of "
            "another kind. Pass `bf16=False` and `fp16=False`, or leave it unset."
        )


def _check_trackers(args: LoriArguments) -> None:
    """Refuse a tracker that is not installed, before a model is loaded."""
    installed = get_available_reporting_integrations()
    missing = [name for name in args.report_to if name in INTEGRATION_TO_CALLBACK and name not in installed]
    if missing:
        raise ImportError(
            f"`report_to={missing[0]!r}` is not installed. Installed are: {', '.join(installed) or 'none'}. Run "
            "`pip install tensorboard` for TensorBoard, install the tracker that you mean, or pass "
            "`report_to='none'`."
        )


def _check_schedule(args: LoriArguments) -> None:
    """Refuse a schedule that lacks an argument: the Trainer would notice it after the calibration."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, args.lr_scheduler_kwargs)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"`lr_scheduler_type={str(args.lr_scheduler_type.value)!r}` with `lr_scheduler_kwargs="
            f"{args.lr_scheduler_kwargs}` makes no schedule ({error}). It needs its own arguments. Pass them as "
            "`lr_scheduler_kwargs`, or take a schedule that needs none, e.g. 'cosine'."
        ) from error


def check_task(task: str, args: LoriArguments, model: Any) -> None:
    """
    Check a task's name: it names a file, and a name that nobody chose is not one that the adapter has already.

    Args:
        task (`str`): the name, given or by default.
        args ([`LoriArguments`]): whether it was given.
        model (`str`, `PreTrainedModel` or `PeftModel`): what is to be trained.

    Raises:
        `ValueError`: it can't be a file's name, or the adapter has a task of this name.
    """
    check_task_name(task)
    if args.task_name is None and isinstance(model, PeftModel):
        masks = remembered(model, model.active_adapters[0])[0]
        if task in masks:
            raise ValueError(
                f"`task_name` is not given, and the data's own name {task!r} is that of a task which the adapter has "
                "already. A second task needs a name of its own. Pass another `task_name`; or this one, to go on "
                "with that task."
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


def check_selection(
    masks: LoriMasks | None,
    weights: Mapping[str, Tensor],
    sparsity: float,
    granularity: str,
    more_sparsities: Sequence[float] = (),
) -> None:
    """
    Check that each sparsity selects something; warn where masks that are there override it.

    Raises:
        `ValueError`: it selects nothing.
    """
    if masks is None:
        _check_any(sparsity, weights, granularity, "sparsity")
        for more in more_sparsities:
            _check_any(more, weights, granularity, "calibration_sparsities")
    elif masks.sparsity not in (None, sparsity):
        logger.warning(
            f"`sparsity={sparsity}` has no effect: the task's masks have sparsity {masks.sparsity}. Pass that to "
            "silence this, or leave `mask_name_or_path` unset and give the task a new name to calibrate."
        )


def check_selected(masks: LoriMasks, sparsity: float, granularity: str) -> None:
    """Warn where far fewer entries were selected than the sparsity asks for: the others had no saliency at all."""
    sizes = [sum(masks[path].numel() for path in paths) for paths in pools(masks, granularity).values()]
    wanted = sum(num_to_select(sparsity, size) for size in sizes)
    if masks.num_selected < 0.9 * wanted:
        empty = [path for path, mask in masks.items() if not mask.any()]
        logger.warning(
            f"`sparsity={sparsity}` asks for {wanted:,} entries of B, and only {masks.num_selected:,} moved in the "
            f"calibration; {len(empty)} of {len(masks)} modules have none{f', e.g. {empty[0]}' if empty else ''}. The "
            "others had no gradient: experts that no token reached, or modules that the loss does not depend on. "
            "Calibrate for longer, or leave these modules out of `target_modules`."
        )


def _check_any(sparsity: float, weights: Mapping[str, Tensor], granularity: str, name: str) -> None:
    sizes = [sum(weights[path].numel() for path in paths) for paths in pools(weights, granularity).values()]
    if not any(num_to_select(sparsity, size) for size in sizes):
        raise ValueError(
            f"`{name}={sparsity}` with `mask_granularity={granularity!r}` selects none of the {sum(sizes):,} "
            f"entries of B. At least one must be trained. Lower `{name}`."
        )
