"""The optimizer of each phase: with the phase's own rate, and with all that is trained in it."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..method.sharding import change, gather
from .run import LoriRun

OptimizerClass = tuple[Any, dict[str, Any]]
# With these, an optimizer is made for matrices that somebody has chosen: B's, and not what is packed of them.
ARE_PARAMETERS = {"params", "model", "optimizer_dict"}


def phase_optimizer(given: OptimizerClass | None, learning_rate: float, run_rate: float) -> OptimizerClass | None:
    """
    Return the optimizer class of a phase, with the phase's own learning rate.

    The Trainer gives an `optimizer_cls_and_kwargs` no rate: without one there, its class takes its default.

    Args:
        given (`tuple[type, dict]`, *optional*): the trainer's `optimizer_cls_and_kwargs`. It is not changed.
        learning_rate (`float`): the phase's.
        run_rate (`float`): the `learning_rate` of the arguments, which a rate that was given has to be.

    Raises:
        `ValueError`: another rate was given, which would hold in both phases.
    """
    if given is None:
        return None
    optimizer_class, kwargs = given[0], dict(given[1])
    groups = [group for group in kwargs.get("params", ()) if isinstance(group, dict)]
    rates = {each["lr"] for each in (kwargs, *groups) if each.get("lr") is not None}
    if rates - {run_rate}:
        raise ValueError(
            f"`optimizer_cls_and_kwargs` has lr={min(rates - {run_rate})}, and `learning_rate={run_rate}`. Each phase "
            "has a rate of its own: the optimizer's must be that of `args`. Leave `lr` out, and set `learning_rate` "
            "and `calibration_learning_rate`."
        )
    if groups:
        kwargs["params"] = [{**group, "lr": learning_rate} if "lr" in group else dict(group) for group in groups]
    if kwargs.get("lr") is not None or ("lr" not in kwargs and _takes_rate(optimizer_class)):
        kwargs["lr"] = learning_rate
    return optimizer_class, kwargs


def _takes_rate(optimizer_class: Any) -> bool:
    return inspect.isclass(optimizer_class) and "lr" in inspect.signature(optimizer_class).parameters


def check_all_is_optimized(trained: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer) -> None:
    """
    Check, before the first step, that an optimizer has all that is to be trained.

    Args:
        trained (`Iterable[tuple[str, nn.Parameter]]`): names and parameters.
        optimizer (`Optimizer`): the phase's.

    Raises:
        `ValueError`: a parameter would stay as it is.
    """
    there = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [name for name, parameter in trained if parameter.requires_grad and id(parameter) not in there]
    if left_out:
        raise ValueError(
            f"The optimizer {optimizer_name(optimizer)} has {len(left_out)} of the trained parameters in no group, "
            f"e.g. `{left_out[0]}`: they would stay as they are. All that is trained must be in it. With groups by "
            "name or made by hand, pass `sparse_backend='hook'`, where B itself is trained; or leave the groups to "
            "the trainer."
        )


def check_frozen_entries(run: LoriRun, optimizer: Optimizer, dtype: torch.dtype) -> None:
    """
    Check the method's promise, after the first step of every adaptation and after the last.

    Args:
        run ([`LoriRun`]): the run.
        optimizer (`Optimizer`): the adaptation's, for the message.
        dtype (`torch.dtype`): the type in which the engine holds A.

    Raises:
        `RuntimeError`: an entry outside the mask, or A, is not what it was.
    """
    masks: Mapping[str, torch.Tensor] = run.masks or {}
    moved = [
        path
        for path, weight in run.weights.items()
        if gather(change(weight, run.initial_weights[path])).cpu()[~masks[path]].any()
    ]
    if moved or run.fingerprint(dtype) != run.projection.fingerprint:
        raise RuntimeError(
            f"The optimizer {optimizer_name(optimizer)} moved frozen entries of {', '.join(moved[:3]) or 'A'}. LoRI "
            "needs one that leaves entries without a gradient alone. Use e.g. `optim='adamw_torch'`."
        )


def check_something_moved(run: LoriRun, optimizer: Optimizer, learning_rate: float) -> None:
    """
    Check that the adaptation has changed B.

    Raises:
        `RuntimeError`: it is what it was before.
    """
    if not any(gather(change(weight, run.initial_weights[path])).any() for path, weight in run.weights.items()):
        raise RuntimeError(
            f"The adaptation moved no entry of B, with the optimizer {optimizer_name(optimizer)} at `learning_rate="
            f"{learning_rate}`. A run that trains nothing is none. Raise the rate or the number of steps, and check "
            "that the rows have completions to learn from."
        )


def optimizer_name(optimizer: Any) -> str:
    """Return the name of an optimizer's class, without accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__
