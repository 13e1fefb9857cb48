"""Recipes: find them, check them, list them."""

import argparse
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What TRL and transformers leave unchecked, or check one by one: intervals of the numbers in a recipe.
_INTERVALS = {
    "sparsity": "[0, 1)",
    "calibration_sparsities": "[0, 1)",
    "calibration_fraction": "(0, 1]",
    "lora_dropout": "[0, 1)",
    "lora_r": "[1, inf)",
    "lora_alpha": "(0, inf)",
    "learning_rate": "(0, inf)",
    "calibration_learning_rate": "(0, inf)",
    "num_train_epochs": "(0, inf)",
    "calibration_num_train_epochs": "(0, inf)",
    "per_device_train_batch_size": "[1, inf)",
    "per_device_eval_batch_size": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "max_length": "[2, inf)",
    "warmup_steps": "[0, inf)",
    "weight_decay": "[0, inf)",
    "max_grad_norm": "[0, inf)",
}
# Keys of which a recipe sets one at most.
_CONFLICTS = (("dataset_name", "dataset_path"), ("load_in_4bit", "load_in_8bit"), ("bf16", "fp16"))


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


def recipe_facts(file: Path) -> dict[str, str]:
    """
    Say what a recipe is, from its keys and its header.

    Returns:
        `dict[str, str]`: `task`, `base`, `variant`, `rank`, `source` (the header's `Reproduces:`), and `measured`, the
        time and figures of a run in this project (the header's `Measured:`); empty where there is none.
    """
    recipe, text = read_recipe(file), file.read_text(encoding="utf-8")
    header = dict(re.findall(r"^# (\w+): +(.+)$", text, flags=re.MULTILINE))
    if file.parent.name == "baselines":
        variant = "DoRA" if recipe.get("use_dora") else "LoRA" if recipe.get("use_peft") else "full"
    else:
        variant = "LoRAF" if recipe.get("disjoint_masks") else "LoRI-S" if recipe.get("sparsity", 0.9) else "LoRI-D"
    rank = "-" if variant == "full" else "the adapter's" if "adapter" in header.get("Needs", "") else ""
    return {
        "task": recipe.get("task_name") or str(recipe.get("dataset_name", "")).removesuffix("-data"),
        "base": str(recipe.get("model_name_or_path", "")).rpartition("/")[2],
        "variant": variant,
        "rank": str(recipe.get("lora_r", rank)),
        "source": re.split(r" \(|,|;", header.get("Reproduces", "").removeprefix("paper "))[0],
        "measured": header.get("Measured", ""),
    }


def validate_recipe(file: Path, parser: argparse.ArgumentParser) -> None:
    """
    Check every key and value of a recipe against a parser's arguments.

    Raises:
        `ValueError`: one error that lists all faults: keys that are unknown (with the nearest valid name), that stand
            there twice or exclude each other; values of a wrong type or out of range.
    """
    actions = {action.dest: action for action in reversed(parser._actions)}  # a field before its `--no_field`
    mappings = {name for config in parser.dataclass_types for name in getattr(config, "_VALID_DICT_FIELDS", ())}
    recipe = read_recipe(file)
    faults = [f"{key}: in lines {', '.join(map(str, lines))}. Keep one" for key, lines in _repeated_keys(file)]
    for key, value in recipe.items():
        if key == "env":  # TrlParser's: environment variables to set
            if not isinstance(value, dict):
                faults.append(f"env={value!r} is no mapping of environment variables")
        elif key not in actions:
            faults.append(f"{key}: no such field{nearest(str(key), actions)}")
        elif isinstance(value, dict) and key in mappings:
            continue
        elif fault := _value_fault(value, actions[key]) or _range_fault(value, _INTERVALS.get(key)):
            faults.append(f"{key}={value!r}: {fault}")
    for keys in _CONFLICTS:
        if all(recipe.get(key) for key in keys):
            faults.append(f"{', '.join(f'{key}={recipe[key]!r}' for key in keys)}: they exclude each other. Keep one")
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise ValueError(
            f"`{file}` has {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n{lines}\nAllowed are the fields that "
            "`lori-sft --help` lists, with values of their types. Correct the file."
        )


def _repeated_keys(file: Path) -> list[tuple[str, list[int]]]:
    """Find the keys that YAML would let the last one win: (key, its lines)."""
    import yaml

    lines: dict[str, list[int]] = {}
    for key, _ in yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader).value:
        lines.setdefault(key.value, []).append(key.start_mark.line + 1)
    return [(key, where) for key, where in lines.items() if len(where) > 1]


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


def _range_fault(value: Any, interval: str | None) -> str | None:
    """Say that a number is outside its interval, e.g. `"[0, 1)"`; None if it is not."""
    if value is None or interval is None:
        return None
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    for number in map(float, value if isinstance(value, list) else [value]):
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        if not (above and below):
            return f"outside {interval}"
    return None


def _type_name(action: argparse.Action) -> str:
    name = getattr(action.type, "__name__", str(action.type))
    return {"string_to_bool": "bool"}.get(name, name)
