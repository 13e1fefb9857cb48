"""YAML by strangers: its size, depth and numbers are bounded, and nothing in it stands for more than it says."""

import re
from pathlib import Path
from typing import Any

import yaml

try:
    from yaml import CSafeLoader as SafeLoader  # ten times as fast
except ImportError:  # PyYAML was built without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]

MAX_BYTES = 512 * 1024
MAX_DEPTH = 16
MAX_DIGITS = 40  # characters of a number; a float of 40 characters holds what a float can hold

_DATE, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("timestamp", "int", "float"))


class _Loader(SafeLoader):
    """
    Text, numbers, truth values, lists and mappings; a date is text like any other.

    Numbers are YAML 1.2's: PyYAML reads 1.1, where 0100 is 64, 1:30 is 90, and 5e-4 is text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_DATE, _INT, _FLOAT)]
        for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_scalar(self, node):
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise _not_allowed(f"a number of more than {MAX_DIGITS} characters", node)
        return super().construct_scalar(node)

    def construct_int(self, node):
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_Loader.add_constructor(_INT, _Loader.construct_int)
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$|0o[0-7]+$|0x[0-9a-fA-F]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def read_mapping(file: Path) -> tuple[dict[Any, Any], dict[str, list[int]]]:
    """
    Read a file that is one YAML mapping.

    Aliases and tags are refused when they are met, before anything is expanded or constructed. No error quotes the
    file, which may be something else than YAML.

    Returns:
        `tuple[dict, dict[str, list[int]]]`: the mapping; and key -> its lines, for keys that stand there twice.

    Raises:
        `ValueError`: it is too large, no UTF-8, no YAML, or not a mapping.
    """
    with file.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise _refusal(file, f"it has more than {MAX_BYTES:,} bytes")
    try:
        text = content.decode("utf-8")
        _check_events(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        mapping: Any = loader.construct_document(node) if node is not None else None
    except UnicodeDecodeError as error:
        raise _refusal(file, f"byte {error.start} is not UTF-8") from None
    except yaml.YAMLError as error:
        raise _refusal(file, _place(error)) from None
    if not isinstance(node, yaml.MappingNode):
        raise _refusal(file, f"it holds a {type(mapping).__name__}")
    lines: dict[str, list[int]] = {}
    for key, _ in node.value:
        lines.setdefault(key.value, []).append(key.start_mark.line + 1)
    return mapping, {key: where for key, where in lines.items() if len(where) > 1}


def _check_events(text: str) -> None:
    """Raise at the first event that a plain document does not have; they are made one by one."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise _not_allowed("an alias", event)
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag is not None:
            raise _not_allowed("a tag", event)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _not_allowed(f"more than {MAX_DEPTH} levels", event)


def _not_allowed(name: str, at: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"{name} is not allowed", problem_mark=at.start_mark)  # type: ignore[arg-type]


def _place(error: Exception) -> str:
    """Say what is wrong and where, without the lines that PyYAML quotes."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return f"character {getattr(error, 'position', '')} is not allowed in YAML"


def _refusal(file: Path, fault: str) -> ValueError:
    return ValueError(
        f"`{file}` is no recipe: {fault}. A recipe is lines of `key: value`, in UTF-8. Correct it, or pass another."
    )
