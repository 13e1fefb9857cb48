"""Docstrings in Hugging Face's form, for griffe, which reads Google's."""

import re

from griffe import Extension

_NOTE = re.compile(r"^( *)> \[!NOTE\]\n((?:\1>.*\n?)+)", re.MULTILINE)
_GROUP = re.compile(r"^(?:Parameters:\n)? +> (Parameters that control .+)\n+", re.MULTILINE)
_ARGUMENT = re.compile(r"^( +)([\w*, ]+) \((.*`.*)\):", re.MULTILINE)
_RESULT = re.compile(r"^    (\[?`[^`]+`\]?(?:(?:, | or )\[?`[^`]+`\]?)*): ", re.MULTILINE)


def google_docstring(text: str) -> str:
    """
    Turn a docstring in Hugging Face's form into Google's, which griffe reads.

    ``name (`str` or `int`, *optional*, defaults to `x`):`` becomes ``name (str | int):``, for the signature has the
    rest; a group of parameters becomes a section with a title, a note of GitHub's one of Material's.
    """
    text = _NOTE.sub(_note, text)
    text = _GROUP.sub(r"Parameters: \1\n", text)
    text = _ARGUMENT.sub(lambda match: f"{match[1]}{match[2]} ({_plain_type(match[3])}):", text)
    return _RESULT.sub(lambda match: f"    {_plain_type(match[1])}: ", text)


def _plain_type(text: str) -> str:
    kind = re.sub(r", (\*optional\*|defaults to).*", "", text)
    return re.sub(r"`|\[(?=`)|(?<=`)\]", "", kind.replace("`, `", "` | `").replace(" or ", " | "))


def _note(match: re.Match) -> str:
    lines = [line.strip().removeprefix(">").strip() for line in match[2].splitlines()]
    body = "\n".join(lines).replace("\n- ", "\n\n- ", 1)  # Markdown wants a blank line before a list
    return "!!! note\n\n" + "".join(f"    {line}\n" for line in body.splitlines())


class HuggingFaceDocstrings(Extension):
    """Let griffe read docstrings in Hugging Face's form."""

    def on_instance(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = google_docstring(obj.docstring.value)
