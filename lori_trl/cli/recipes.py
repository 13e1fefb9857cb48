"""`lori recipes`: list, show, check and copy the shipped ones."""

import argparse
import json
import re
import shutil
from pathlib import Path

from ..recipes.data_files import locate_data, split_files
from ..recipes.find import (
    find_recipe,
    is_baseline,
    is_merge_recipe,
    list_recipes,
    read_recipe,
    recipe_facts,
    recipe_trainer,
    shipped_folder,
    validate_recipe,
)
from . import merge
from .terminal import show
from .training_options import is_evaluated, make_configs, training_parser, warn_of_foreign_code
from .training_verbs import SFT, VERBS


def add_parser(commands) -> None:
    recipes = commands.add_parser(
        "recipes",
        help="the shipped recipes",
        epilog="example:\n  lori recipes copy code_lori_s.yaml my_recipe.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = recipes.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="list the shipped recipes").set_defaults(func=_list)
    show = actions.add_parser("show", help="print a recipe")
    show.set_defaults(func=_show)
    validate = actions.add_parser("validate", help="check a recipe, all faults at once")
    validate.set_defaults(func=_validate)
    for action in (show, validate):
        action.add_argument("recipe", help="a YAML file or a shipped recipe's name")
    copy = actions.add_parser("copy", help="copy a shipped recipe, to change it")
    copy.add_argument("recipe", help="a shipped recipe's name")
    copy.add_argument("target", type=Path, help="the new file")
    copy.set_defaults(func=_copy)
    schema = actions.add_parser("schema", help="print the JSON schema of recipes, for editors")
    schema.set_defaults(func=_schema)


def _list(options: argparse.Namespace) -> None:
    from rich.table import Table

    table = Table("recipe", "task", "base", "variant", "rank", "source", box=None, padding=(0, 1, 0, 0))
    merges = Table("for lori merge", "adapters", "weights", "method", "density", box=None, padding=(0, 1, 0, 0))
    runs = []
    for file in list_recipes():
        if is_merge_recipe(file):
            recipe = read_recipe(file)
            values = ", ".join(recipe["adapters"]), recipe["weights"], recipe["method"], recipe.get("density", "")
            merges.add_row(file.name, *map(str, values))
        else:
            *facts, measured = recipe_facts(file).values()
            table.add_row(file.name, *facts)
            runs += [f"run here: {file.name}: {measured}"] if measured else []
    width = max(shutil.get_terminal_size().columns, 120)  # no name is cut, in a pipe neither
    show(table, *runs, "", merges, width=width)


def _show(options: argparse.Namespace) -> None:
    show(find_recipe(options.recipe).read_text(encoding="utf-8", errors="replace").removesuffix("\n"))


def _validate(options: argparse.Namespace) -> None:
    file = find_recipe(options.recipe)
    if is_merge_recipe(file):
        validate_recipe(file, merge.recipe_parser())
        show(f"{file.name}: no faults")
    elif is_baseline(file):
        from trl.scripts.sft import make_parser

        recipe = validate_recipe(file, parser := make_parser(prog="trl sft"))
        make_configs(parser, {"bf16": False} | recipe, [])  # TRL's default is refused where there is no GPU
        show(f"{file.name}: no faults, for `trl sft --config`")
    else:
        from ..recipes.data import check_splits

        recipe = validate_recipe(file, parser := training_parser(VERBS.get(recipe_trainer(file), SFT)))
        warn_of_foreign_code(file, recipe)
        script, args, _ = make_configs(parser, recipe, [])
        script.recipe = str(file)
        if script.dataset_path is not None and locate_data(script.dataset_path, script.recipe) is None:
            show(f"`{script.dataset_path}` is not here, so its splits were not looked at")
        elif script.dataset_path is not None:
            check_splits(split_files(script.dataset_path, script.recipe), script, evaluated=is_evaluated(args))
        show(f"{file.name}: no faults")


def _copy(options: argparse.Namespace) -> None:
    file = find_recipe(options.recipe)
    if options.target.exists():
        raise FileExistsError(
            f"`{options.target}` exists. A copy goes to a new file. Choose another name or delete it."
        )
    schema = (shipped_folder("recipes") / "recipe.schema.json").resolve()
    text = file.read_text(encoding="utf-8")  # its schema is named as seen from where it was
    options.target.write_text(re.sub(r"(?m)^(# yaml-language-server: \$schema=).+$", rf"\g<1>{schema}", text), "utf-8")


def _schema(options: argparse.Namespace) -> None:
    from ..recipes.schema import recipe_schema

    parsers = {name: training_parser(verb) for name, verb in VERBS.items()}
    show(json.dumps(recipe_schema(parsers, merge.recipe_parser()), indent=1))
