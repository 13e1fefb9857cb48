"""Mask files: `masks/<task>.safetensors`, one bit an entry, what is known of the mask as JSON, a checksum over both.

This module knows files and plain tensors; [`LoriMasks`] is made of what it returns.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..inputs.files import describe_fault, parse_json, replacing
from ..inputs.typed_values import plain, typed
from ..method.layers import GRANULARITIES
from ..method.projections import Projection
from .layout import (
    FORMAT_VERSION,
    MASKS_FOLDER,
    RECORD_NAME,
    LaterFormatError,
    check_task_name,
    check_version,
    choose,
    masks_name,
)
from .record import read_record
from .safetensors import opened

MASKS_FORMAT = "lori_masks"


@dataclass(frozen=True)
class MasksMetadata:
    """
    What is known of a task's masks beside their entries. See [`LoriMasks`] for the fields.

    Raises:
        `ValueError`: the granularity is not known, or the sparsity outside [0, 1).
    """

    task: str | None = None
    sparsity: float | None = None
    granularity: str = "model"
    threshold: float | None = None
    projection: Projection | None = None

    def __post_init__(self):
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity[:80]!r}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity}")


def write_masks(folder: str | Path, entries: Mapping[str, Tensor], metadata: MasksMetadata) -> Path:
    """
    Write a task's masks into an adapter's folder.

    Args:
        folder (`str` or `Path`): the adapter's folder; made if missing.
        entries (`Mapping[str, Tensor]`): module path -> bool tensor `(out_features, rank)`.
        metadata ([`MasksMetadata`]): what is known of them; its task names the file.

    Returns:
        `Path`: the file. It replaces an older one in one step.

    Raises:
        `ValueError`: the task is unset or no valid name.
    """
    file = Path(folder, masks_name(check_task_name(metadata.task)))
    file.parent.mkdir(parents=True, exist_ok=True)
    packed = {
        path: torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=None, bitorder="little"))
        for path, mask in entries.items()
    }
    shapes = {path: list(mask.shape) for path, mask in entries.items()}
    values = {"format_version": FORMAT_VERSION, **plain(metadata), "shapes": shapes}
    values["sha256"] = _checksum(values, packed)
    with replacing(file) as partial:
        save_file(packed, partial, metadata={MASKS_FORMAT: json.dumps(values)})
    return file


def read_masks(file: Path) -> tuple[dict[str, Tensor], MasksMetadata]:
    """
    Read a mask file.

    Returns:
        `tuple[dict[str, Tensor], MasksMetadata]`: module path -> bool tensor `(out_features, rank)`; what is known.

    Raises:
        `ValueError`: it is truncated, altered, of a later format or no mask file.
    """
    try:
        with opened(file) as tensors:
            values = parse_json((tensors.metadata() or {})[MASKS_FORMAT])
            packed = {path: tensors.get_tensor(path) for path in tensors.keys()}  # noqa: SIM118
        check_version(values["format_version"], file)
        if values.pop("sha256") != _checksum(values, packed):
            raise TypeError("the contents do not match their checksum")
        del values["format_version"]
        shapes = typed(dict[str, tuple[int, ...]], values.pop("shapes"), "shapes")
        if shapes.keys() != packed.keys():
            raise TypeError("the shapes are not those of the tensors")
        metadata = typed(MasksMetadata, values, "")
        check_task_name(metadata.task)
        return {path: unpack_bits(packed[path], shape) for path, shape in shapes.items()}, metadata
    except LaterFormatError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`{file}` is not a readable mask file ({describe_fault(error)}). A mask file is what "
            "`LoriMasks.save_pretrained` writes. Fetch or save it again."
        ) from error


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """
    Return a mask `(out_features, rank)` from its bits, lowest first.

    Raises:
        `TypeError`: they cannot be a mask of this shape.
    """
    if len(shape) != 2 or packed.dtype != torch.uint8 or min(shape) < 0 or packed.dim() != 1:
        raise TypeError(f"a mask of shape {shape} from {packed.dtype} {tuple(packed.shape)}")
    size = shape[0] * shape[1]
    if packed.numel() != -(-size // 8):
        raise TypeError(f"{packed.numel()} bytes cannot be a mask of shape {shape}")
    bits = np.unpackbits(packed.numpy(), count=size, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(*shape)


def find_masks(path: Path, task: str | None) -> Path:
    """
    Find the file that has the masks of a task.

    Args:
        path (`Path`): an adapter's folder, its `masks/` folder, or a file, which is returned.
        task (`str`, *optional*): which task's, where there are several; by default the newest.

    Raises:
        `FileNotFoundError`: there are no masks, or not of this task.
        `ValueError`: the record that says which task is newest is unreadable.
    """
    if path.is_file():
        return path
    inner = path / MASKS_FOLDER if (path / MASKS_FOLDER).is_dir() else path
    files = {file.name: file for file in path.glob("*") if file.is_file()}
    files |= {f"{MASKS_FOLDER}/{file.name}": file for file in inner.glob("*") if file.is_file() and _may_be(file)}
    chosen = [files[name] for name in choose(files, weights=False) if name != RECORD_NAME]
    if not chosen:
        raise FileNotFoundError(
            f"`{path}` holds no masks. Masks are a .safetensors file or a folder with `{MASKS_FOLDER}/<task>"
            ".safetensors` in it, here or on the Hub as `namespace/name`. Pass the folder that `save_model()` wrote."
        )
    if chosen[0].parent != inner or chosen[0].suffix == ".pt":
        return chosen[0]  # the compact form, or the authors' masks
    masks = {file.stem: file for file in chosen}
    return masks[pick_task(masks, task, path)]


def pick_task(tasks: Iterable[str], task: str | None, path: Path) -> str:
    """
    Return the task that is meant: the given one; else the newest on record, or of the newest file where none is.

    Raises:
        `FileNotFoundError`: there is no such task.
    """
    tasks = list(tasks)
    if task is None and len(tasks) > 1 and (path / RECORD_NAME).is_file():
        newest = read_record(path).task  # of a merged adapter, that is a name for several
        task = newest if newest in tasks else None
    if task is not None and task not in tasks:
        raise FileNotFoundError(
            f"`{path}` has no masks of task {task!r}. It has those of {', '.join(tasks)}. Pass one of these as `task`."
        )
    files = {name: path / masks_name(name) for name in tasks}
    age = {name: file.stat().st_mtime if file.is_file() else 0 for name, file in files.items()}
    return task if task is not None else max(tasks, key=lambda name: (age[name], tasks.index(name)))


def _may_be(file: Path) -> bool:
    return file.parent.name == MASKS_FOLDER or not file.name.startswith("adapter_")


def _checksum(values: Mapping[str, Any], packed: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in sorted(packed):
        digest.update(path.encode())
        digest.update(packed[path].contiguous().numpy().tobytes())
    return digest.hexdigest()
