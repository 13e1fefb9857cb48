"""What shells need to complete `lori` and `lori-sft`, without importing what the programs run on."""

import argparse
import json
from typing import Any

from ..recipes.find import shipped_folder

_SHELLS = ("bash", "zsh")


class PrintCompletion(argparse.Action):
    """Print a script that completes a parser's program."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None
    ) -> None:
        import shtab

        _complete_with(shtab.FILE, parser)
        print(shtab.complete(parser, values))
        parser.exit()


def _complete_with(files: Any, parser: argparse.ArgumentParser) -> None:
    """Offer files where an option takes a value that is not one of a few: most are folders, files or numbers."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_with(files, verb)
        elif action.choices is None and action.nargs != 0:
            action.complete = files  # type: ignore[attr-defined]


def add_print_completion(parser: argparse.ArgumentParser) -> None:
    """Add `--print_completion`."""
    parser.add_argument(
        "--print_completion",
        choices=_SHELLS,
        action=PrintCompletion,
        help=f'print what completes {parser.prog} in a shell, e.g. eval "$({parser.prog} --print_completion bash)"',
    )


def sft_completion_parser() -> argparse.ArgumentParser:
    """Make a parser with the options of `lori-sft`, from the shipped schema: TRL's parser takes seconds."""
    parser = argparse.ArgumentParser(prog="lori-sft")
    add_print_completion(parser)
    schema = json.loads((shipped_folder("recipes") / "recipe.schema.json").read_text(encoding="utf-8"))
    fields = schema["definitions"]["training"]["properties"]
    for name in dict.fromkeys(("recipe", "accelerate_config", "num_processes", "help_all", *fields)):
        field = fields.get(name, {})
        parser.add_argument(
            f"--{name}", choices=field.get("enum"), help=field.get("description", "").replace("%", "%%")
        )
    return parser
