"""A new task on an earlier adapter with an A of its own: the adapter gets more rank, and its earlier part stays."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from peft import LoraConfig, PeftModel

from ..adapter.masks import LoriMasks
from ..adapter.memory import remembered
from ..adapter.record_fields import TaskRecord
from ..adapter.vllm_limits import describe_rank
from ..method.dense_parameters import dense_parameters
from ..method.growth import alpha_for, grow_layers, widened
from ..method.layers import lora_layers
from ..method.projections import (
    CONTRASTIVE,
    Block,
    Projection,
    derive_projection_seed,
    draw_projection,
    fingerprint,
)
from ..method.sharding import engine_dtype, is_sharded
from .activations import Activations, protected_names
from .config import LoriArguments
from .initial_A import keep_A
from .run import LoriRun

logger = get_logger(__name__)


def check_growth(args: LoriArguments, grow: int, model: Any, *, fresh: bool) -> None:
    """
    Refuse to grow what has no earlier task, or can't be grown, before the trainer touches it.

    Args:
        args ([`LoriArguments`]): what has no meaning with it.
        grow (`int`): how much rank it is to get.
        model (`str`, `PreTrainedModel` or `PeftModel`): what is to be trained.
        fresh (`bool`): whether its adapter is a new one.

    Raises:
        `ValueError`: the adapter is fresh, or its tasks or ranks are not known; or masks were given.
    """
    if fresh or not remembered(model, model.active_adapters[0])[0]:
        raise ValueError(
            f"`grow={grow}`, but {'the adapter is a new one' if fresh else 'no task of the adapter is on record'}"
            ". Allowed is an adapter with tasks, which get company. Pass one as `adapter_name_or_path`, or one that "
            "`load_lori_adapter` has loaded as `model`; or leave `grow` unset, and set the rank by `lora_r`."
        )
    if args.mask_name_or_path:
        raise ValueError(
            f"`mask_name_or_path={args.mask_name_or_path}` with `grow={grow}`: masks belong to an A, and the new "
            "rows of A are made by this run. Allowed is a calibration. Leave `mask_name_or_path` unset, or `grow`."
        )
    grown_config(model.peft_config[model.active_adapters[0]], grow)
    name = model.active_adapters[0]
    if dense := dense_parameters(model, name):
        raise ValueError(
            f"`grow={grow}`, but {len(dense)} parameters besides B are trained, e.g. {next(iter(dense))}. The "
            "new task would change them for the earlier ones. Allowed is B alone. Leave `grow` unset, or begin with "
            "an adapter without `modules_to_save` and `trainable_token_indices`."
        )
    if any(is_sharded(layer.lora_A[name].weight) for layer in lora_layers(model, name).values()):
        raise ValueError(
            f"`grow={grow}` with an adapter that FSDP2 or ZeRO-3 has sharded already. Allowed is one as it was "
            "loaded. Load base and adapter again for this task."
        )


def grown_config(config: LoraConfig, grow: int) -> tuple[int, int | float]:
    """
    Return rank and alpha of an adapter that is grown.

    Args:
        config (`LoraConfig`): its settings.
        grow (`int`): how much rank it gets.

    Raises:
        `ValueError`: its modules have ranks of their own, or no alpha keeps its scaling to the last bit.
    """
    if patterns := [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]:
        raise ValueError(
            f"`grow={grow}`, but the adapter has a `{patterns[0]}`: its modules have no rank or scaling in common. "
            "Allowed is one rank and one alpha. Leave `grow` unset, or bring the adapter to one rank by `lori merge "
            "ADAPTER --method svd`."
        )
    rslora = bool(config.use_rslora)
    scaling = config.lora_alpha / (math.sqrt(config.r) if rslora else config.r)
    alpha = alpha_for(scaling, config.r + grow, use_rslora=rslora)
    if alpha is None:
        near = sorted(range(1, 4 * config.r + grow), key=lambda more: abs(more - grow))
        fits = [more for more in near if alpha_for(scaling, config.r + more, use_rslora=rslora) is not None][:3]
        raise ValueError(
            f"`grow={grow}`: at rank {config.r + grow}, no `lora_alpha` gives the adapter's scaling of {scaling} to "
            f"the last bit, so the earlier tasks would change. Allowed nearby are {', '.join(map(str, sorted(fits)))}"
            ". Pass one of these."
        )
    return config.r + grow, alpha


def grow_adapter(
    model: PeftModel,
    run: LoriRun,
    args: LoriArguments,
    *,
    accelerator: Accelerator,
    processing_class: Any,
    given: Mapping[str, Any],
) -> LoriRun:
    """
    Give an adapter new rows of A and columns of B for a task, and return the run that trains these alone.

    Args:
        model (`PeftModel`): the model; its adapter is changed in place.
        run ([`LoriRun`]): the run, with the adapter as it was.
        args ([`LoriArguments`]): how many rows, and how they are made.
        accelerator (`Accelerator`), processing_class: the trainer's.
        given (`Mapping[str, Any]`): the arguments of the trainer, for the rows of data.

    Raises:
        `ValueError`: the adapter has the task already, or the same rows of A.
    """
    grow, name, seed, protected = args.grow or 0, run.adapter_name, None, None
    if run.masks is not None:
        raise ValueError(
            f"`grow={grow}`, `task_name={run.task!r}`: the adapter has this task already, with columns of its own. "
            "Allowed is a new task. Pass another `task_name`; or leave `grow` unset, to go on with this one."
        )
    before = keep_A(model, run, accelerator)
    rank = model.peft_config[name].r
    blocks = before.as_blocks(rank)
    if args.projection_init == CONTRASTIVE:
        engine = {"accelerator": accelerator, "processing_class": processing_class}
        rows, protected = Activations(model, name, given, args, **engine).directions(grow), protected_names(args)
    else:
        seed = args.projection_seed
        seed = derive_projection_seed(args.seed, run.task) if seed is None else seed
        if any(seed == block.seed for block in blocks):
            raise ValueError(
                f"`grow={grow}` with the projection seed {seed}, from which the adapter has rows of A already. Two "
                "tasks need different ones. Give the task a `projection_seed` or `task_name` of its own."
            )
        rows = {
            path: draw_projection(path, grow, layer.in_features, seed=seed, init=args.projection_init)
            for path, layer in run.lora_layers.items()
        }
    summed, alpha = grown_config(model.peft_config[name], grow)
    grow_layers(model, name, rows, alpha)
    dtype = engine_dtype(accelerator)
    made = fingerprint({path: weight.cpu().to(dtype) for path, weight in rows.items()})
    block = Block(grow, args.projection_init, seed, made, protected)
    projection = Projection.of_blocks((*blocks, block), run.fingerprint(dtype))
    free = {path: torch.ones(len(weight), grow, dtype=torch.bool) for path, weight in run.weights.items()}
    earlier = {task: _on_grown(masks, before, projection, summed) for task, masks in run.earlier_masks.items()}
    logger.info(f"`grow={grow}`: the adapter has {describe_rank(summed)}.")
    return replace(
        run,
        projection=projection,
        columns=(rank, summed),
        feasible=LoriMasks(widened(free, summed, start=rank)),
        earlier_masks=earlier,
        earlier_tasks=_with_columns(run, rank),
    )


def _on_grown(masks: LoriMasks, before: Projection, projection: Projection, rank: int) -> LoriMasks:
    """Return an earlier task's masks as masks of the grown adapter."""
    own = projection if masks.projection == before else masks.projection
    return LoriMasks(widened(masks, rank), **vars(masks.metadata) | {"projection": own})


def _with_columns(run: LoriRun, rank: int) -> list[TaskRecord]:
    """Return what is on record of the earlier tasks, each with the columns that it has."""
    on_record = {each.task: each for each in run.earlier_tasks}
    tasks = [on_record.get(task, TaskRecord(task, masks.num_selected)) for task, masks in run.earlier_masks.items()]
    return [replace(each, columns=each.columns or (0, rank)) for each in tasks]
