"""Plain values, as JSON holds them, to dataclasses and back: every value must be of its field's type."""

import math
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def left_out() -> Any:
    """Make a dataclass's field that is left out of its plain values where it is `None`."""
    return field(default=None, metadata={"left_out": True})


def plain(value: Any) -> Any:
    """Return a dataclass, and whatever is in it, as JSON holds them."""
    if is_dataclass(value):
        members = {each: getattr(value, each.name) for each in fields(value)}
        return {
            each.name: plain(member)
            for each, member in members.items()
            if member is not None or not each.metadata.get("left_out")
        }
    if isinstance(value, (tuple, list)):
        return [plain(member) for member in value]
    return {name: plain(member) for name, member in value.items()} if isinstance(value, Mapping) else value


def typed(hint: Any, value: Any, name: str) -> Any:
    """
    Return a plain value as a type says.

    Args:
        hint (`Any`): a dataclass, `int`, `float`, `str`, `bool`, a union of these with `None`, `tuple[X, ...]`,
            `dict[str, X]`, or `Any`.
        value (`Any`): what JSON gave.
        name (`str`): where it stands, for the message.

    Raises:
        `TypeError`: the value, or one in it, is of another type, unknown or missing. `True` is no number, and
            neither are NaN and infinity.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        options = [option for option in arguments if option is not NoneType]
        return typed(type(value) if type(value) in options else options[0], value, name)
    if is_dataclass(hint):
        return _members(hint, value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(typed(arguments[0], member, f"{name}[{number}]") for number, member in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {key: typed(arguments[1], member, f"{name}.{key}") for key, member in value.items()}
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return value
    if type(value) is hint and hint is not float:
        return value
    raise _mismatch(value, name)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _members(cls: Any, value: Any, name: str) -> Any:
    hints = _hints(cls)
    if not isinstance(value, Mapping):
        raise _mismatch(value, name)
    if unknown := sorted(value.keys() - hints.keys()):
        raise TypeError(f"{name}: unknown key {unknown[0][:80]!r}")
    members = {key: typed(hints[key], member, f"{name}.{key}".lstrip(".")) for key, member in value.items()}
    return cls(**members)  # raises TypeError where one is missing


def _mismatch(value: Any, name: str) -> TypeError:
    return TypeError(f"{name}={str(value)[:80]!r} is no value for it")
