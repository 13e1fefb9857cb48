"""The file in which an adapter carries the moments of its task's inputs, so that a later task can leave them alone."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..inputs.files import describe_fault, parse_json, replacing
from ..inputs.typed_values import plain, typed
from ..method.moments import LowRank
from .layout import check_task_name, check_version, moments_name
from .record import read_record
from .safetensors import hash_tensor, opened

logger = logging.getLogger(__name__)

_FORMAT = "lori_moments"
_VERSION = 2  # as of the other files


@dataclass(frozen=True)
class _Header:
    format_version: int
    layers: dict[str, str]  # module path -> the path whose input it shares
    tokens: dict[str, int]
    energy: dict[str, float]


def write_moments(folder: str | Path, task: str, moments: Mapping[str, LowRank]) -> Path:
    """
    Write a task's moments into an adapter's folder, in bfloat16. Layers with one input have them once.

    Args:
        folder (`str` or `Path`): the adapter's folder; made if missing.
        task (`str`): the task.
        moments (`Mapping[str, LowRank]`): module path -> moments; layers with one input have the same object.

    Returns:
        `Path`: the file. It replaces an older one in one step.
    """
    file = Path(folder, moments_name(check_task_name(task)))
    file.parent.mkdir(parents=True, exist_ok=True)
    leaders: dict[int, str] = {}
    layers = {path: leaders.setdefault(id(moments[path]), path) for path in sorted(moments)}
    held = {path: moments[path] for path in leaders.values()}
    tensors = {path: each.factor.to(torch.bfloat16).contiguous() for path, each in held.items()}
    header = _Header(
        format_version=_VERSION,
        layers=layers,
        tokens={path: each.tokens for path, each in held.items()},
        energy={path: each.energy for path, each in held.items()},
    )
    values = plain(header)
    values["sha256"] = _checksum(values, tensors)
    with replacing(file) as partial:
        save_file(tensors, partial, metadata={_FORMAT: json.dumps(values)})
    return file


def read_moments(folder: str | Path) -> dict[str, LowRank]:
    """
    Read the moments of an adapter's newest task: module path -> moments.

    Raises:
        `FileNotFoundError`: the folder holds no adapter, or one without moments.
        `ValueError`: the file is unreadable or altered.
    """
    file = Path(folder, moments_name(read_record(folder).task))
    if not file.is_file():
        raise FileNotFoundError(
            f"The adapter in `{folder}` carries no moments ({file.name} is missing). One that was trained with "
            "`save_moments=True` does. Train it so, or pass its rows in `protect`."
        )
    try:
        with opened(file) as read:
            values = parse_json((read.metadata() or {})[_FORMAT])
            tensors = {path: read.get_tensor(path) for path in read.keys()}  # noqa: SIM118
        check_version(values["format_version"], file)
        if values.pop("sha256") != _checksum(values, tensors):
            raise TypeError("the contents do not match their checksum")
        header = typed(_Header, values, "")
        held = {
            path: LowRank(tensors[path].float(), header.tokens[path], header.energy[path])
            for path in dict.fromkeys(header.layers.values())
        }
        return {path: held[leader] for path, leader in header.layers.items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`{file}` is no readable file of moments ({describe_fault(error)}). It is what `save_moments=True` "
            "writes. Fetch or save the adapter again."
        ) from error


def _checksum(values: Mapping, tensors: Mapping) -> str:
    hashes = [f"{name} {hash_tensor(tensors[name])}" for name in sorted(tensors)]
    return hashlib.sha256("\n".join([json.dumps(values, sort_keys=True), *hashes]).encode()).hexdigest()
