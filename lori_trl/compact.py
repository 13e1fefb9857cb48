"""An adapter as one small file, and back. What the file holds: `adapter/compact.py`."""

import logging
from pathlib import Path

import torch

from .adapter.compact_file import read_compact, write_compact
from .adapter.folder import open_adapter
from .adapter.masks import LoriMasks
from .adapter.write import check_output, check_output_file, complete, staged, write_contents
from .inputs.files import replacing

logger = logging.getLogger(__name__)


def export_compact(
    folder: str | Path,
    file: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    allow_modified: bool = False,
) -> Path:
    """
    Write an adapter's folder as one small file.

    Args:
        folder (`str` or `Path`): the adapter's folder.
        file (`str` or `Path`): where to.
        dtype (`torch.dtype`, *optional*):
            What the trained entries are rounded to: `torch.bfloat16`, `torch.float16`, or `torch.int8` with a scale a
            matrix; by default they are kept bit for bit.
        overwrite (`bool`, *optional*, defaults to `False`): whether a file that is there may be replaced.
        allow_modified (`bool`, *optional*, defaults to `False`):
            Take an adapter whose B was changed after `lori_trl` saved it.

    Returns:
        `Path`: the file, written in one step.

    Raises:
        `FileNotFoundError`: the folder holds no complete LoRI adapter.
        `FileExistsError`: `file` exists, or is being written.
        `ValueError`: `file` lies in the adapter's folder, or a file of the adapter is unreadable or changed.
    """
    folder, file = Path(folder), Path(file)
    check_output_file(file, folder, overwrite=overwrite)
    with open_adapter(folder, allow_modified=allow_modified) as adapter:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, seconds=0) as partial:
            write_compact(partial, adapter.contents(), dtype)
            check_output_file(file, folder, overwrite=overwrite)  # another process may have been faster
        if any("chat_template" in name for name in adapter.tokenizer):
            logger.warning(
                f"`{folder}` has a chat template, and a compact file has no tokenizer: with `{file}`, the base's is "
                "used. Where that has another template, hand on the tokenizer's files too, or push the adapter."
            )
    return file


def expand(file: str | Path, folder: str | Path, *, overwrite: bool = False) -> None:
    """
    Restore an adapter's folder from its compact form: B bit for bit, A drawn again from its seed and checked.

    Args:
        file (`str` or `Path`): the compact file.
        folder (`str` or `Path`): where to.
        overwrite (`bool`, *optional*, defaults to `False`): whether an adapter that is there may be replaced.

    Raises:
        `FileNotFoundError`: there is no such file.
        `FileExistsError`: the folder holds an adapter.
        `ValueError`: the file is no compact adapter or is altered, or this platform draws another A.
    """
    check_output(folder, [file], overwrite=overwrite)
    contents = read_compact(Path(file))
    entries, metadata = next(reversed(contents.masks.values()), ({}, None))
    with staged(folder) as stage:
        write_contents(stage, contents)
        newest = LoriMasks(entries, **vars(metadata)) if entries else None
        complete(stage, contents.record, newest, beside=folder)
        check_output(folder, [file], overwrite=overwrite)  # another process may have been faster
