"""Whether a tokenizer takes the rows: found before the base model is loaded, and told by the row."""

import copy
import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from trl import get_training_chat_template

from ..inputs.files import describe_fault
from ..recipes.row_formats import text_columns


def tokenizer_as_trained(tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> PreTrainedTokenizerBase:
    """
    Return a copy of a tokenizer with the chat template and special tokens that a run gives it. Not every trainer of
    TRL's has fields for them.

    Raises:
        `ValueError`: with `assistant_only_loss`, the template does not mark the assistant's words, and TRL knows no
            other form of it that does.
    """
    tokenizer, given = copy.deepcopy(tokenizer), vars(args)
    if (path := given.get("chat_template_path")) is not None:
        if Path(path).is_file():
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        else:
            source = AutoTokenizer.from_pretrained(path)
            tokenizer.chat_template, tokenizer.eos_token = source.get_chat_template(), source.eos_token
    tokenizer.eos_token = given.get("eos_token") or tokenizer.eos_token
    tokenizer.pad_token = given.get("pad_token") or tokenizer.pad_token
    if given.get("assistant_only_loss") and tokenizer.chat_template is not None:
        try:
            get_training_chat_template(tokenizer)
        except ValueError as error:
            place = path if path is not None else f"{tokenizer.name_or_path}/chat_template.jinja"
            raise ValueError(
                f"`assistant_only_loss=True`, but the chat template in `{place}` has no {{% generation %}}, which "
                "marks what the assistant says. A template with it is needed; TRL has one for well-known models. Copy "
                "the file, put {% generation %} and {% endgeneration %} around the assistant's content and its end, "
                "and pass it as `--chat_template_path FILE.jinja`; or make rows of prompt and completion."
            ) from error
    return tokenizer


def check_tokenizer(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    source: str,
    *,
    text_field: str = "text",
    columns: tuple[str, ...] | None = None,
    chat_template: str | None = None,
) -> None:
    """
    Check that a tokenizer takes rows: text needs an EOS token, messages a chat template that knows their roles.

    Of rows whose messages are alike (in roles, kinds of content and order) one is rendered; of a stream, of the
    first 100.

    Args:
        rows (`Iterable[Mapping[str, Any]]`): rows that [`check_text`] has passed; one at least.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer; processors of images are not looked at.
        source (`str`): what the rows are called in an error.
        text_field (`str`, *optional*, defaults to `"text"`): the column of plain text.
        columns (`tuple[str, ...]`, *optional*):
            those that hold text or messages, for other trainers than of supervised training.
        chat_template (`str`, *optional*): in place of the tokenizer's own.

    Raises:
        `ValueError`: it does not take them.
    """
    first = next(iter(rows))
    texts = columns or (() if "input_ids" in first else text_columns(first, text_field))
    if not texts or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    name = tokenizer.name_or_path
    conversational = isinstance(first[texts[-1]], list)
    if tokenizer.eos_token is None and not (conversational and tokenizer.pad_token is not None):
        raise ValueError(
            f"The tokenizer of `{name}` has no EOS token. One ends every completion, or the model would not learn to "
            "stop, and pads the rows of a batch. Pass one from its vocabulary, e.g. `--eos_token '<|endoftext|>'`."
        )
    if not conversational:
        return
    template = chat_template or tokenizer.chat_template
    if template is None:
        raise ValueError(
            f"The tokenizer of `{name}` has no chat template, and `{source}` has messages. A template makes text of "
            "them. Pass `--chat_template_path` with a .jinja file or a model that has one, or rows of text."
        )
    known: set[str] = set()
    for number, row in enumerate(islice(rows, 100) if isinstance(rows, IterableDataset) else rows):
        if (shape := _shape(row, texts)) in known:
            continue
        known.add(shape)
        try:
            _render(row, texts, tokenizer, template)
        except Exception as error:  # whatever a template makes of what it does not foresee
            raise ValueError(
                f"Row {number} of `{source}` does not go through the chat template of `{name}` "
                f"({describe_fault(error)}). Allowed are the roles that it knows, in its order. Correct the row or "
                "leave it out, or pass another template as `--chat_template_path`."
            ) from error


def _shape(row: Mapping[str, Any], columns: Iterable[str]) -> str:
    """Describe what of a row a chat template may stumble over."""
    messages = [
        (each.get("role"), type(content := each.get("content")).__name__, bool(content), [k for k in each if each[k]])
        for column in columns
        for each in (*row[column], {})
    ]
    return repr((messages, bool(row.get("tools")), row.get("chat_template_kwargs")))


def _render(row: Mapping[str, Any], columns: tuple[str, ...], tokenizer: Any, template: str) -> None:
    """Make text of a row's messages as TRL does."""
    tools = json.loads(tools) if isinstance(tools := row.get("tools"), str) else tools
    kwargs = {"chat_template": template, "tools": tools, "tokenize": False, **(row.get("chat_template_kwargs") or {})}
    prompt = row["prompt"] if "prompt" in columns else []
    if prompt:
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **kwargs)
    for column in columns:
        if column != "prompt":
            tokenizer.apply_chat_template([*prompt, *row[column]], **kwargs)
