"""Algorithm 1, line 3: the A that a run begins with, drawn, made from activations, or kept."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from peft import PeftModel

from ..adapter.masks import LoriMasks
from ..method.projections import (
    CONTRASTIVE,
    Projection,
    derive_projection_seed,
    freeze_projections,
    init_projections,
)
from ..method.sharding import engine_dtype
from .activations import Activations, protected_names
from .config import LoriArguments
from .run import LoriRun

logger = get_logger(__name__)


def make_A(
    model: PeftModel,
    run: LoriRun,
    args: LoriArguments,
    masks: LoriMasks | None,
    *,
    accelerator: Accelerator,
    processing_class: Any,
    given: Mapping[str, Any],
) -> Projection:
    """
    Make A anew for a fresh adapter: the one that given masks were calibrated on, or the task's own.

    Args:
        model (`PeftModel`): the model; A is changed in place, and frozen.
        run ([`LoriRun`]): which adapter and task.
        args ([`LoriArguments`]): how A is made.
        masks ([`LoriMasks`] or `None`): masks that were given.
        accelerator (`Accelerator`), processing_class: the trainer's.
        given (`Mapping[str, Any]`): the arguments of the trainer, for the rows.

    Raises:
        `ValueError`: the masks were calibrated on an A that no seed draws.
    """
    dtype = engine_dtype(accelerator)
    if args.projection_init == CONTRASTIVE:
        names = {"accelerator": accelerator, "processing_class": processing_class}
        Activations(model, run.adapter_name, given, args, **names).make_A()
        return Projection(CONTRASTIVE, None, run.fingerprint(dtype), protected_names(args))
    known = (masks.projection if masks is not None else None) or Projection(None, None, "")
    if known.init == CONTRASTIVE:
        raise ValueError(
            f"`projection_init={args.projection_init!r}`, but the given masks were calibrated on a "
            "contrastive A, which no seed draws. Allowed is 'contrastive' with the same rows. Pass that and the "
            "`protect` of the run that the masks come from."
        )
    init = known.init or args.projection_init
    seed = known.seed if args.projection_seed is None else args.projection_seed
    if seed is None:
        seed = derive_projection_seed(args.seed, run.task)
    init_projections(model, run.adapter_name, seed=seed, init=init)
    return Projection(init, seed, run.fingerprint(dtype))


def keep_A(model: PeftModel, run: LoriRun, accelerator: Accelerator) -> Projection:
    """Keep the A of an adapter that is continued; where it came from is known if `lori_trl` loaded it."""
    freeze_projections(model, run.adapter_name)
    if not run.all_masks:
        logger.warning(
            "The adapter is trained and has no task on record: which entries of B belong to what is not known. If "
            "it is a LoRI adapter, load it with `load_lori_adapter`, which brings its masks and history."
        )
    fingerprint = run.fingerprint(engine_dtype(accelerator))
    for masks in run.all_masks.values():
        if masks.projection is not None and masks.projection.fingerprint == fingerprint:
            return masks.projection
    return Projection(None, None, fingerprint)
