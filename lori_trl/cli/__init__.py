"""The command line: `lori`, one file a verb or (`sft`) a kind of verbs, and `lori-sft`. All that prints is here."""

import argparse
import os
import sys

from . import eval, expand, export, inspect, merge, push, recipes, tasks
from .completion import add_print_completion
from .errors import bad_input, take_debug
from .options import with_underscores
from .sft import run_training, sft
from .terminal import printable, show, show_logs_as_text
from .training_verbs import VERBS
from .version import ShowVersion

__all__ = ["main", "make_parser", "sft"]

_VERBS = (recipes, tasks, merge, push, export, expand, eval, inspect)


class _Parser(argparse.ArgumentParser):
    """argparse, whose errors quote the call: file names that a shell put in are foreign text."""

    def exit(self, status: int = 0, message: str | None = None):
        super().exit(status, printable(message or ""))


def main(arguments: list[str] | None = None) -> int:
    """Run `lori`. Returns the exit code: 0; 2 for a wrong call; 1 for a failed push."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in VERBS:  # all that follows is for TRL's parser
        return run_training(VERBS[arguments[0]], arguments[1:])
    arguments, debug = take_debug(with_underscores(arguments))
    show_logs_as_text()
    options = make_parser().parse_args(arguments)
    with bad_input("lori", debug=debug):
        if options.command != "eval":
            _check_one_process(options.command)
        try:
            options.func(options)
        except RuntimeError as error:  # the call was right, the Hub was not
            if debug:
                raise
            show(f"lori: {error}", error=True)
            return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of `lori`, which has all verbs and imports nothing that they need."""
    parser = _Parser(
        prog="lori",
        description="Train LoRI adapters.",
        epilog="example:\n  lori recipes list",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the versions of what is installed")
    parser.add_argument("--debug", action="store_true", help="tell an error by its traceback, with any command")
    add_print_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    for each in VERBS.values():
        purpose = each.purpose[0].lower() + each.purpose[1:].rstrip(".")
        commands.add_parser(each.name, add_help=False, help=purpose)
    for verb in _VERBS:
        verb.add_parser(commands)
    return parser


def _check_one_process(command: str) -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(
            f"`lori {command}` was started in {processes} processes, each of which would do all of the work and write "
            "the same files. What trains, and `lori eval`, share their work out. Start it once, without "
            "`accelerate launch`."
        )
