"""
The forms of training rows: TRL's, and what becomes one of them.

| columns | what TRL trains on |
| --- | --- |
| `prompt`, `completion` | the completion: text, or messages |
| `messages`, `conversations` (ShareGPT's `from` and `value` too) | the whole conversation |
| `text`, or what `dataset_text_field` says | all of it |
| `input_ids` | tokens, as they are |
| raw rows ([`raw_row_converter`]) | prompt and completion |

Of a row that has more than one of these, the first one counts, and the other columns are left out: TRL would take some
of each. What TRL's other trainers take is in `ROW_KINDS`.
"""

import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Features, Json, List, Value

from .raw_rows import RowFault, raw_row_converter

IMAGES = ("images", "image")
_TOKENS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks")
_BESIDE_MESSAGES = ("tools", "chat_template_kwargs")
# ShareGPT's names for who speaks, and those that chat templates know.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}
_ALLOWED = "text, or a list of messages with a role and content, the same in prompt and completion"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class RowFormat:
    """What a data set's rows are, told by the first of them."""

    columns: tuple[str, ...]  # those that TRL trains on
    texts: tuple[str, ...]  # of these, those that hold text or messages
    conversational: bool  # whether they hold messages
    # makes a row of these columns of a row as it was read. Raises [`RowFault`]
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    flags: tuple[str, ...] = ()  # of the columns, those that hold true or false

    @property
    def features(self) -> Features:
        """The types of the columns. Messages are kept as they are, each with its own keys."""
        types: dict[str, Any] = {name: List(Value("int64")) if name in _TOKENS else Json() for name in self.columns}
        text = List(Json()) if self.conversational else Value("string")
        return Features(types | dict.fromkeys(self.texts, text) | dict.fromkeys(self.flags, Value("bool")))


@dataclass(frozen=True)
class RowKind:
    """A kind of rows that a trainer takes, beside those of supervised training."""

    texts: tuple[tuple[str, ...], ...]  # groups of columns that hold text or messages; the first that is there counts
    allowed: str  # what is allowed, for an error
    flags: tuple[str, ...] = ()  # columns that must hold true or false
    more: tuple[str, ...] = ()  # columns that are taken where they are there; `"*"` is every other one

    def columns(self, names: Collection[str]) -> tuple[str, ...]:
        """Choose the columns that hold text or messages; none where rows are not of this kind."""
        if not set(self.flags) <= set(names):
            return ()
        return next((group for group in self.texts if set(group) <= set(names)), ())


_PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
_PAIRED = "prompt, chosen and rejected; or chosen and rejected alone, which begin with the same prompt"
# What TRL's other trainers take, by its names for the kinds.
ROW_KINDS = {
    "preference": RowKind(_PAIRS, _PAIRED),
    "preference with a margin": RowKind(_PAIRS, f"{_PAIRED}; and, where it is known, margin", more=("margin",)),
    "unpaired preference": RowKind(
        (("prompt", "completion"),), "prompt, completion and label (true where it is desirable)", flags=("label",)
    ),
    "prompt-only": RowKind((("prompt",),), "prompt, and what the reward functions ask for", more=("*",)),
}


def row_format(first: Mapping[str, Any], text_field: str = "text", kind: RowKind | None = None) -> RowFormat | None:
    """
    Tell the format of a data set from its first row; `None` where it is none that can be trained on.

    Args:
        first (`Mapping[str, Any]`): the row as it was read.
        text_field (`str`, *optional*, defaults to `"text"`): the column of plain text, TRL's `dataset_text_field`.
        kind ([`RowKind`], *optional*): of the rows that are needed; by default those of supervised training.
    """
    if kind is not None:
        texts = kind.columns(first)
        more = [name for name in first if name not in texts and (name in kind.more or "*" in kind.more)]
        return _trl_format(first, texts, kind.flags, tuple(more)) if texts else None
    if "canonical_solution" not in first:
        if "input_ids" in first:
            columns = tuple(name for name in _TOKENS if name in first)
            return RowFormat(columns, (), False, lambda row: {name: row.get(name) for name in columns})
        if texts := text_columns(first, text_field):
            return _trl_format(first, texts)
    if raw := raw_row_converter(first):

        def convert(row: Mapping[str, Any]) -> dict[str, Any]:
            new = raw(row)
            return {name: new[name] for name in ("prompt", "completion")}

        return RowFormat(("prompt", "completion"), ("prompt", "completion"), False, convert)
    return None


def text_columns(columns: Collection[str], text_field: str = "text") -> tuple[str, ...]:
    """Choose the columns that TRL's supervised training takes text or messages from; none where there are none."""
    groups = (("prompt", "completion"), ("messages",), ("conversations",), (text_field,))
    return next((group for group in groups if set(group) <= set(columns)), ())


def _trl_format(
    first: Mapping[str, Any], source: tuple[str, ...], flags: tuple[str, ...] = (), more: tuple[str, ...] = ()
) -> RowFormat:
    conversational = source[0] in ("messages", "conversations") or isinstance(first[source[-1]], list)
    texts = ("messages",) if source == ("conversations",) else source
    known = tuple(name for name in (*_BESIDE_MESSAGES * conversational, *IMAGES) if name in first)
    beside = tuple(dict.fromkeys((*known, *more)))

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        check_row(row, source, conversational=conversational)
        new = {name: row.get(name) for name in beside}
        if "chat_template_kwargs" in new:  # TRL unpacks it
            new["chat_template_kwargs"] = new["chat_template_kwargs"] or {}
        for name in flags:
            if row.get(name) not in (True, False):
                raise RowFault(f"has `{name}={_SHORT.repr(row.get(name))}`", "true or false")
            new[name] = bool(row[name])
        for name, column in zip(texts, source, strict=True):
            new[name] = [chat_message(each) for each in row[column]] if conversational else row[column]
        return new

    return RowFormat((*texts, *beside, *flags), texts, conversational, convert, flags)


def chat_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """
    Give a message its role and content: ShareGPT's `from` and `value`, human and gpt, become user and assistant.

    Raises:
        [`RowFault`]: it is from somebody who has no role.
    """
    sender = message.get("from")
    if sender is None:
        return dict(message)
    if str(sender).lower() not in _ROLES:
        raise RowFault(f"has a message from {_SHORT.repr(sender)}", f"one from {', '.join(_ROLES)}")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": _ROLES[str(sender).lower()], "content": message.get("value"), **others}


def check_row(row: Mapping[str, Any], columns: Collection[str], *, conversational: bool | None = None) -> None:
    """
    Check that a row's columns hold text, or messages, and all of them the same.

    Args:
        row (`Mapping[str, Any]`): the row.
        columns (`Collection[str]`): which of its columns.
        conversational (`bool`, *optional*): whether other rows hold messages; not compared by default.

    Raises:
        [`RowFault`]: they do not.
    """
    for column in columns:
        value = row.get(column)
        if isinstance(value, str):
            _check_characters(column, value)
        elif not isinstance(value, list) or not value or not all(map(_is_message, value)):
            raise RowFault(f"has `{column}={_SHORT.repr(value)}`", _ALLOWED)
    messages = [column for column in columns if isinstance(row[column], list)]
    if messages and len(messages) < len(columns):
        text = next(column for column in columns if column not in messages)
        raise RowFault(f"has text in `{text}` and messages in `{messages[0]}`", _ALLOWED)
    if conversational is not None and bool(messages) != conversational:
        kinds = ("text", "messages") if conversational else ("messages", "text")
        raise RowFault(f"has {kinds[0]} where row 0 has {kinds[1]}", _ALLOWED)


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    keys = ("role", "content") if value.get("from") is None else ("from", "value")
    sender, content = map(value.get, keys)
    return isinstance(sender, str) and (isinstance(content, (str, list)) or bool(value.get("tool_calls")))


def _check_characters(column: str, text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON's escapes can name half a character
            half = text[error.start].encode("unicode_escape").decode()
            raise RowFault(f"has half a character, {half}, in `{column}`", "text in whole characters") from error
