"""Recipes: find them, check them, list them."""

import argparse
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def shipped_folder(name: str) -> Path:
    """Return a folder that stands at the repository's top level and travels inside the wheel."""
    in_wheel = Path(__file__).parent / "shipped" / name
    return in_wheel if in_wheel.is_dir() else Path(__file__).parents[1] / name


def list_recipes() -> list[Path]:
    """Return the shipped recipes, sorted by name."""
    return sorted(shipped_folder("recipes").rglob("*.yaml"), key=lambda file: file.name)


def find_recipe(name_or_path: str) -> Path:
    """
    Find a recipe: a path, or the name of a shipped one with or without `.yaml`.

    Raises:
        `FileNotFoundError`: neither exists; the nearest shipped names are given.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    shipped = {file.stem: file for file in list_recipes()}
    stem = name_or_path.removesuffix(".yaml")
    if stem not in shipped:
        near = difflib.get_close_matches(stem, shipped, n=3, cutoff=0.4) or list(shipped)[:3]
        raise FileNotFoundError(
            f"`--recipe {name_or_path}` is neither a file nor a shipped recipe. Near it are "
            f"{', '.join(f'{name}.yaml' for name in near)}. `lori recipes list` shows all."
        )
    return shipped[stem]


def read_recipe(file: Path) -> dict[str, Any]:
    """
    Read a recipe's YAML mapping.

    Raises:
        `ValueError`: it is not YAML, or not a mapping.
    """
    import yaml  # here, so that the shipped recipes can be listed without any dependency

    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{file}` is not YAML: {error}. A recipe is lines of `key: value`. Correct it.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"`{file}` holds a {type(recipe).__name__}. A recipe is lines of `key: value`. Correct it.")
    return recipe


def validate_recipe(file: Path, parser: argparse.ArgumentParser) -> None:
    """
    Check every key and value of a recipe against a parser's arguments.

    Raises:
        `ValueError`: one error that lists all faults, each with its key and the nearest valid name.
    """
    actions = {action.dest: action for action in reversed(parser._actions)}  # a field before its `--no_field`
    mappings = {name for config in parser.dataclass_types for name in getattr(config, "_VALID_DICT_FIELDS", ())}
    faults = []
    for key, value in read_recipe(file).items():
        if key == "env":  # TrlParser's: environment variables to set
            if not isinstance(value, dict):
                faults.append(f"env={value!r} is no mapping of environment variables")
        elif key not in actions:
            faults.append(f"{key}: no such field{nearest(key, actions)}")
        elif isinstance(value, dict) and key in mappings:
            continue
        elif fault := _value_fault(value, actions[key]):
            faults.append(f"{key}={value!r}: {fault}")
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise ValueError(
            f"`{file}` has {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n{lines}\nAllowed are the fields that "
            "`lori-sft --help` lists, with values of their types. Correct the file."
        )


def nearest(key: str, names: Iterable[str]) -> str:
    """Return `" (did you mean x?)"` for the nearest name, or nothing."""
    near = difflib.get_close_matches(key.replace("-", "_"), names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _value_fault(value: Any, action: argparse.Action) -> str | None:
    """Say what is wrong with a value, by the conversion that the command line would do; None if nothing is."""
    if value is None:
        return None
    if isinstance(value, dict):
        return "a mapping is not allowed here"
    if isinstance(value, list) and action.nargs not in ("+", "*") and action.type is not str:
        return "a list is not allowed here"
    for item in value if isinstance(value, list) else [value]:
        if action.type is str and not isinstance(item, str):
            return f"a {type(item).__name__}, where text is needed: put it in quotes"
        try:
            converted = action.type(str(item)) if action.type else item
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            return f"not a valid {_type_name(action)}"
        if action.choices is not None and converted not in action.choices:
            return f"allowed are {', '.join(map(str, action.choices))}"
    return None


def _type_name(action: argparse.Action) -> str:
    name = getattr(action.type, "__name__", str(action.type))
    return {"string_to_bool": "bool"}.get(name, name)
