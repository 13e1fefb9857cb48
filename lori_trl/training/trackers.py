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

from .run import LoriRun


class Trackers:
    """
    The callbacks that a Trainer made for `report_to`. Each begins one run at its tracker, with the arguments of that
    moment, and keeps to it. So that each phase has a run of its own, the calibration has callbacks of its own.

    Args:
        trainer (`Trainer`): the trainer, as it was made.
        given (`Sequence[TrainerCallback]`): the callbacks that its user made; they are left alone.
    """

    def __init__(self, trainer: Trainer, given: Sequence[Any]):
        kinds = get_reporting_integration_callbacks(trainer.args.report_to)
        self.trainer, self.run_name = trainer, trainer.args.run_name
        self.own = [each for each in trainer.callback_handler.callbacks if type(each) in kinds and each not in given]

    def name_run(self, args: TrainingArguments, run: LoriRun, phase: str, folder: str | None = None) -> None:
        """
        Name the runs that begin next after the phase. TensorBoard's is a folder of this name.

        Args:
            args (`TrainingArguments`): the phase's; they get the name.
            run ([`LoriRun`]): names the runs where the arguments gave no name.
            phase (`str`): what comes last in the name.
            folder (`str`, *optional*): where TensorBoard's `runs` are; by default in the `output_dir` of `args`.
        """
        args.run_name = f"{self.run_name or f'{run.task}-{str(run.id)[:8]}'}-{phase}"
        runs = os.path.expanduser(
            os.getenv("TENSORBOARD_LOGGING_DIR", os.path.join(folder or args.output_dir, "runs"))
        )
        for each in self.own:
            if isinstance(each, TensorBoardCallback):
                each.logging_dir = os.path.join(runs, args.run_name)

    @contextmanager
    def for_the_calibration(self, args: TrainingArguments) -> Iterator[dict[int, TrainerCallback]]:
        """
        Make new callbacks, which begin runs of their own, for the calibration. These runs end with the context.

        Where the user has begun a run (`wandb.init()`, `mlflow.start_run()`), both phases go into that one: its
        callback stays, and tells the tracker the arguments `args` of both phases at once.

        Yields:
            `dict[int, TrainerCallback]`: `id` of the trainer's callback -> the calibration's.
        """
        before, ends_wandb = self.own, False
        for each in before:
            if _has_a_run(each):
                each.setup(args, self.trainer.state, self.trainer.model)
            ends_wandb |= isinstance(each, WandbCallback) and not _has_a_run(each)
        new = {id(each): type(each)() for each in before if not _has_a_run(each)}
        self.own = list(new.values())
        try:
            yield new
        finally:
            self.own = before
            if ends_wandb:
                import wandb

                wandb.finish()  # its callback ends no run


def _has_a_run(callback: TrainerCallback) -> bool:
    """Say whether a tracker would go on with a run that its user has begun."""
    if isinstance(callback, WandbCallback):
        import wandb

        return wandb.run is not None
    if isinstance(callback, MLflowCallback):
        import mlflow

        return mlflow.active_run() is not None
    return False
