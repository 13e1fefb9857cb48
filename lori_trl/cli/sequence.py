"""`lori sft --sequence`: task after task, each on the adapter of the one before it, and what was forgotten."""

import argparse
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.layout import ADAPTER_WEIGHTS, RECIPE_NAME, RECORD_NAME
from ..inputs.yaml_reader import read_mapping
from ..recipes.find import find_recipe
from . import eval
from .launching import take_launch_options
from .terminal import show
from .training_options import parse, training_parser

# What of a recipe as it was run may change when a sequence goes on.
_OF_THE_CALL = ("resume_from_checkpoint", "output_dir", "adapter_name_or_path")


@dataclass(frozen=True)
class Stage:
    """A task of a sequence."""

    task: str  # its name
    folder: Path  # where its adapter goes
    call: list[str]  # the call of `lori sft` that trains it
    recipe: dict[str, Any]  # as it is run
    base: str  # the base model
    held_out: str | None  # where its held-out rows are; `None` where they are in no local folder
    is_done: bool  # whether its adapter is there already


def take_sequence(arguments: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """Take `--sequence` and what belongs to it out of a call. Returns that, if it is there, and what is left."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--sequence", nargs="+")
    finder.add_argument("--held_out", nargs="+", default=[])
    finder.add_argument("--output_dir")
    finder.add_argument("--dry_run", action="store_true")
    options, rest = finder.parse_known_args(arguments)
    return (None, arguments) if options.sequence is None else (options, rest)


def run_sequence(options: argparse.Namespace, rest: list[str], train: Callable[[list[str]], int]) -> int:
    """
    Train the stages of a sequence that are not done yet, and measure every task after every stage.

    Args:
        options (`argparse.Namespace`): from [`take_sequence`].
        rest (`list[str]`): the other arguments, which hold for every stage.
        train (`Callable[[list[str]], int]`): runs a call of `lori sft` and returns its exit code.

    Returns:
        `int`: the exit code.

    Raises:
        `ValueError`: two stages are of one task or on two bases, a stage was trained with other settings, or there are
            no held-out rows.
        `FileNotFoundError`: there is no such recipe.
    """
    stages = _plan(options, rest)
    sets = options.held_out or [f"{stage.task}={stage.held_out}" for stage in stages]
    for number, stage in enumerate(stages, start=1):
        state = "done" if stage.is_done else "to be trained"
        show(f"stage {number} of {len(stages)}: {stage.task}, in {stage.folder}: {state}")
    if options.dry_run:
        return 0
    for number, stage in enumerate(stages, start=1):
        if stage.is_done:
            continue
        show(f"stage {number} of {len(stages)}: {stage.task}")
        if code := train([*stage.call, *_resuming(stage)]):
            return code
        gc.collect()  # a trainer and its model are a circle
    folders = [str(stage.folder) for stage in stages]
    matrix = str(Path(options.output_dir) / "matrix.json")
    call = ["eval", "--sequence", *folders, "--dataset_path", *sets, "--output_path", matrix, "--overwrite"]
    parser = argparse.ArgumentParser()
    eval.add_parser(parser.add_subparsers())
    eval.run(parser.parse_args([*call, "--base_model", stages[0].base]))
    return 0


def _plan(options: argparse.Namespace, rest: list[str]) -> list[Stage]:
    """Plan all stages, and check what can be known of them before the first one is trained."""
    from ..recipes.data import default_task_name
    from ..recipes.data_files import locate_data

    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"`--sequence` was started in {processes} processes. It starts those of each stage itself. Pass "
            f"`--num_processes {processes}`, and leave `accelerate launch` out."
        )
    if options.output_dir is None:
        raise ValueError(
            "`--sequence` without `--output_dir`: every stage has a folder in it. It must be named. Pass "
            "`--output_dir FOLDER`."
        )
    stages: list[Stage] = []
    for number, name in enumerate(options.sequence, start=1):
        folder = Path(options.output_dir) / f"{number}-{find_recipe(name).stem}"
        call = ["--recipe", name, "--output_dir", str(folder), *rest]
        if stages:
            call += ["--adapter_name_or_path", str(stages[-1].folder)]
        script, args, model_args, recipe = parse(training_parser(), take_launch_options(call)[0])
        task = args.task_name or default_task_name(script)
        is_done = all((folder / each).is_file() for each in (ADAPTER_WEIGHTS, RECORD_NAME, RECIPE_NAME))
        path = None if script.dataset_path is None else locate_data(script.dataset_path, script.recipe)
        held_out = str(path) if path is not None and path.is_dir() else None
        stages.append(Stage(task, folder, call, recipe, model_args.model_name_or_path, held_out, is_done))
        if is_done:
            _check_settings(stages[-1])
    tasks, bases = [stage.task for stage in stages], {stage.base for stage in stages}
    if len(set(tasks)) < len(tasks) or len(bases) > 1:
        raise ValueError(
            f"`--sequence {' '.join(options.sequence)}` has the tasks {', '.join(tasks)} on "
            f"{', '.join(sorted(bases))}. Each stage needs a task of its own, and all of them one base model. Set "
            "`task_name` and `model_name_or_path` in the recipes."
        )
    if not options.held_out:
        _check_held_out(stages)
    return stages


def _check_held_out(stages: list[Stage]) -> None:
    """Refuse recipes whose data have no split to measure on."""
    from ..evaluation.loss import held_out_rows

    for stage in stages:
        fault = "its data are no local folder with a split `test`"
        try:
            if stage.held_out is not None:
                held_out_rows(stage.held_out)
                continue
        except ValueError as error:
            fault = str(error)
        raise ValueError(
            f"Task {stage.task!r} has no held-out rows at hand: {fault}. What was forgotten is measured on rows that "
            "were not trained on, the split `test` of each recipe's `dataset_path`. Pass "
            f"`--held_out {' '.join(f'{each.task}=ROWS.jsonl' for each in stages)}`."
        )


def _check_settings(stage: Stage) -> None:
    """Refuse to take an adapter for a stage's that was trained with other settings."""
    trained = read_mapping(stage.folder / RECIPE_NAME)[0]
    differing = [
        key
        for key in sorted(trained.keys() | stage.recipe.keys())
        if key not in _OF_THE_CALL and trained.get(key) != stage.recipe.get(key)
    ]
    if differing:
        key = differing[0]
        raise ValueError(
            f"`{stage.folder}` was trained with {key}={trained.get(key)}, and the recipe now says "
            f"{stage.recipe.get(key)}. A sequence goes on with the settings that it began with. Correct the recipe, "
            "or pass another `--output_dir`."
        )


def _resuming(stage: Stage) -> list[str]:
    """Return the option that lets a stage go on where it was stopped, if it has left anything."""
    from ..training.checkpoints import find_run

    _, args, *_ = parse(training_parser(), take_launch_options(stage.call)[0])
    try:
        find_run(True, args, stage.task)
    except ValueError:
        return []
    return ["--resume_from_checkpoint", "True"]
