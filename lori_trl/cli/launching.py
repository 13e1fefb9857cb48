"""Several processes: what of a call is for `accelerate launch`, and the start of it."""

import argparse
import os
from collections.abc import Mapping
from typing import Any

from ..recipes.find import find_recipe, read_recipe
from ..recipes.launch_options import launch_options
from .training_options import take_recipe
from .training_verbs import TrainingVerb

# Set for the processes that are started here, which start no others; torchrun sets the second.
_LAUNCHED = ("LORI_LAUNCHED", "LOCAL_RANK")


def take_launch_options(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """
    Take what is for `accelerate launch` out of a call.

    Returns:
        `tuple[list[str], dict[str, Any]]`: the other arguments; and name -> value, the recipe's with the command
            line's over them. Nothing in a process that was launched.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, action in launch_options().items():
        names = [option for option in action.option_strings if option.startswith("--")]
        finder.add_argument(*names, dest=name, action="store_true" if action.nargs == 0 else "store", default=None)
    given, rest = finder.parse_known_args(arguments)
    if any(name in os.environ for name in _LAUNCHED):
        return rest, {}
    recipe, *_ = take_recipe(arguments)
    on_file = {} if recipe is None else read_recipe(find_recipe(recipe))
    values = {name: on_file[name] for name in launch_options() if on_file.get(name) is not None}
    return rest, values | {name: value for name, value in vars(given).items() if value is not None}


def launch(verb: TrainingVerb, options: Mapping[str, Any], arguments: list[str]) -> None:
    """
    Start a verb that trains on several processes.

    Args:
        verb ([`TrainingVerb`]): the verb.
        options (`Mapping[str, Any]`): from [`take_launch_options`]; without `accelerate_config`, the file counts that
            `accelerate config` wrote, if it did.
        arguments (`list[str]`): the other arguments of the call.

    Raises:
        `FileNotFoundError`: there is no such launch file.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    from ..training.parallel_engines import find_launch_file

    call = []
    for name, value in options.items():
        if name == "accelerate_config":
            call += ["--config_file", str(find_launch_file(value))]
        elif launch_options()[name].nargs != 0:
            call += [f"--{name}", str(value)]
        elif value:
            call.append(f"--{name}")
    os.environ[_LAUNCHED[0]] = "1"
    try:
        call += ["--module", "lori_trl.cli", verb.name]
        launch_command(launch_command_parser().parse_args([*call, *arguments]))
    finally:
        del os.environ[_LAUNCHED[0]]


def engine_of(options: Mapping[str, Any]) -> Any:
    """
    Say what spreads a run over devices, for a dry run; `None` where nothing does.

    Raises:
        `FileNotFoundError`: there is no such launch file.
        `ValueError`: the number of processes is none.
    """
    from ..training.parallel_engines import Engine, find_launch_file

    count = options.get("num_processes")
    if count is not None and not (str(count).isdecimal() and int(count) > 0):
        raise ValueError(
            f"`num_processes={count}` is no number of processes. Allowed are whole numbers from 1 on. Correct it."
        )
    devices = None if count is None else int(count)
    if "accelerate_config" in options:
        return Engine.from_launch_file(find_launch_file(options["accelerate_config"]), devices)
    return Engine("DDP", devices) if devices is not None and devices > 1 else None
