"""TensorBoard, MLflow, Trackio, W&B and others over two phases: a run for each, named after it, with its arguments."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
)


class Trackers:
    """
    The callbacks that a Trainer made for `report_to`. Each begins one run, with the arguments of that moment, and
    keeps to it: the calibration therefore has callbacks of its own.

    Args:
        trainer (`Trainer`): the trainer, as it was made.
        given (`Sequence[TrainerCallback]`): the callbacks that its user made; they are left alone.
    """

    def __init__(self, trainer: Trainer, given: Sequence[Any]):
        kinds = get_reporting_integration_callbacks(trainer.args.report_to)
        self.trainer = trainer
        self.own = [each for each in trainer.callback_handler.callbacks if type(each) in kinds and each not in given]

    def name_run(self, args: TrainingArguments, folder: str, name: str) -> None:
        """Name the runs that begin next. TensorBoard's is a folder of this name, in `folder`."""
        args.run_name = name
        for each in self.own:
            if isinstance(each, TensorBoardCallback):
                each.logging_dir = os.path.join(os.path.expanduser(os.getenv("TENSORBOARD_LOGGING_DIR", folder)), name)

    @contextmanager
    def apart(self, args: TrainingArguments) -> Iterator[dict[TrainerCallback, TrainerCallback]]:
        """
        Yield new callbacks in place of the trainer's: old -> new. What they begin ends with the context.

        A run that the user began serves both phases, with the arguments `args` of the whole run.
        """
        before, ends_wandb = self.own, False
        for each in before:
            if _goes_on(each):
                each.setup(args, self.trainer.state, self.trainer.model)
            ends_wandb |= isinstance(each, WandbCallback) and not _goes_on(each)
        new = {each: type(each)() for each in before if not _goes_on(each)}
        self.own = list(new.values())
        try:
            yield new
        finally:
            self.own = before
            if ends_wandb:
                import wandb

                wandb.finish()  # its callback ends no run


def _goes_on(callback: TrainerCallback) -> bool:
    """Say whether a tracker would go on with a run that its user began."""
    if isinstance(callback, WandbCallback):
        import wandb

        return wandb.run is not None
    if isinstance(callback, MLflowCallback):
        import mlflow

        return mlflow.active_run() is not None
    return False
