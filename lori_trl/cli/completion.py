"""What shells need to complete `lori` and its verbs, without importing what the programs run on."""

import argparse
import json
from typing import Any

from ..recipes.find import shipped_folder
from .training_verbs import SFT, VERBS, TrainingVerb

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
            for name, verb in action.choices.items():
                if name in VERBS:
                    _add_options(verb, VERBS[name])
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


def training_completion_parser(verb: TrainingVerb = SFT) -> argparse.ArgumentParser:
    """Make a parser with the options of a verb that trains."""
    parser = argparse.ArgumentParser(prog=verb.program)
    add_print_completion(parser)
    _add_options(parser, verb)
    return parser


def _add_options(parser: argparse.ArgumentParser, verb: TrainingVerb) -> None:
    """Add a verb's options to a parser, from the shipped schema: TRL's parser takes seconds."""
    schema = json.loads((shipped_folder("recipes") / "recipe.schema.json").read_text(encoding="utf-8"))
    of_training = schema["definitions"]["training"]
    condition = next(
        each
        for each in of_training["allOf"]
        if each.get("if", {}).get("properties") == {"trainer": {"const": verb.name}}
    )
    foreign = {*condition["then"]["propertyNames"]["not"]["enum"], "env", "requires", "trainer"}
    fields = {name: field for name, field in of_training["properties"].items() if name not in foreign}
    of_sft = ("sequence", "held_out") if verb is SFT else ()
    for name in dict.fromkeys(("recipe", *of_sft, "accelerate_config", "num_processes", "help_all", *fields)):
        field = fields.get(name, {})
        parser.add_argument(
            f"--{name}", choices=field.get("enum"), help=field.get("description", "").replace("%", "%%")
        )
