"""What `accelerate launch` takes beside a training's own fields: on the command line, or in a recipe as in TRL's."""

import argparse
from functools import cache

# What `lori-sft` decides itself, has under another meaning, or never runs on.
_NOT_TAKEN = {
    *("help", "config_file", "debug", "env", "gradient_accumulation_steps", "main_training_function", "module"),
    *("no_python", "quiet", "training_script", "training_script_args", "tpu", "vm"),
}
_NOT_TAKEN_BEGINNINGS = ("aws_", "megatron_", "tpu_", "use_megatron_")


@cache
def launch_options() -> dict[str, argparse.Action]:
    """Return the options by their names; `accelerate_config`, for its `config_file`, takes shipped ones, too."""
    from accelerate.commands.launch import launch_command_parser

    parser = argparse.ArgumentParser()
    own = parser.add_argument(
        "--accelerate_config",
        "--accelerate-config",
        type=str,
        help="A launch file: single, ddp, fsdp2, fsdp2_multinode, zero2, zero3, or the path of one's own.",
    )
    actions = {action.dest: action for action in launch_command_parser()._actions}
    return {own.dest: own} | {
        name: action
        for name, action in actions.items()
        if name not in _NOT_TAKEN and not name.startswith(_NOT_TAKEN_BEGINNINGS)
    }
