"""Where things lie in an adapter's folder or repository: every file name, and the format's version.

adapter_config.json  adapter_model.safetensors      PEFT's, untouched
lori_config.json                                    the record: task, projection, counts, history, checksums
masks/<task>.safetensors                            the masks of every task, oldest first in the record
moments/<task>.safetensors                          what goes into the layers on its rows, where the run saved it
README.md  density.png  recipe.yaml                 the card, its picture; the recipe as it was run, where there is one
lori_run.txt                                        which run began here last; never pushed
eval_results.json                                   what `lori eval` measured
tokenizer_config.json  tokenizer.json  ...          the tokenizer and chat template that it was trained with
adapter_compact.safetensors                         all of it in one small file, instead of or beside the others
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
RECORD_NAME = "lori_config.json"
MASKS_FOLDER = "masks"
MOMENTS_FOLDER = "moments"
COMPACT_NAME = "adapter_compact.safetensors"
CARD_NAME = "README.md"
PICTURE_NAME = "density.png"
RECIPE_NAME = "recipe.yaml"
RUN_NAME = "lori_run.txt"  # in an output_dir: the identity of the run that began last
EVAL_RESULTS_NAME = "eval_results.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODEL_CONFIG = "config.json"  # of a whole model
# What `save_pretrained` of a tokenizer or processor writes: the adapter answers in the template it was trained with.
_TOKENIZER_FILES = {
    TOKENIZER_CONFIG,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
}
_MORE_TEMPLATES = re.compile(r"additional_chat_templates/[\w-]+\.jinja")

FORMAT_VERSION = 2  # of the record, the mask files and the compact file

MAX_JSON_BYTES = 10_000_000  # an adapter's JSON has some kB; a parser would build gigabytes from 100 MB
_MAX_TOKENIZER_BYTES = 100_000_000  # a vocabulary of 262,144 tokens has 33 MB

_TASK_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_MASKS_FILE = re.compile(rf"{MASKS_FOLDER}/{_TASK_NAME}\.safetensors")
_MOMENTS_FILE = re.compile(rf"{MOMENTS_FOLDER}/{_TASK_NAME}\.safetensors")
_AUTHORS_MASKS = re.compile(rf"{MASKS_FOLDER}/(0\.\d+)_mask\.pt")
_AUTHORS_DEFAULT = f"{MASKS_FOLDER}/0.9_mask.pt"  # the paper's sparsity; their repositories may hold others
_OTHER_WEIGHTS = re.compile(rf"adapter_model.*|(pytorch_)?model.*\.(safetensors|bin)|{re.escape(MODEL_CONFIG)}")
_OURS = {*PEFT_FILES, RECORD_NAME, COMPACT_NAME, CARD_NAME, PICTURE_NAME, RECIPE_NAME, EVAL_RESULTS_NAME}


def masks_name(task: str) -> str:
    """Return the name of a task's mask file, from the adapter's folder."""
    return f"{MASKS_FOLDER}/{task}.safetensors"


def moments_name(task: str) -> str:
    """Return the name of the file of a task's moments, from the adapter's folder."""
    return f"{MOMENTS_FOLDER}/{task}.safetensors"


def is_ours(name: str) -> bool:
    """Say whether a file, named from its folder or repository, is one of an adapter's."""
    kinds = (_MASKS_FILE, _MOMENTS_FILE)
    return name in _OURS or any(kind.fullmatch(name) for kind in kinds) or is_tokenizers(name)


def is_tokenizers(name: str) -> bool:
    """Say whether a file, named from its folder or repository, is one of a tokenizer's or processor's."""
    return name in _TOKENIZER_FILES or _MORE_TEMPLATES.fullmatch(name) is not None


def max_bytes(name: str) -> int | None:
    """Return how many bytes a file, named from its folder, may have before a parser sees it; `None` for no limit."""
    if not name.endswith(".json"):
        return None
    return _MAX_TOKENIZER_BYTES if is_tokenizers(name) else MAX_JSON_BYTES


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder's tokenizer, empty if there is none: name from the folder -> file."""
    if not (folder / TOKENIZER_CONFIG).is_file():
        return {}
    files = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    names = {file.relative_to(folder).as_posix(): file for file in sorted(files)}
    return {name: file for name, file in names.items() if is_tokenizers(name)}


def obstacles(there: Iterable[str]) -> list[str]:
    """
    Choose the files of a folder that an adapter written into it would replace or be confused with.

    A card is none: one that was edited by hand is kept.
    """
    return [name for name in sorted(there) if (is_ours(name) and name != CARD_NAME) or _OTHER_WEIGHTS.fullmatch(name)]


def left_over(there: Iterable[str], new: Collection[str]) -> list[str]:
    """
    Choose the files of an adapter that was there before and that a new one does not have.

    Args:
        there (`Iterable[str]`): all files there, named from the folder or repository.
        new (`Collection[str]`): the new adapter's.

    Returns:
        `list[str]`: none where there was no adapter; without the tokenizer of a whole model that lies there.
    """
    there = list(there)
    if not {RECORD_NAME, ADAPTER_CONFIG, COMPACT_NAME} & {*there}:
        return []
    of_a_model = MODEL_CONFIG in there
    return [name for name in there if is_ours(name) and name not in new and not (of_a_model and is_tokenizers(name))]


def is_authors_masks(name: str) -> bool:
    """Say whether a file, named from its folder or repository, holds masks as the paper's authors store them."""
    return _AUTHORS_MASKS.fullmatch(name) is not None


def choose(names: Iterable[str], *, weights: bool = True) -> list[str]:
    """
    Choose the files of an adapter from those of a repository; with its weights, those of its tokenizer.

    The plain files go before the compact one, which says the same, and our masks before the authors' own, of which
    only one can be the adapter's: the paper's sparsity where there are several.

    Args:
        names (`Iterable[str]`): all files there, named from the folder.
        weights (`bool`, *optional*, defaults to `True`): whether the weights are wanted too, or the masks alone.

    Returns:
        `list[str]`: empty where there is no adapter, or no masks if only these are wanted.
    """
    names = sorted(names)
    tokenizer = [name for name in names if weights and is_tokenizers(name)]
    has_weights = {*PEFT_FILES} <= {*names}
    masks = [name for name in names if _MASKS_FILE.fullmatch(name)]
    if COMPACT_NAME in names and not (has_weights if weights else masks):
        return [COMPACT_NAME, *tokenizer]
    authors = [name for name in names if is_authors_masks(name)]
    if not masks and authors:
        masks = [_AUTHORS_DEFAULT] if _AUTHORS_DEFAULT in authors else authors[:1] if len(authors) == 1 else []
    if not (has_weights if weights else masks):
        return []
    record = [name for name in names if name == RECORD_NAME]
    return [*record, *masks, *(PEFT_FILES if weights else ()), *tokenizer]


def check_task_name(task: Any) -> str:
    """Return a task's name; raise `ValueError` unless it can be a file's name everywhere."""
    if not isinstance(task, str) or not re.fullmatch(_TASK_NAME, task):
        raise ValueError(
            f"`task_name={task!r}` cannot name a file. Up to 96 letters, digits, '.', '_' and '-' are allowed, the "
            "first a letter or digit. Pass e.g. `task_name='code'`."
        )
    return task


def task_name_of(name: str, otherwise: str) -> str:
    """Make a task's name from another name, e.g. a repository's; `otherwise` where nothing of it is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:96] or otherwise


class LaterFormatError(ValueError):
    """A file of a format that only a later `lori_trl` knows."""


def check_version(version: Any, file: str | Path) -> None:
    """
    Check a file's format version.

    Raises:
        `TypeError`: it is no format that this `lori_trl` reads.
        `LaterFormatError`: only a later one can.
    """
    if type(version) is int and version > FORMAT_VERSION:
        raise LaterFormatError(
            f"`{file}` has format_version {version}. This lori_trl reads version {FORMAT_VERSION}. Upgrade lori_trl."
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise TypeError(f"format_version={version!r}")
