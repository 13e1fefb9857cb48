"""Which backend trains B: packed where it is possible and saves memory, hook elsewhere."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from ..adapter.masks import LoriMasks
from .config import LoriArguments
from .optimizers import ARE_PARAMETERS
from .parallel_engines import Engine

logger = get_logger(__name__)

Optimizer = tuple[Any, Mapping[str, Any]]  # its class, and what it is made with besides parameters


def settled_backend(args: LoriArguments, engine: Engine, masks: LoriMasks | None, optimizer: Optimizer) -> str:
    """
    Return which backend a run has, `"packed"` or `"hook"`, and log why.

    Args:
        args ([`LoriArguments`]): the run's.
        engine ([`Engine`]): what spreads it over devices.
        masks ([`LoriMasks`] or `None`): which entries of B are trained; `None` before the calibration.
        optimizer (`tuple[type, Mapping[str, Any]]`): of the adaptation.

    Raises:
        `ValueError`: the optimizer moves entries that have no gradient, or vLLM would be sent packed values.
    """
    density = 1 - args.sparsity if masks is None else masks.density
    backend, why = choose_backend(args, engine, density, calibrate=masks is None, optimizer=optimizer)
    logger.info(f"`sparse_backend` is {backend!r}: {why}.")
    return backend


def choose_backend(
    args: LoriArguments, engine: Engine, density: float, *, calibrate: bool, optimizer: Optimizer
) -> tuple[str, str]:
    """
    Choose a run's backend where it is `"auto"`, and check the one that is asked for.

    Args:
        args ([`LoriArguments`]): the run's.
        engine ([`Engine`]): what spreads it over devices.
        density (`float`): the share of B that the adaptation trains, a fraction in (0, 1].
        calibrate (`bool`): whether all of B is trained first.
        optimizer (`tuple[type, Mapping[str, Any]]`): of the adaptation.

    Returns:
        `tuple[str, str]`: `"packed"` or `"hook"`, and why.

    Raises:
        `ValueError`: the optimizer moves entries that have no gradient, or vLLM would be sent packed values.
    """
    asked, rollouts = args.sparse_backend, vars(args).get("use_vllm", False)
    if asked == "packed" and rollouts:
        raise ValueError(
            "`sparse_backend='packed'` with `use_vllm=True`: vLLM is sent the model's parameters by name, and knows "
            "no packed values. Allowed with it is 'hook'. Leave `sparse_backend` unset."
        )
    shape_matters = density < 1 and _depends_on_shape(optimizer, args.device)
    if asked == "packed" and shape_matters:
        logger.warning(
            f"`sparse_backend='packed'` with {_name(optimizer)}: its update of an entry depends on the shape of the "
            "whole parameter, and packed values are vectors. So the run is not that of 'hook', the paper's way. Leave "
            "`sparse_backend` unset to have that one."
        )
    if asked != "auto":
        return asked, "it was asked for"
    saved = 1 - engine.adaptation_bytes(density, "packed") / engine.adaptation_bytes(density, "hook")
    reasons_for_hook = {
        "ZeRO-3 keeps B partitioned": engine.name == "ZeRO-3",
        "FSDP2 takes up no new parameters after a calibration": engine.name == "FSDP2" and calibrate,
        "vLLM is sent the model's own parameters": rollouts,
        f"the update of {_name(optimizer)} depends on the shape of a parameter": shape_matters,
        "at this density it takes no more memory": density < 1 and saved <= 0,
    }
    for reason, holds in reasons_for_hook.items():
        if holds:
            return "hook", reason
    return "packed", f"what the adaptation holds for B is {saved:.0%} less" if density < 1 else "all of B is trained"


def _name(optimizer: Optimizer) -> str:
    return getattr(optimizer[0], "__name__", repr(optimizer[0]))


def _depends_on_shape(optimizer: Optimizer, device: torch.device) -> bool:
    """
    Find out by trial whether an optimizer trains a matrix's entries otherwise where they are a vector of their own.

    Adafactor, LAMB and others do, which look at rows, columns or norms. Some take no vectors, as Muon.

    Raises:
        `ValueError`: it moves entries that have no gradient.
    """
    if ARE_PARAMETERS & set(optimizer[1]):
        return True
    # Other numbers in every entry and step. The mask has no whole column left out: that one, Muon would leave alone.
    # Outside of the mask B is not zero, as in a continued adapter.
    numbers = torch.arange(1, 49, dtype=torch.float32, device=device).view(8, 6)
    mask, start = numbers % 5 < 2, numbers.sin() / 10
    gradients = [(numbers * step).cos() for step in (1, 2, 3)]
    try:
        dense = _train(optimizer, start, [gradient * mask for gradient in gradients])
    except Exception as error:  # whatever a foreign optimizer needs that is not here: closures, other devices
        logger.info(f"{_name(optimizer)} could not be tried: {error}")
        return True
    if not torch.equal(dense[~mask], start[~mask]):
        raise ValueError(
            f"The optimizer {_name(optimizer)} moves entries that have no gradient. LoRI trains the entries of a "
            "mask, and the others stay as they are. Pass an optimizer that leaves them alone, e.g. "
            "`optim='adamw_torch'`, or train all of B with `sparsity=0`."
        )
    try:
        packed = _train(optimizer, start[mask], [gradient[mask] for gradient in gradients])
    except Exception as error:
        logger.info(f"{_name(optimizer)} takes no vectors: {error}")
        return True
    moved = (dense - start).abs().max()
    return bool((packed - dense[mask]).abs().max() > 1e-3 * moved)


def _train(optimizer: Optimizer, start: Tensor, gradients: list[Tensor]) -> Tensor:
    """Return what an optimizer makes of a parameter by given gradients. B is exempt from weight decay."""
    parameter = nn.Parameter(start.clone())
    optimizer_class, arguments = optimizer
    made = optimizer_class([{"params": [parameter], "weight_decay": 0.0}], **arguments)
    if callable(getattr(made, "train", None)):  # those without a schedule want to be told, as the Trainer does
        made.train()
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach()
