"""Callbacks over two phases, and what of a trainer a phase must not leave to the next."""

import copy
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..method.sparse import fold_values

_CONTAINERS = (dict, defaultdict, list, tuple, set, deque)


class PhaseCallback(TrainerCallback):
    """
    Keep B current while its packed values are trained, see after the first step that the optimizer leaves frozen
    entries alone, and name the phase on the progress bar.

    It comes first in line, so that the other callbacks see the B that a step has made.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.seen: Any = None  # the optimizer whose first step was looked at

    def on_optimizer_step(self, args, state, control, **kwargs):
        fold_values(self.trainer.model, self.trainer.run.adapter_name)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.phase == "adapting" and self.seen is not self.trainer.optimizer:
            self.seen = self.trainer.optimizer
            self.trainer.check_frozen_entries()

    def on_epoch_begin(self, args, state, control, **kwargs):
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_description(self.trainer.phase)


class CalibrationCallbacks(CallbackHandler):
    """
    The callbacks while calibrating. They and the log get its figures under names of its own, `calibration_loss`; the
    trainer, which looks for `eval_loss` to find the best checkpoint, keeps the names that it gave.

    Args:
        outer (`CallbackHandler`): the trainer's own.
        callbacks (`list[TrainerCallback]`): which callbacks see the calibration.
    """

    def __init__(self, outer: CallbackHandler, callbacks: list[TrainerCallback]):
        self.__dict__.update(vars(outer), callbacks=callbacks)  # all that the trainer's own knows of the run

    def on_log(self, args, state, control, logs, **kwargs):
        figures = calibration_figures(logs)
        state.log_history[-1] = {**figures, "step": state.global_step}
        return super().on_log(args, state, control, figures, **kwargs)


def calibration_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Name figures after the calibration that they are of."""
    return {f"calibration_{name}": value for name, value in figures.items()}


@contextmanager
def calibration_callbacks(trainer: Trainer, trackers: Mapping[int, TrainerCallback]) -> Iterator[None]:
    """
    Let the calibration have its own trackers and no early stopping while the context lasts.

    A callback that is added or removed meanwhile is so for the adaptation, too.

    Args:
        trainer (`Trainer`): the trainer.
        trackers (`Mapping[int, TrainerCallback]`): `id` of one of the trainer's trackers -> the calibration's.
    """
    outer = trainer.callback_handler
    seen = [each for each in outer.callbacks if not isinstance(each, EarlyStoppingCallback)]
    stand_ins = [trackers.get(id(each), each) for each in seen]
    inner = trainer.callback_handler = CalibrationCallbacks(outer, list(stand_ins))
    try:
        yield
    finally:
        there = {id(each) for each in inner.callbacks}
        removed = {id(own) for own, stand_in in zip(seen, stand_ins, strict=True) if id(stand_in) not in there}
        added = [each for each in inner.callbacks if all(each is not stand_in for stand_in in stand_ins)]
        outer.callbacks = [each for each in outer.callbacks if id(each) not in removed] + added
        trainer.callback_handler = outer


@contextmanager
def swapped(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object other attributes while the context lasts."""
    before = {name: getattr(owner, name) for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(before)


@contextmanager
def counters_set_back(trainer: Trainer, names: Collection[str]) -> Iterator[None]:
    """
    Set a trainer's plain attributes back to what they were when the context ends.

    Trainers keep counters, figures that are not yet logged, generated completions and controlled coefficients under
    names of their own. All of them are numbers, text and tensors, alone or in containers; whatever else a trainer has
    (model, optimizer, data, callbacks) is left alone.

    Args:
        trainer (`Trainer`): the trainer.
        names (`Collection[str]`): the attributes that TRL's trainer made. Those of a subclass are its own affair.
    """
    before = {name: vars(trainer)[name] for name in names if _is_plain(vars(trainer)[name])}
    before = copy.deepcopy(before)
    try:
        yield
    finally:
        vars(trainer).update(before)


def _is_plain(value: Any) -> bool:
    if type(value) in _CONTAINERS:
        values = value.values() if isinstance(value, dict) else value
        return all(_is_plain(each) for each in values)
    if isinstance(value, Tensor):
        return not value.requires_grad
    return value is None or isinstance(value, (bool, int, float, str))
