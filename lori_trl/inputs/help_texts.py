"""The help of a configuration's fields, from its docstring: a field is described once."""

import inspect
import re
from dataclasses import fields
from types import MappingProxyType
from typing import TypeVar

Config = TypeVar("Config", bound=type)

# "name (`type`, *optional*):" with lines below it that are indented further, or "> - `name`: text" in a note.
_ENTRY = re.compile(r"^( *)(\w+) \(`.*\):$(?P<text>(?:\n\1 +.*)+)", re.MULTILINE)
_NOTE = re.compile(r"^ *> - `(\w+)`: (?P<text>.*(?:\n *>   .*)*)", re.MULTILINE)


def help_from_docstring(config: Config) -> Config:
    """
    Give each field of a dataclass that its docstring describes this text as `metadata["help"]`: a class decorator.

    It is an entry's first paragraph, and of a note on another default what stands before "Defaults to"; the rest is to
    be read on the page alone. Inherited fields keep their help, for the class that they come from has them too.

    ```python
    >>> from dataclasses import dataclass, fields
    >>> @help_from_docstring
    ... @dataclass
    ... class Config:
    ...     '''
    ...     Settings.
    ...
    ...     Args:
    ...         sparsity (`float`, *optional*, defaults to `0.9`):
    ...             Share of B that stays untouched:
    ...             90 % by default.
    ...     '''
    ...
    ...     sparsity: float = 0.9
    >>> fields(Config)[0].metadata["help"]
    'Share of B that stays untouched: 90 %% by default.'

    ```
    """
    described = inspect.cleandoc(config.__doc__ or "")  # `python -OO` leaves none
    texts = {match[2]: match["text"] for match in _ENTRY.finditer(described)}
    for match in _NOTE.finditer(described):
        texts[match[1]] = re.sub(r"\n *>", "\n", match["text"]).partition("Defaults to")[0]
    own = inspect.get_annotations(config)
    for field in fields(config):
        if field.name in own and field.name in texts:
            text = " ".join(texts[field.name].split()).replace("%", "%%")  # argparse formats with %
            field.metadata = MappingProxyType({**field.metadata, "help": text})
    return config
