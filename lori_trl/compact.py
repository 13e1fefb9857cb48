"""The compact form: an adapter without what can be drawn or counted again, in one file.

A comes from its seed, and of B only the trained entries say anything. What is left is the seed, the positions of the
entries, and their values. Positions are gaps between neighbours in a Rice code, whose parameter follows the density
of each matrix: at density 0.1 it takes 4.76 bits an entry, 1.4 % above the entropy of a random mask.

Tensors of the file, all modules in sorted order of their paths:

    values                      the entries of B, at the union of all positions
    task.<task>.unary, .remainder   the gaps of a task's mask, bits; "rest" has the entries outside every mask
    task.<task>.counts          coded entries per module (int64)
    task.<task>.parameters      Rice parameter per module (uint8); 128 more where the mask's complement is coded
    samples                     16 entries of A per module, to compare with where another platform draws A
    tensors.<name>              every other tensor of the adapter as it is; A itself, where it has no seed
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapter import (
    CONFIG_NAME,
    PEFT_FILES,
    RECIPE_NAME,
    checked_lori_config,
    read_lori_config,
    read_masks,
    staged,
)
from .files import replacing
from .layers import module_path
from .masks import COMPACT_FORMAT, LoriMasks, check_header
from .projections import draw_projection, fingerprint

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

_REST = "rest"  # no task's name may be confused with it: tasks are stored as task.<name>
_SAMPLES = 16
_TOLERANCE = 1e-6
_MAX_ENTRIES = 1 << 31  # of A and B together: 25 times those of Llama-3-8B at rank 32


def export_compact(folder: str | Path, file: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """
    Write an adapter's folder as one small file.

    Args:
        folder (`str` or `Path`): the adapter's folder.
        file (`str` or `Path`): where to; replaced in one step.
        dtype (`torch.dtype`, *optional*):
            What the trained entries are rounded to, e.g. `torch.bfloat16`; by default they are kept bit for bit.

    Returns:
        `Path`: the file.

    Raises:
        `FileNotFoundError`: the folder holds no complete LoRI adapter.
        `ValueError`: a file of it is unreadable.
    """
    folder, file = Path(folder), Path(file)
    config = read_lori_config(folder)
    masks = read_masks(folder, config)
    check_header(folder / PEFT_FILES[1])
    state = load_file(folder / PEFT_FILES[1])
    B = {module_path(name): state.pop(name) for name in sorted(state) if ".lora_B." in name}
    B = dict(sorted(B.items()))
    A = {module_path(name): state[name] for name in sorted(state) if ".lora_A." in name}
    for task_masks in masks.values():
        task_masks.check_shapes({path: weight.shape for path, weight in B.items()})

    projection = config["projection"]
    drawn = projection["seed"] is not None and fingerprint(_draw(projection, A)) == fingerprint(A)
    if drawn:
        state = {name: tensor for name, tensor in state.items() if ".lora_A." not in name}
    positions = {f"task.{task}": [_positions(task_masks[path]) for path in B] for task, task_masks in masks.items()}
    union = [_union(sets) for sets in zip(*positions.values(), strict=True)] if positions else [_NONE] * len(B)
    positions[_REST] = [
        np.setdiff1d(_positions(_bits(weight) != 0), known) for weight, known in zip(B.values(), union, strict=True)
    ]
    union = [_union(sets) for sets in zip(*positions.values(), strict=True)]

    tensors = {f"tensors.{name}": tensor.contiguous() for name, tensor in state.items()}
    for name, sets in positions.items():
        coded = _encode(sets, [weight.numel() for weight in B.values()])
        tensors |= {f"{name}.{part}": torch.from_numpy(array) for part, array in coded.items()}
    values = [weight.flatten()[torch.from_numpy(where)] for weight, where in zip(B.values(), union, strict=True)]
    tensors["values"] = torch.cat(values).to(dtype or values[0].dtype)
    tensors["samples"] = torch.stack([_sample(A[path]) for path in B])
    metadata = {
        "format_version": FORMAT_VERSION,
        "adapter_config": json.loads((folder / PEFT_FILES[0]).read_text(encoding="utf-8")),
        "lori_config": config,
        "recipe": (folder / RECIPE_NAME).read_text(encoding="utf-8") if (folder / RECIPE_NAME).is_file() else None,
        "masks": {task: task_masks.metadata for task, task_masks in masks.items()},
        "modules": {path: [weight.shape[0], *A[path].shape] for path, weight in B.items()},
        "dtypes": {"A": _name_of(next(iter(A.values())).dtype), "B": _name_of(next(iter(B.values())).dtype)},
        "projection_drawn": drawn,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        save_file(tensors, partial, metadata={COMPACT_FORMAT: json.dumps(metadata)})
    return file


def expand(file: str | Path, folder: str | Path) -> None:
    """
    Restore an adapter's folder from its compact form: B bit for bit, A drawn again from its seed and checked.

    Args:
        file (`str` or `Path`): the compact file.
        folder (`str` or `Path`): where to; files that are already there are replaced, others left alone.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the file is no compact adapter or is altered, or this platform draws another A.
    """
    metadata, tensors = _read(Path(file))
    config, modules = metadata["lori_config"], metadata["modules"]
    masks = _masks(metadata, tensors)
    dtype_A, dtype_B = (getattr(torch, metadata["dtypes"][name]) for name in "AB")
    state = {name.removeprefix("tensors."): tensor for name, tensor in tensors.items() if name.startswith("tensors.")}
    if metadata["projection_drawn"]:
        shapes = {path: torch.empty(rank, columns, dtype=dtype_A) for path, (_, rank, columns) in modules.items()}
        A = _draw(config["projection"], shapes)
        found = fingerprint(A)
        if found != config["projection"]["fingerprint"]:
            _check_samples(file, A, tensors["samples"])
            masks = _with_fingerprint(masks, config["projection"]["fingerprint"], found)
            config["projection"]["fingerprint"] = found
        state |= {f"base_model.model.{path}.lora_A.weight": weight for path, weight in A.items()}
    sets = [_decode(tensors, name, modules) for name in _names_of_sets(metadata)]
    done = 0
    for (path, (rows, rank, _)), *where in zip(modules.items(), *sets, strict=True):
        union = torch.from_numpy(_union(where))
        weight = torch.zeros(rows * rank, dtype=dtype_B)
        weight[union] = tensors["values"][done : done + len(union)].to(dtype_B)
        done += len(union)
        state[f"base_model.model.{path}.lora_B.weight"] = weight.view(rows, rank)
    with staged(folder) as stage:
        save_file(state, stage / PEFT_FILES[1], metadata={"format": "pt"})
        (stage / PEFT_FILES[0]).write_text(
            json.dumps(metadata["adapter_config"], indent=2, sort_keys=True), encoding="utf-8"
        )
        for task_masks in masks.values():
            task_masks.save_pretrained(stage)
        if metadata["recipe"] is not None:
            (stage / RECIPE_NAME).write_text(metadata["recipe"], encoding="utf-8")
        (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_compact_masks(file: str | Path) -> dict[str, LoriMasks]:
    """
    Read only the masks of a compact file: task -> its masks, oldest first.

    Raises: as [`expand`].
    """
    metadata, tensors = _read(Path(file))
    return _masks(metadata, tensors)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.is_file():
        raise FileNotFoundError(f"`{file}` does not exist. A compact adapter is one file. Correct the path.")
    check_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {})[COMPACT_FORMAT])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if metadata["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"`{file}` has format_version {metadata['format_version']}. This lori_trl reads versions up to "
                f"{FORMAT_VERSION}. Upgrade lori_trl."
            )
        checked_lori_config(metadata["lori_config"], file)
        sizes = [rows * rank + rank * columns for rows, rank, columns in metadata["modules"].values()]
        if min(sizes, default=0) < 0 or sum(sizes) > _MAX_ENTRIES:
            raise SafetensorError(f"an adapter of {sum(sizes):,} entries is not believable")
        union = [
            _union(sets)
            for sets in zip(
                *(_decode(tensors, name, metadata["modules"]) for name in _names_of_sets(metadata)), strict=True
            )
        ]
        if sum(map(len, union)) != tensors["values"].numel():
            raise SafetensorError("the values are not as many as the positions")
        if tensors["samples"].shape != (len(metadata["modules"]), _SAMPLES):
            raise SafetensorError(f"samples of shape {tuple(tensors['samples'].shape)}")
        if not {*metadata["dtypes"].values()} <= {"float32", "bfloat16", "float16"}:
            raise SafetensorError(f"dtypes {metadata['dtypes']}")
    except (SafetensorError, KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"`{file}` is not a readable compact adapter: {error!r}. It is what `export_compact` writes. Fetch or "
            "export it again."
        ) from error
    return metadata, tensors


def _masks(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LoriMasks]:
    masks = {}
    for task, facts in metadata["masks"].items():
        entries = {}
        sets = _decode(tensors, f"task.{task}", metadata["modules"])
        for (path, (rows, rank, _)), where in zip(metadata["modules"].items(), sets, strict=True):
            entries[path] = torch.zeros(rows * rank, dtype=torch.bool)
            entries[path][torch.from_numpy(where)] = True
            entries[path] = entries[path].view(rows, rank)
        masks[task] = LoriMasks(entries, **facts)
    return masks


def _with_fingerprint(masks: Mapping[str, LoriMasks], stored: str, found: str) -> dict[str, LoriMasks]:
    for task_masks in masks.values():
        if task_masks.projection is not None and task_masks.projection["fingerprint"] == stored:
            task_masks.projection = {**task_masks.projection, "fingerprint": found}
    return dict(masks)


# ---- A ---------------------------------------------------------------------------------------------------------


def _draw(projection: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        path: draw_projection(path, *weight.shape, seed=projection["seed"], init=projection["init"]).to(weight.dtype)
        for path, weight in like.items()
    }


def _sample(weight: Tensor) -> Tensor:
    return weight.flatten()[torch.linspace(0, weight.numel() - 1, _SAMPLES).long()].float()


def _check_samples(file: str | Path, A: Mapping[str, Tensor], samples: Tensor) -> None:
    distance = max((_sample(A[path]) - sample).abs().max().item() for path, sample in zip(A, samples, strict=True))
    if not distance <= _TOLERANCE:
        raise ValueError(
            f"`{file}`: the projections A drawn here differ from the stored ones by {distance:.2g}. They may differ "
            f"by {_TOLERANCE:g}, as the last digits of another platform do. Use the plain PEFT files instead."
        )
    logger.warning(f"This platform draws A with other last digits than the one of {file}: {distance:.2g} apart.")


# ---- positions -------------------------------------------------------------------------------------------------

_NONE = np.empty(0, dtype=np.int64)
_INVERTED = 128  # added to a module's parameter


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int32 if weight.element_size() == 4 else torch.int16)  # -0.0 is not 0 here


def _positions(mask: Tensor) -> np.ndarray:
    return np.flatnonzero(mask.numpy())


def _union(sets: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.unique(np.concatenate([_NONE, *sets]))


def _names_of_sets(metadata: Mapping[str, Any]) -> list[str]:
    return [*(f"task.{task}" for task in metadata["masks"]), _REST]


def _encode(sets: list[np.ndarray], sizes: list[int]) -> dict[str, np.ndarray]:
    """
    Code sorted positions, module by module: a gap g is g >> k ones and a zero, and the k lowest bits of g.

    k is the one that makes a module shortest of those near log2 of its mean gap. Of a module that has more than half
    of its entries, the others are coded.
    """
    unary, remainder, counts, parameters = [], [], [], []
    for positions, size in zip(sets, sizes, strict=True):
        inverted = 2 * len(positions) > size
        coded = np.setdiff1d(np.arange(size), positions) if inverted else positions
        gaps = np.diff(coded, prepend=-1) - 1
        guess = int(math.log2(gaps.mean() + 1)) if len(gaps) else 0
        candidates = range(max(guess - 1, 0), guess + 2)
        k = min(candidates, key=lambda k: int((gaps >> k).sum()) + len(gaps) * k)
        ends = np.cumsum((gaps >> k) + 1)
        ones = np.ones(ends[-1] if len(ends) else 0, dtype=bool)
        ones[ends - 1] = False
        unary.append(ones)
        remainder.append((gaps[:, None] >> np.arange(k) & 1).astype(bool).ravel())
        counts.append(len(coded))
        parameters.append(k | _INVERTED * inverted)
    return {
        "unary": np.packbits(np.concatenate(unary)),
        "remainder": np.packbits(np.concatenate(remainder)),
        "counts": np.array(counts, dtype=np.int64),
        "parameters": np.array(parameters, dtype=np.uint8),
    }


def _decode(tensors: Mapping[str, Tensor], name: str, modules: Mapping[str, list[int]]) -> list[np.ndarray]:
    unary, remainder, counts, parameters = (
        tensors[f"{name}.{part}"].numpy() for part in ("unary", "remainder", "counts", "parameters")
    )
    ends = np.flatnonzero(np.unpackbits(unary) == 0)
    remainder = np.unpackbits(remainder)
    sets, entries, bits, start = [], 0, 0, 0
    for (rows, rank, _), count, parameter in zip(modules.values(), counts.tolist(), parameters.tolist(), strict=True):
        size, k = rows * rank, parameter & ~_INVERTED
        if not 0 <= count <= size or entries + count > len(ends) or k > 40:
            raise SafetensorError(f"the positions of {name} are altered")
        stops = ends[entries : entries + count]
        gaps = (np.diff(stops, prepend=start - 1) - 1) << k
        low = remainder[bits : bits + count * k].reshape(count, k).astype(np.int64)
        positions = np.cumsum(gaps + (low << np.arange(k)).sum(axis=1) + 1) - 1
        if count and positions[-1] >= size:
            raise SafetensorError(f"the positions of {name} lie outside their matrix")
        sets.append(np.setdiff1d(np.arange(size), positions) if parameter & _INVERTED else positions)
        start = stops[-1] + 1 if count else start
        entries, bits = entries + count, bits + count * k
    return sets


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
