"""The JSON schema of recipes, made from the parsers that check them: with it, editors complete and check."""

import argparse
import re
import types
from collections.abc import Mapping
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

_WORDS = {"description", "default"}  # of a schema, what allows or forbids nothing
_REQUIRES = {
    "description": "Fields that a call must set where the recipe does not: without them it would be another run.",
    "type": "array",
    "items": {"type": "string"},
}


def recipe_schema(training: Mapping[str, argparse.ArgumentParser], merge: argparse.ArgumentParser) -> dict[str, Any]:
    """
    Describe all recipes: for training, and for merging, which name `adapters`.

    Training recipes share their properties; which of them a trainer does not have, its own condition says. It is
    stricter than the command line in one thing: numbers and truth values are not text.

    Args:
        training (`Mapping[str, argparse.ArgumentParser]`): the parsers of the verbs that train, by their names.
        merge (`argparse.ArgumentParser`): the parser of what `lori merge` takes from a recipe.

    Returns:
        `dict[str, Any]`: a JSON schema, draft 7, which editors know best.
    """
    of_trainers = {name: _mapping_schema(parser)["properties"] for name, parser in training.items()}
    properties: dict[str, Any] = {}
    for own in of_trainers.values():
        for name, field in own.items():
            properties[name] = _either(properties[name], field) if name in properties else field
    trainer = {"description": "The trainer that it is for: the word after `lori`.", "enum": [*training]}
    more = {"env": _ENVIRONMENT, "requires": _REQUIRES, "trainer": trainer | {"default": "sft"}}
    of_training = {
        "type": "object",
        "properties": dict(sorted(properties.items())) | more,
        "additionalProperties": False,
        "allOf": [
            *({"not": _both_set(*keys)} for keys in CONFLICTS),
            *(
                {
                    "if": {"properties": {"trainer": {"const": name}}, "required": ["trainer"] * (name != "sft")},
                    "then": {"propertyNames": {"not": {"enum": sorted(properties.keys() - own)}}},
                }
                for name, own in of_trainers.items()
            ),
        ],
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of lori_trl",
        "if": {"required": ["adapters"]},
        "then": {"$ref": "#/definitions/merge"},
        "else": {"$ref": "#/definitions/training"},
        "definitions": {"training": of_training, "merge": _mapping_schema(merge)},
    }


def _either(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Describe a field that two trainers have: without a default that is not theirs both."""
    common = {key: one[key] for key in one if one[key] == other.get(key)}
    if one.keys() - other.keys() - _WORDS or any(one[key] != other.get(key) for key in one.keys() - _WORDS):
        kinds = [{key: each[key] for key in each.keys() - _WORDS} for each in (one, other)]
        return {"description": one["description"], "anyOf": kinds}
    return {"description": one["description"]} | common


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
