"""The options of the verbs that train: their parser, and the configurations that a recipe and a command line make."""

import argparse
import copy
import os
import re
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..inputs.intervals import INTERVALS, check_range
from ..recipes.find import (
    find_recipe,
    foreign_code,
    is_baseline,
    is_merge_recipe,
    is_shipped,
    list_recipes,
    nearest,
    read_recipe,
    recipe_header,
    validate_recipe,
    value_fault,
)
from .terminal import show
from .training_verbs import SFT, TrainingVerb

_EPILOG = """
several processes: --accelerate_config single | ddp | fsdp2 | fsdp2_multinode | zero2 | zero3 | FILE, and
--num_processes N; with --dry_run it says what is sharded and what each device holds

--help_all lists all of TRL's options; --version and --print_completion SHELL are as of `lori`

example:
  {}
"""
# TRL's fields that `--help` shows besides those that shipped recipes set.
_ALSO_SHOWN = {"help", "load_in_4bit", "max_steps", "push_to_hub", "hub_model_id", "resume_from_checkpoint", "seed"}
FILE_OF_HELP = Path(__file__).parent / "sft_help.txt"
_DATA = {"dataset_path", "dataset_name", "datasets"}


def sft_help() -> str:
    """
    Return the text of `lori-sft --help`: as it was written down for the TRL and transformers of its file's first line,
    whose import takes seconds; made anew for others.
    """
    made_for, _, text = FILE_OF_HELP.read_text(encoding="utf-8").partition("\n")
    return text if made_for == help_made_for() else training_parser().format_help()


def help_made_for() -> str:
    """Name the versions that `--help` depends on."""
    return ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers"))


def training_parser(verb: TrainingVerb = SFT, *, help_all: bool = False):
    """Make the parser of a verb that trains, of which `--help` shows what matters, or all."""
    from trl import ModelConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str):  # argparse would print pages of usage first
            raise ValueError(message)

        def format_help(self) -> str:
            formatter = self._get_formatter()
            formatter.add_text(f"usage: {self.prog} [--recipe RECIPE] [--FIELD VALUE ...]")
            formatter.add_text(self.description)
            for title, actions in _help_groups(verb, self._actions, help_all).items():
                formatter.start_section(title)
                formatter.add_arguments(actions)
                formatter.end_section()
            formatter.add_text(self.epilog)
            return formatter.format_help()

    parser = Parser(
        (verb.script_class, verb.config_class, ModelConfig),
        prog=verb.program,
        allow_abbrev=False,
        description=verb.purpose,
        epilog=_EPILOG.format(verb.example),
        formatter_class=_HelpFormatter,
    )
    parser.trainer = verb.name
    parser.set_defaults(use_peft=True, lora_target_modules="all-linear", lora_task_type=verb.task_type)
    return parser


def _help_groups(
    verb: TrainingVerb, actions: list[argparse.Action], help_all: bool
) -> dict[str, list[argparse.Action]]:
    """
    Group the options for `--help`: LoRI's own first, as `LoriArguments` documents them, TRL's hundreds last.

    Of TRL's, those are shown that a shipped recipe sets, or that supervised training does not have; or all.
    """
    from trl import DatasetMixtureConfig, ModelConfig

    from ..training.config import LoriArguments, LoriSFTConfig

    sections = re.split(r"> Parameters that control (.+)\n", LoriArguments.__doc__ or "")[1:]
    groups = {
        f"LoRI: {title}": set(re.findall(r"^        (\w+) \(`", body, re.MULTILINE))
        for title, body in zip(sections[::2], sections[1::2], strict=True)
    }
    groups["the data and the run"] = {"help", *_names(verb.script_class), "output_dir"}
    groups["the base model and the adapter (TRL's ModelConfig)"] = _names(ModelConfig)
    groups[f"training (TRL's {verb.pair}Config)"] = {action.dest for action in actions}.difference(*groups.values())
    if not help_all:
        groups["the data and the run"] -= _names(DatasetMixtureConfig)
        recipes = [file for file in list_recipes() if not is_merge_recipe(file) and not is_baseline(file)]
        shown = _ALSO_SHOWN.union(*map(read_recipe, recipes)) | _names(verb.config_class) - _names(LoriSFTConfig)
        for title in [title for title in groups if "TRL's" in title]:
            groups[title] &= shown
    return {title: [action for action in actions if action.dest in names] for title, names in groups.items()}


def _names(config: type) -> set[str]:
    return {each.name for each in fields(config)}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Leave out the second spelling of every option, with dashes."""
        shown = copy.copy(action)
        shown.option_strings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        return super()._format_action_invocation(shown)


def make_configs(parser, recipe: dict[str, Any], arguments: list[str]) -> list[Any]:
    """
    Make the configurations of a recipe and a command line, which goes over it; they check themselves.

    Raises:
        `ValueError`: one of them, or argparse, refuses a value.
    """
    parser.set_defaults_with_config(**copy.deepcopy(recipe))  # a configuration changes its lists in place
    try:
        *configs, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except Exception as error:  # transformers raises this and that on values it does not foresee
        raise ValueError(
            f"{str(error).rstrip('.')}. `{parser.prog} --help_all` lists what is allowed. Correct the call or the "
            "recipe."
        ) from error
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(
            f"`{unknown[0]}` is no option{nearest(unknown[0], known)}. `{parser.prog} --help_all` lists all. Correct "
            "it."
        )
    several = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    for key, value in [item for config in configs for item in vars(config).items()]:
        for each in value if isinstance(value, list) else [value]:
            if fault := value_fault(each, several=key in several):
                raise ValueError(
                    f"`{key}={value}` is {fault}. `{parser.prog} --help_all` lists what is allowed. Correct the call "
                    "or the recipe."
                )
    _, args, *_ = configs
    if not isinstance(args.model_init_kwargs, dict | None):
        raise ValueError(
            f"`model_init_kwargs={args.model_init_kwargs}` is text, and a mapping is needed. On the command line that "
            'is JSON, e.g. `--model_init_kwargs \'{"attn_implementation": "sdpa"}\'`. Correct the call or the recipe.'
        )
    return configs


def is_evaluated(args: Any) -> bool:
    """Say whether a run evaluates, and so needs a split to do it on."""
    return args.eval_strategy != "no" or args.eval_on_start


def warn_of_foreign_code(file: Path, recipe: dict[str, Any]) -> None:
    """Say aloud what of a recipe that is not a shipped one runs code from elsewhere."""
    for reason in [] if is_shipped(file) else foreign_code(recipe):
        show(f"{file}: {reason}. Go on only if you trust the recipe.", error=True)


def take_recipe(arguments: list[str]) -> tuple[str | None, list[str], bool]:
    """Take the recipe out of a call: its name, if there is one, the other arguments, and whether it is TRL's file."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    finder.add_argument("--config")  # TRL's name for it
    options, rest = finder.parse_known_args(arguments)
    return options.recipe or options.config, rest, options.recipe is None


def parse(parser, arguments: list[str]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """
    Parse recipe and command line.

    Returns:
        `tuple`: the script's, the run's and the model's configuration, and the recipe as it is run.

    Raises:
        `ValueError`: the recipe has faults, or one of them asks for what is not possible or lacks what it needs.
        `FileNotFoundError`: there is no such recipe.
    """
    name, arguments, is_trls = take_recipe(arguments)
    file = None if name is None else find_recipe(name)
    recipe = {} if file is None else _read(file, parser, is_trls)
    trainer = recipe.pop("trainer", parser.trainer)
    requires = recipe.pop("requires", [])
    environment = recipe.pop("env", {})
    os.environ |= {key: str(value) for key, value in environment.items()}
    configs = make_configs(parser, recipe, arguments)
    script, args, model_args = configs
    script.recipe = None if file is None else str(file)
    if model_args.model_name_or_path is None:
        raise ValueError(
            "`model_name_or_path` is missing. It names the base model, on the Hub or in a folder. Pass e.g. "
            "`--model_name_or_path meta-llama/Meta-Llama-3-8B`, or a `--recipe` that does."
        )
    for config in (script, model_args):
        for key in vars(config).keys() & INTERVALS.keys():
            check_range(key, getattr(config, key), INTERVALS[key])
    if not model_args.use_peft:
        raise ValueError("`use_peft=False` is no LoRI. A LoRI adapter is PEFT's. Leave `use_peft` out.")
    values = {key: value for config in configs for key, value in vars(config).items()}
    if file is not None and (missing := [key for key in requires if values.get(key) is None]):
        needs = recipe_header(file).get("Needs", "its header may say more")
        raise ValueError(
            f"`{name}` needs `{missing[0]}`, and it is not given ({needs}). Without it, the recipe would train "
            f"something else. Pass `--{missing[0]}`."
        )
    actions = {option: action.dest for action in parser._actions for option in action.option_strings}
    given = {actions[word.partition("=")[0]] for word in arguments if word.partition("=")[0] in actions}
    as_run = recipe | {key: _plain(values[key]) for key in values if key in given}
    for other in _DATA - given if _DATA & given else ():  # one's own data are in place of the recipe's
        setattr(script, other, [] if other == "datasets" else None)
        as_run.pop(other, None)
    for secret_or_ours in ("hub_token", "dry_run", "preview", "overwrite", "use_peft"):
        as_run.pop(secret_or_ours, None)
    if trainer != SFT.name:
        as_run["trainer"] = trainer
    return script, args, model_args, as_run | ({"requires": requires} if requires else {})


def _read(file: Path, parser, is_trls: bool) -> dict[str, Any]:
    if is_baseline(file) and (is_shipped(file) or not is_trls):
        raise ValueError(
            f"`--recipe {file.name}` is a baseline for TRL's own trainer: it sets `use_peft`. `{parser.prog}` trains "
            f"LoRI adapters alone. Run it with `trl {parser.trainer} --config {file}`, or pass a file of your own as "
            "`--config`."
        )
    recipe = validate_recipe(file, parser)
    warn_of_foreign_code(file, recipe)
    return recipe


def _plain(value: Any) -> Any:
    """Return a value as a recipe holds it."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {key: each for key, each in asdict(value).items() if each is not None}
    return value.value if isinstance(value, Enum) else value
