"""The JSON schema of recipes, made from the parsers that check them: with it, editors complete and check."""

import argparse
import re
import types
from dataclasses import fields
from typing import Any

from ..inputs.intervals import INTERVALS
from .find import CONFLICTS, RecipeField, recipe_fields, type_name

_TYPES = {"bool": "boolean", "dict": "object", "float": "number", "int": "integer", "str": "string"}
_ENVIRONMENT = {
    "description": "Environment variables to set.",
    "type": "object",
    "additionalProperties": {"type": ["string", "number"]},
}

_REQUIRES = {
    "description": "Fields that a call must set where the recipe does not: without them it would be another run.",
    "type": "array",
    "items": {"type": "string"},
}


def recipe_schema(training: argparse.ArgumentParser, merge: argparse.ArgumentParser) -> dict[str, Any]:
    """
    Describe all recipes: for training, and for merging, which name `adapters`.

    It is stricter than the command line in one thing: numbers and truth values are not text.

    Args:
        training (`argparse.ArgumentParser`): the parser of `lori-sft`.
        merge (`argparse.ArgumentParser`): the parser of what `lori merge` takes from a recipe.

    Returns:
        `dict[str, Any]`: a JSON schema, draft 7, which editors know best.
    """
    of_training = _mapping_schema(training)
    of_training["properties"] |= {"env": _ENVIRONMENT, "requires": _REQUIRES}
    of_training["allOf"] = [{"not": _both_set(*keys)} for keys in CONFLICTS]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of lori_trl",
        "if": {"required": ["adapters"]},
        "then": {"$ref": "#/definitions/merge"},
        "else": {"$ref": "#/definitions/training"},
        "definitions": {"training": of_training, "merge": _mapping_schema(merge)},
    }


def _mapping_schema(parser: argparse.ArgumentParser) -> dict[str, Any]:
    fields = recipe_fields(parser)
    return {
        "type": "object",
        "properties": {name: _field_schema(name, fields[name]) for name in sorted(fields)},
        "additionalProperties": False,
    }


def _field_schema(name: str, field: RecipeField) -> dict[str, Any]:
    item = _item_schema(name, field)
    kinds = [item]
    if field.several or field.accepts(list):
        kinds.append({"type": "array", "items": item} | ({"minItems": 1} if field.action.nargs == "+" else {}))
    if field.is_mapping:
        kinds.append({"type": "object"})
    if field.accepts(types.NoneType):
        kinds.append({"type": "null"})
    schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    described = {"description": " ".join((field.action.help or "").replace("%%", "%").split())}
    return described | schema | _default(field.action.default)


def _item_schema(name: str, field: RecipeField) -> dict[str, Any]:
    if field.item_class is not None:
        keys: dict[str, Any] = {each.name: {} for each in fields(field.item_class)}
        return {"type": "object", "properties": keys, "additionalProperties": False}
    if field.action.choices is not None:
        return {"enum": [*field.action.choices]}
    return {"type": _TYPES.get(type_name(field.action), "string")} | _bounds(INTERVALS.get(name))


def _bounds(interval: str | None) -> dict[str, Any]:
    """Turn an interval such as `"-1 or [1, inf)"` into JSON schema's words."""
    if interval is None:
        return {}
    exception, _, bounds = interval.rpartition(" or ")
    low, high = bounds[1:-1].split(", ")
    schema = {"minimum" if bounds[0] == "[" else "exclusiveMinimum": float(low)}
    if high != "inf":
        schema["maximum" if bounds[-1] == "]" else "exclusiveMaximum"] = float(high)
    return {"anyOf": [{"const": float(exception)}, schema]} if exception else schema


def _default(value: Any) -> dict[str, Any]:
    value = getattr(value, "value", value)  # an enumeration's
    plain = isinstance(value, (bool, int, float, list)) or (isinstance(value, str) and not re.search(r"[/\\]", value))
    return {"default": value} if plain else {}


def _both_set(one: str, other: str) -> dict[str, Any]:
    is_set = {"not": {"enum": [False, None]}}
    return {"required": [one, other], "properties": {one: is_set, other: is_set}}
