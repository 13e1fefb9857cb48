"""Recipes: find them, check them, list them."""

import argparse
import difflib
import os
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..inputs.intervals import INTERVALS, range_fault
from ..inputs.yaml_reader import read_mapping
from .launch_options import launch_options

# Keys of which a recipe sets one at most.
CONFLICTS = (
    ("dataset_name", "dataset_path"),
    ("dataset_name", "datasets"),
    ("dataset_path", "datasets"),
    ("load_in_4bit", "load_in_8bit"),
    ("bf16", "fp16"),
)
_LIST_AS_TEXT = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)+")  # a pattern of module names has other characters, too
_MOST_SHOWN = 10  # faults
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
_HARMLESS_VARIABLES = {
    *("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "WANDB_MODE", "WANDB_PROJECT"),
}


def shipped_folder(name: str) -> Path:
    """Return a folder that stands at the repository's top level and travels inside the wheel."""
    in_wheel = Path(__file__).parent / "shipped" / name
    return in_wheel if in_wheel.is_dir() else Path(__file__).parents[2] / name


def list_recipes() -> list[Path]:
    """Return the shipped recipes, sorted by name."""
    return sorted(shipped_folder("recipes").rglob("*.yaml"), key=lambda file: file.name)


def find_recipe(name_or_path: str) -> Path:
    """
    Find a recipe: a path, or the name of a shipped one, with or without its folder and `.yaml`.

    Raises:
        `FileNotFoundError`: neither exists; the nearest shipped names are given.
    """
    if os.path.isfile(name_or_path):
        return Path(name_or_path)
    names = {file.stem: file for file in list_recipes()}
    paths = {file.relative_to(shipped_folder("recipes")).with_suffix("").as_posix(): file for file in names.values()}
    stem = name_or_path.removesuffix(".yaml")
    if stem not in names | paths:
        near = difflib.get_close_matches(stem[:100], names, n=3, cutoff=0.4) or list(names)[:3]
        raise FileNotFoundError(
            f"`{name_or_path}` is neither a file nor a shipped recipe. Near it are "
            f"{', '.join(f'{name}.yaml' for name in near)}. `lori recipes list` shows all."
        )
    return (names | paths)[stem]


def is_shipped(file: Path) -> bool:
    """Say whether a recipe is one of the package's own."""
    return file.resolve().is_relative_to(shipped_folder("recipes").resolve())


def read_recipe(file: Path) -> dict[str, Any]:
    """
    Read a recipe's YAML mapping.

    Raises:
        `ValueError`: it is not YAML, or not a mapping.
    """
    return read_mapping(file)[0]


def recipe_facts(file: Path) -> dict[str, str]:
    """
    Say what a recipe is, from its keys and its header.

    Returns:
        `dict[str, str]`: `task`, `base`, `variant`, `rank` (`kept` where an adapter is continued), `source` (the
        header's `Reproduces:`), and `measured`, the time and figures of a run in this project (the header's
        `Measured:`); empty where there is none.
    """
    recipe, header = read_recipe(file), recipe_header(file)
    if is_baseline(file):
        variant = "DoRA" if recipe.get("use_dora") else "LoRA" if recipe.get("use_peft") else "full"
    else:
        variant = "LoRAF" if recipe.get("disjoint_masks") else "LoRI-S" if recipe.get("sparsity", 0.9) else "LoRI-D"
    rank = "-" if variant == "full" else "kept" if "adapter_name_or_path" in recipe.get("requires", []) else ""
    return {
        "task": recipe.get("task_name") or str(recipe.get("dataset_name", "")).removesuffix("-data"),
        "base": str(recipe.get("model_name_or_path", "")).rpartition("/")[2],
        "variant": variant,
        "rank": str(recipe.get("lora_r", rank)),
        "source": header.get("Reproduces", "").removeprefix("paper ").partition(" (")[0],
        "measured": header.get("Measured", ""),
    }


def recipe_header(file: Path) -> dict[str, str]:
    """Return the lines `# Name: text` of a recipe's header: name -> text."""
    return dict(re.findall(r"^# (\w+): +(.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE))


def is_merge_recipe(file: Path) -> bool:
    """Say whether a recipe is for `lori merge`: it names adapters."""
    return "adapters" in read_recipe(file)


def is_baseline(file: Path) -> bool:
    """Say whether a recipe is for `trl sft`: it decides on `use_peft`, which is no choice for LoRI."""
    return "use_peft" in read_recipe(file)


def recipe_trainer(file: Path) -> str:
    """Return which of the trainers a recipe is for: the word after `lori`."""
    return str(read_recipe(file).get("trainer") or "sft")


def foreign_code(recipe: Mapping[str, Any]) -> list[str]:
    """
    List what lets a recipe run code that is in none of the installed packages.

    Args:
        recipe (`Mapping[str, Any]`): a recipe without faults.

    Returns:
        `list[str]`: `key=value`, and what it does.
    """
    of_model = recipe.get("model_init_kwargs")
    settings = {**recipe, **(of_model if isinstance(of_model, dict) else {})}
    reasons = []
    if settings.get("trust_remote_code"):
        reasons.append("trust_remote_code=True: Python files of the base model's repository are run")
    for key in ("attn_implementation", "use_kernels"):
        if "/" in str(settings.get(key)) or settings.get(key) is True:
            reasons.append(f"{key}={settings[key]}: compiled code of a repository is run")
    if own := [name for name in recipe.get("reward_funcs") or [] if "." in name]:
        reasons.append(f"reward_funcs={', '.join(own)}: Python code from where the command is run is run")
    variables = sorted((recipe.get("env") or {}).keys() - _HARMLESS_VARIABLES)
    if variables:
        reasons.append(f"env={', '.join(variables)}: variables can make Python, the linker or the Hub take other code")
    return reasons


@dataclass(frozen=True)
class RecipeField:
    """A key that a recipe may have."""

    action: argparse.Action  # the option that it is on the command line
    hint: Any  # its type in the configuration's class; `None` where there is no class
    is_mapping: bool  # whether it takes a mapping

    @property
    def several(self) -> bool:
        """Whether the option takes several values."""
        return self.action.nargs in ("+", "*")

    @property
    def item_class(self) -> type | None:
        """The dataclass of which a recipe lists mappings, as `datasets` does; `None` where there is none."""
        item = next(iter(typing.get_args(self.hint)), None) if typing.get_origin(self.hint) is list else None
        return item if isinstance(item, type) and is_dataclass(item) else None

    def accepts(self, kind: type) -> bool:
        """Say whether the type has a kind: `str | list[str] | None` has `list`."""
        return _accepts(self.hint, kind)


def recipe_fields(parser: argparse.ArgumentParser) -> dict[str, RecipeField]:
    """
    Return what a recipe for a parser may hold: key -> field.

    A TrlParser's recipes also have what `accelerate launch` takes, and `env`, `requires` and `trainer`, which are no
    options.
    """
    configs = vars(parser).get("dataclass_types", ())  # a TrlParser's
    mappings = {name for config in configs for name in getattr(config, "_VALID_DICT_FIELDS", ())}
    hints = {name: hint for config in configs for name, hint in typing.get_type_hints(config).items()}
    actions = launch_options() if configs else {}
    actions = actions | {action.dest: action for action in reversed(parser._actions)}  # a field before `--no_field`
    return {
        name: RecipeField(action, hints.get(name), name in mappings)
        for name, action in actions.items()
        if name not in ("help", "recipe")
    }


def validate_recipe(file: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """
    Check every key and value of a recipe against a parser's arguments.

    Returns:
        `dict[str, Any]`: the recipe's values, converted as the command line converts its words. A null is left out
            where the field cannot be `None`.

    Raises:
        `ValueError`: one error that lists the faults: keys that are unknown (with the nearest valid name), that stand
            there twice or exclude each other; values of a wrong type or out of range.
    """
    fields = recipe_fields(parser)
    recipe, repeated = read_mapping(file)
    values = {}
    faults = [f"{_short(key)}: in lines {', '.join(map(str, lines[:5]))}. Keep one" for key, lines in repeated.items()]
    for key, value in recipe.items():
        if key == "env" and "dataclass_types" in vars(parser):  # TrlParser's: environment variables to set
            faults += _env_faults(value)
            values[key] = value
        elif key == "trainer" and "dataclass_types" in vars(parser):
            values[key] = value
            if value != vars(parser).get("trainer", "sft"):
                faults.append(f"trainer={_REPR.repr(value)}: it is for `lori {_short(value)}`, if there is that")
        elif key == "requires" and "dataclass_types" in vars(parser):
            values[key] = value
            if not isinstance(value, list) or not {*map(str, value)} <= fields.keys():
                faults.append(f"requires={_REPR.repr(value)}: a list of fields is needed")
        elif key not in fields:
            near = nearest(str(key), fields) if len(faults) < _MOST_SHOWN else ""
            faults.append(f"{_short(key)}: no such field{near}")
        elif value is None:
            values |= {key: None} if fields[key].accepts(types.NoneType) else {}
        else:
            try:
                values[key] = _converted(value, fields[key])
                fault = range_fault(values[key], INTERVALS.get(key))
            except ValueError as error:
                fault = str(error)
            faults += [f"{key}={_REPR.repr(value)}: {fault}"] if fault else []
    for keys in CONFLICTS:
        if all(recipe.get(key) for key in keys):
            together = ", ".join(f"{key}={_REPR.repr(recipe[key])}" for key in keys)
            faults.append(f"{together}: they exclude each other. Keep one")
    if faults:
        raise ValueError(_list_faults(file, faults, parser.prog))
    return values


def _list_faults(file: Path, faults: list[str], program: str) -> str:
    more = len(faults) - _MOST_SHOWN
    lines = [*faults[:_MOST_SHOWN], *([f"and {more:,} more"] if more > 0 else [])]
    return "\n".join(
        [
            f"`{file}` has {len(faults):,} fault{'s' if len(faults) > 1 else ''}:",
            *(f"  - {line}" for line in lines),
            f"Allowed are the fields of `{program}`, with values of their types: `lori recipes schema` lists them. "
            "Correct the file.",
        ]
    )


def _env_faults(variables: Any) -> list[str]:
    """List what of a recipe's `env` the system would not take."""
    if not isinstance(variables, dict):
        return [f"env={_REPR.repr(variables)} is no mapping of environment variables"]
    faults = []
    for name, value in variables.items():
        if not isinstance(name, str) or not name or set(name) & {"=", "\0"}:
            faults.append(f"env: {_REPR.repr(name)} is no name of an environment variable")
        elif not isinstance(value, (str, int, float)) or "\0" in str(value):
            faults.append(f"env: {_short(name)}={_REPR.repr(value)}: text or a number is needed")
    return faults


def nearest(key: str, names: Iterable[str]) -> str:
    """Return `" (did you mean x?)"` for the nearest name, or nothing."""
    near = difflib.get_close_matches(key.replace("-", "_"), names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _converted(value: Any, field: RecipeField) -> Any:
    """
    Convert a value as the command line would.

    Raises:
        `ValueError`: what is wrong with it.
    """
    if isinstance(value, dict) and field.item_class is None:
        if not field.is_mapping:
            raise ValueError("a mapping is not allowed here")
        if not all(isinstance(key, str) for key in value):
            raise ValueError("the keys of a mapping must be text")
        return value
    if field.is_mapping and isinstance(value, str) and value.lstrip().startswith("{"):
        raise ValueError("a mapping as text: leave the quotes out")
    action = field.action
    if field.item_class is not None:
        return [_checked_mapping(each, field.item_class) for each in (value if isinstance(value, list) else [value])]
    if not isinstance(value, list):
        return [_converted_item(value, action)] if field.several else _converted_item(value, action)
    if not field.several and not field.accepts(list):
        raise ValueError("a list is not allowed here")
    if not value and action.nargs == "+":
        raise ValueError("one value at least is needed")
    return [_converted_item(item, action) for item in value]


def _checked_mapping(value: Any, cls: Any) -> dict[str, Any]:
    """Return a mapping of a list of them, if a dataclass can be made of it."""
    known = {each.name: each for each in fields(cls)}
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, where a mapping is needed, of {', '.join(known)}")
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"no such key {_short(unknown[0])}{nearest(str(unknown[0]), known)}")
    if missing := [name for name, each in known.items() if each.default is MISSING and name not in value]:
        raise ValueError(f"`{missing[0]}` is missing in {_REPR.repr(value)}")
    return value


def _converted_item(item: Any, action: argparse.Action) -> Any:
    if action.type is str and not isinstance(item, str):
        raise ValueError(f"a {type(item).__name__}, where text is needed: put it in quotes")
    try:
        converted = action.type(str(item)) if callable(action.type) else item
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise ValueError(f"not a valid {type_name(action)}") from None
    if fault := value_fault(converted, several=action.nargs in ("+", "*")):
        raise ValueError(fault)
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"allowed are {', '.join(map(str, action.choices))}")
    return converted


def value_fault(value: Any, *, several: bool) -> str | None:
    """
    Say what is wrong with a value that its type lets through, on the command line as in a recipe.

    Args:
        value (`Any`): a single value.
        several (`bool`): whether its field takes several.
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        return "more than 64 bits"
    if value == "None":
        return "the text None; for nothing, leave the key out or write null"
    if several and isinstance(value, str) and _LIST_AS_TEXT.fullmatch(value):
        return f"one text with commas; several are a list, [{value}], or {value.replace(',', ' ')} on the command line"
    return None


def _accepts(hint: Any, kind: type) -> bool:
    """Say whether a type or union has a kind: `str | list[str] | None` has `list`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_accepts(part, kind) for part in typing.get_args(hint))
    return hint is kind or typing.get_origin(hint) is kind


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= 60 else f"{text[:57]}..."


def type_name(action: argparse.Action) -> str:
    """Return the name of the type of an option's values."""
    name = getattr(action.type, "__name__", str(action.type))
    return {"string_to_bool": "bool"}.get(name, name)
