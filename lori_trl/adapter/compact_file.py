"""The compact form: an adapter without what can be drawn or counted again, in one file.

A comes from its seed, and of B only the trained entries say anything. What is left is the seed, the positions of the
entries, and their values. Positions are the gaps between neighbours, a byte each (255 stands for 255 and more), in
zlib's Huffman code: at density 0.1 about 4.8 bits an entry, 2 % above the entropy of a random mask.

Tensors of the file, all modules in sorted order of their paths:

    values                 the entries of B, at the union of all positions; scales: one a module, where they are int8
    task.<task>.gaps       a task's positions, compressed bytes; "rest" has the entries outside every mask
    task.<task>.counts     positions per module (int64)
    samples                16 entries of A per module, to compare with where another platform draws A
    tensors.<name>         every other tensor of the adapter as it is; A itself, or of an A that was grown the rows,
                           where it has no seed
    A.<path>, scales.<path>  in their place, where values are int8 and A comes from activations: int8, a scale a row;
                           layers with the same A have it once

The metadata ends in a checksum over all of it.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..inputs.files import describe_fault, parse_json
from ..inputs.typed_values import left_out, plain, typed
from ..method.layers import module_path, tensor_name
from ..method.projections import Block, Projection, draw_projection
from .adapter_contents import Contents
from .layout import FORMAT_VERSION, LaterFormatError, check_task_name, check_version
from .mask_files import MasksMetadata
from .record import LoriRecord
from .safetensors import hash_tensor, opened

logger = logging.getLogger(__name__)

COMPACT_FORMAT = "lori_compact"

_REST = "rest"  # no task's name may be confused with it: tasks are stored as task.<name>
_SAMPLES = 16
_TOLERANCE = 1e-6
_ESCAPE = 255
# What a file may grow to in memory: that of Llama-3-8B at sparsity 0.9 grows 30 times, at 0.999 2,500 times.
_MAX_GROWTH, _ALWAYS_ALLOWED = 4096, 64_000_000

_Positions = list[np.ndarray]  # sorted flat positions in B, one array a module


@dataclass(frozen=True)
class _Header:
    """The file's metadata: what is known without its tensors."""

    format_version: int
    adapter_config: dict[str, Any]
    lori_config: dict[str, Any]
    recipe: str | None
    masks: dict[str, MasksMetadata]
    modules: dict[str, tuple[int, ...]]  # path -> rows and rank of B, columns of A
    dtypes: dict[str, str]
    projection_drawn: bool
    projection_rounded: dict[str, str] | None = left_out()  # path -> the path whose A it has, where A is int8
    # whether each block of an A that was grown is left out, to be drawn; unset where all are, or none
    blocks_drawn: tuple[bool, ...] | None = left_out()

    @property
    def sizes(self) -> list[int]:
        """Entries of every module's B."""
        return [rows * rank for rows, rank, _ in self.modules.values()]

    @property
    def names_of_positions(self) -> list[str]:
        return [*(f"task.{task}" for task in self.masks), _REST]

    def blocks(self, projection: Projection, rank: int) -> list[tuple[Block, bool]]:
        """Return the blocks of a module's A, and whether each is left out, to be drawn."""
        blocks = projection.as_blocks(rank)
        return list(zip(blocks, self.blocks_drawn or [self.projection_drawn] * len(blocks), strict=True))

    def check_stored(self, projection: Projection, tensors: Mapping[str, Tensor]) -> None:
        """Raise `TypeError` unless the rows of A that are not drawn are there."""
        rounded = self.projection_rounded or {}
        for path, (_, rank, columns) in self.modules.items():
            blocks = self.blocks(projection, rank)
            if sum(block.rank for block, _ in blocks) != rank:
                raise TypeError(f"blocks of A that are not the rows of {path}")
            if any(drawn and None in (block.seed, block.init) for block, drawn in blocks):
                raise TypeError("no seed for an A that is not there")
            kept = sum(block.rank for block, drawn in blocks if not drawn)
            stored = f"A.{rounded[path]}" if path in rounded else f"tensors.{tensor_name(path, 'lora_A')}"
            if kept and tensors[stored].shape != (kept, columns):
                raise TypeError(f"A of {path} has another shape than its module")
            if path in rounded and tensors[f"scales.{rounded[path]}"].shape != (kept, 1):
                raise TypeError(f"scales of another shape than A of {path}")

    def dtype(self, part: str) -> torch.dtype:
        """That of all A or all B."""
        return getattr(torch, self.dtypes[part])

    def check(self, record: LoriRecord, bytes_on_disk: int) -> None:
        """Raise `TypeError` if a field contradicts another one, or what it announces is not believable."""
        if not {*self.dtypes.values()} <= {"float32", "bfloat16", "float16"} or self.dtypes.keys() != {"A", "B"}:
            raise TypeError(f"dtypes {self.dtypes}")
        if any(len(shape) != 3 or min(shape) < 1 for shape in self.modules.values()):
            raise TypeError("modules without three sizes each")
        lora_B, lora_A = sum(self.sizes), sum(rank * columns for _, rank, columns in self.modules.values())
        if (lora_B, lora_A + lora_B) != (record.counts.lora_B, record.counts.lora):
            raise TypeError(f"{lora_A + lora_B:,} entries where the record counts {record.counts.lora:,}")
        if 4 * (lora_A + lora_B) > max(_ALWAYS_ALLOWED, _MAX_GROWTH * bytes_on_disk):
            raise TypeError(f"an adapter of {lora_A + lora_B:,} entries is not believable")
        if [*self.masks] != [task.task for task in record.tasks]:
            raise TypeError("masks of other tasks than the record names")
        for task in self.masks:
            check_task_name(task)


def is_compact(file: Path) -> bool:
    """Say whether a safetensors file holds an adapter's compact form. Raises `ValueError` if it is unreadable."""
    with opened(file) as tensors:
        return COMPACT_FORMAT in (tensors.metadata() or {})


def write_compact(file: Path, contents: Contents, dtype: torch.dtype | None = None) -> None:
    """
    Write an adapter in its compact form.

    Args:
        file (`Path`): where to.
        contents ([`Contents`]): the adapter.
        dtype (`torch.dtype`, *optional*):
            What the trained entries are rounded to: `torch.bfloat16`, `torch.float16`, or `torch.int8` with a scale a
            matrix; by default they are kept bit for bit. With int8, an A from activations is rounded too, row by row.
    """
    state = dict(contents.tensors)
    B = dict(sorted((module_path(name), state.pop(name)) for name in sorted(state) if ".lora_B." in name))
    A = {module_path(name): state.pop(name) for name in sorted(state) if ".lora_A." in name}
    projection = contents.record.projection
    drawn = _drawn_blocks(projection, A)
    kept = {path: _rows_not_drawn(weight, projection, drawn) for path, weight in A.items()}
    rounded = _shared(kept) if dtype == torch.int8 and projection.is_stored and not all(drawn) else None
    if not all(drawn) and rounded is None:
        state |= {tensor_name(path, "lora_A"): weight for path, weight in kept.items()}
    positions = {f"task.{task}": [_where(masks[path]) for path in B] for task, (masks, _) in contents.masks.items()}
    known = _unions(positions.values(), len(B))
    positions[_REST] = [
        np.setdiff1d(_where(_bits(each)), taken) for each, taken in zip(B.values(), known, strict=True)
    ]
    union = _unions(positions.values(), len(B))
    flat = ((path, weight.flatten()) for path, weight in B.items())
    values = {path: weight[torch.from_numpy(where)] for (path, weight), where in zip(flat, union, strict=True)}

    tensors = {f"tensors.{name}": tensor.contiguous() for name, tensor in state.items()}
    for name, sets in positions.items():
        tensors |= {f"{name}.gaps": _encode(sets), f"{name}.counts": torch.tensor([len(each) for each in sets])}
    tensors |= _round(values, dtype)
    tensors |= _round_projections(kept, rounded or {})
    tensors["samples"] = torch.stack([_sample(A[path]) for path in B])
    header = _Header(
        format_version=FORMAT_VERSION,
        adapter_config=contents.adapter_config,
        lori_config={},
        recipe=contents.recipe,
        masks={task: metadata for task, (_, metadata) in contents.masks.items()},
        modules={path: (*weight.shape, A[path].shape[1]) for path, weight in B.items()},
        dtypes={"A": _name_of(next(iter(A.values())).dtype), "B": _name_of(next(iter(B.values())).dtype)},
        projection_drawn=all(drawn),
        projection_rounded=rounded,
        blocks_drawn=drawn if any(drawn) and not all(drawn) else None,
    )
    record = contents.record
    hashes = {name: hash_tensor(tensor) for name, tensor in contents.tensors.items()}
    if dtype is not None:  # the record says what a reader will see
        hashes |= {name: hash_tensor(weight) for name, weight in _weights(header, tensors, union).items()}
    if rounded is not None:
        A = _assembled(header, projection, tensors)
        hashes |= {tensor_name(path, "lora_A"): hash_tensor(weight) for path, weight in A.items()}
        record, header = _on_rounded_projection(record, header, projection.with_fingerprints(A))
    record = record.sealed(contents.adapter_config, hashes)
    metadata = plain(replace(header, lori_config=record.to_dict()))
    metadata["sha256"] = _checksum(metadata, tensors)
    save_file(tensors, file, metadata={COMPACT_FORMAT: json.dumps(metadata)})


def read_compact(file: Path) -> Contents:
    """
    Read an adapter's compact form: B bit for bit, A drawn again from its seed and checked.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the file is no compact adapter or is altered, or this platform draws another A.
    """
    header, record, tensors, positions = _read(file)
    masks = _masks(header, positions)
    state = {name.removeprefix("tensors."): tensor for name, tensor in tensors.items() if name.startswith("tensors.")}
    A = _assembled(header, record.projection, tensors)
    is_drawn = header.projection_drawn or header.blocks_drawn is not None
    drawn = record.projection.with_fingerprints(A) if is_drawn else record.projection
    if drawn != record.projection:
        _check_samples(file, A, tensors["samples"])
        masks = _on_projection(masks, record.projection, drawn)
        record = replace(record, projection=drawn)
    state |= {tensor_name(path, "lora_A"): weight for path, weight in A.items()}
    state |= _weights(header, tensors, _unions(positions.values(), len(header.modules)))
    return Contents(header.adapter_config, record, header.recipe, masks, state)


def read_compact_masks(file: Path) -> dict[str, tuple[dict[str, Tensor], MasksMetadata]]:
    """
    Read only the masks of a compact file: task -> its masks and what is known of them, oldest first.

    Raises: as [`read_compact`].
    """
    header, _, _, positions = _read(file)
    return _masks(header, positions)


def _read(file: Path) -> tuple[_Header, LoriRecord, dict[str, Tensor], dict[str, _Positions]]:
    try:
        with opened(file) as opened_file:
            metadata = parse_json((opened_file.metadata() or {})[COMPACT_FORMAT])
            check_version(metadata["format_version"], file)
            checksum = metadata.pop("sha256")
            header = typed(_Header, metadata, "")
            record = LoriRecord.from_dict(header.lori_config, file)
            header.check(record, file.stat().st_size)
            tensors = {name: opened_file.get_tensor(name) for name in opened_file.keys()}  # noqa: SIM118
        if checksum != _checksum(metadata, tensors):
            raise TypeError("the contents do not match their checksum")
        positions = {name: _decode(tensors, name, header.sizes) for name in header.names_of_positions}
        count = sum(map(len, _unions(positions.values(), len(header.modules))))
        if tensors["values"].shape != (count,):
            raise TypeError("the values are not as many as the positions")
        header.check_stored(record.projection, tensors)
        if tensors["samples"].shape != (len(header.modules), _SAMPLES):
            raise TypeError(f"samples of shape {tuple(tensors['samples'].shape)}")
    except LaterFormatError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, RuntimeError, zlib.error) as error:
        raise ValueError(
            f"`{file}` is not a readable compact adapter ({describe_fault(error)}). It is what `export_compact` "
            "writes. Fetch or export it again."
        ) from error
    return header, record, tensors, positions


def _checksum(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {hash_tensor(tensors[name])}\n".encode())
    return digest.hexdigest()


# ---- masks and B -----------------------------------------------------------------------------------------------


def _masks(header: _Header, positions: Mapping[str, _Positions]) -> dict[str, tuple[dict[str, Tensor], MasksMetadata]]:
    masks = {}
    for task, metadata in header.masks.items():
        entries = {}
        for (path, (rows, rank, _)), where in zip(header.modules.items(), positions[f"task.{task}"], strict=True):
            entries[path] = torch.zeros(rows * rank, dtype=torch.bool)
            entries[path][torch.from_numpy(where)] = True
            entries[path] = entries[path].view(rows, rank)
        masks[task] = entries, metadata
    return masks


def _on_projection(masks: Mapping[str, tuple], stored: Projection, drawn: Projection) -> dict[str, tuple]:
    return {
        task: (entries, replace(metadata, projection=drawn) if metadata.projection == stored else metadata)
        for task, (entries, metadata) in masks.items()
    }


def _weights(header: _Header, tensors: Mapping[str, Tensor], union: _Positions) -> dict[str, Tensor]:
    """Put the values back in their places: tensor's name -> B `(out_features, rank)`."""
    weights, done = {}, 0
    scales = tensors["scales"].tolist() if "scales" in tensors else [1.0] * len(union)
    for (path, (rows, rank, _)), where, scale in zip(header.modules.items(), union, scales, strict=True):
        values = tensors["values"][done : done + len(where)]
        done += len(where)
        if values.dtype == torch.int8:
            values = values.float() * scale
        weight = torch.zeros(rows * rank, dtype=header.dtype("B"))
        weight[torch.from_numpy(where)] = values.to(weight.dtype)
        weights[tensor_name(path, "lora_B")] = weight.view(rows, rank)
    return weights


def _round(values: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Round the values of every module; int8 comes with a scale for each of them."""
    each = list(values.values())
    if dtype is None:
        return {"values": torch.cat(each)}
    if dtype != torch.int8:
        rounded = {"values": torch.cat(each).to(dtype)}
    else:
        scales = torch.stack([part.float().abs().max() / 127 if len(part) else torch.tensor(0.0) for part in each])
        steps = [(part.float() / scale.clamp(min=1e-38)).round() for part, scale in zip(each, scales, strict=True)]
        rounded = {"values": torch.cat(steps).to(torch.int8), "scales": scales}
    if not all(tensor.isfinite().all() for tensor in rounded.values()):
        largest = 3.4e38 if dtype == torch.int8 else torch.finfo(dtype).max
        path = next(path for path, part in values.items() if not (part.float().abs() <= largest).all())
        raise ValueError(
            f"`dtype={_name_of(dtype)}` cannot hold all values of {path}: some exceed {largest:.3g}, or are infinite. "
            "All must fit. Leave `dtype` out to keep them as they are."
        )
    return rounded


# ---- A ---------------------------------------------------------------------------------------------------------


def _draw(block: Block, path: str, columns: int) -> Tensor | None:
    """Draw a block's rows of a module's A; `None` where no seed does."""
    if block.seed is None or block.init is None:
        return None
    return draw_projection(path, block.rank, columns, seed=block.seed, init=block.init)


def _in_blocks(weight: Tensor, projection: Projection) -> list[tuple[Block, Tensor]]:
    blocks = projection.as_blocks(len(weight))
    return list(zip(blocks, weight.split([block.rank for block in blocks]), strict=True))


def _drawn_blocks(projection: Projection, A: Mapping[str, Tensor]) -> tuple[bool, ...]:
    """Say of each block of A whether its seed draws it, in all modules."""
    same = []
    for path, weight in A.items():
        drawn = [(rows, _draw(block, path, rows.shape[1])) for block, rows in _in_blocks(weight, projection)]
        same.append([other is not None and torch.equal(rows, other.to(rows.dtype)) for rows, other in drawn])
    return tuple(all(of_block) for of_block in zip(*same, strict=True))


def _rows_not_drawn(weight: Tensor, projection: Projection, drawn: Sequence[bool]) -> Tensor:
    blocks = _in_blocks(weight, projection)
    return torch.cat([weight[:0], *(rows for (_, rows), left in zip(blocks, drawn, strict=True) if not left)])


def _assembled(header: _Header, projection: Projection, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put every A together, of the rows that are drawn and those that are stored."""
    A, rounded = {}, header.projection_rounded or {}
    for path, (_, rank, columns) in header.modules.items():
        parts, done = [], 0
        leader, name = rounded.get(path), f"tensors.{tensor_name(path, 'lora_A')}"
        if leader is not None:
            kept = (tensors[f"A.{leader}"].float() * tensors[f"scales.{leader}"]).to(header.dtype("A"))
        else:
            kept = tensors.get(name, torch.empty(0, columns))
        for block, is_drawn in header.blocks(projection, rank):
            drawn = _draw(block, path, columns) if is_drawn else None
            parts.append(kept[done : done + block.rank] if drawn is None else drawn.to(header.dtype("A")))
            done += 0 if is_drawn else block.rank
        A[path] = torch.cat(parts)
    return A


def _shared(A: Mapping[str, Tensor]) -> dict[str, str]:
    """Find which modules have the same A: path -> the first one with it."""
    leaders: dict[str, str] = {}
    return {path: leaders.setdefault(hash_tensor(weight), path) for path, weight in sorted(A.items())}


def _round_projections(A: Mapping[str, Tensor], leaders: Mapping[str, str]) -> dict[str, Tensor]:
    """Round every A to int8 with a scale a row."""
    tensors: dict[str, Tensor] = {}
    for path in dict.fromkeys(leaders.values()):
        weight = A[path].float()
        scales = weight.abs().amax(1, keepdim=True) / 127
        tensors |= {f"A.{path}": (weight / scales.clamp(min=1e-38)).round().to(torch.int8), f"scales.{path}": scales}
    return tensors


def _on_rounded_projection(record: LoriRecord, header: _Header, rounded: Projection) -> tuple[LoriRecord, _Header]:
    """Let record and masks name the A that a reader will see."""
    stored = record.projection
    masks = {
        task: replace(metadata, projection=rounded) if metadata.projection == stored else metadata
        for task, metadata in header.masks.items()
    }
    return replace(record, projection=rounded), replace(header, masks=masks)


def _sample(weight: Tensor) -> Tensor:
    return weight.flatten()[torch.linspace(0, weight.numel() - 1, _SAMPLES).long()].float()


def _check_samples(file: Path, A: Mapping[str, Tensor], samples: Tensor) -> None:
    distance = max((_sample(A[path]) - sample).abs().max().item() for path, sample in zip(A, samples, strict=True))
    if not distance <= _TOLERANCE:
        raise ValueError(
            f"`{file}`: the projections A drawn here differ from the stored ones by {distance:.2g}. They may differ "
            f"by {_TOLERANCE:g}, as the last digits of another platform do. Use the plain PEFT files instead."
        )
    logger.warning(f"This platform draws A with other last digits than the one of {file}: {distance:.2g} apart.")


# ---- positions -------------------------------------------------------------------------------------------------


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int32 if weight.element_size() == 4 else torch.int16)  # -0.0 is not 0 here


def _where(entries: Tensor) -> np.ndarray:
    return np.flatnonzero(entries.numpy())


def _unions(sets: Any, modules: int) -> _Positions:
    """Unite positions module by module."""
    sets = list(sets)
    nothing = np.empty(0, dtype=np.int64)
    return [np.unique(np.concatenate([nothing, *(each[number] for each in sets)])) for number in range(modules)]


def _encode(sets: _Positions) -> Tensor:
    gaps = np.concatenate([np.diff(positions, prepend=-1) - 1 for positions in sets])
    ends = np.cumsum(gaps // _ESCAPE + 1) - 1
    codes = np.full(ends[-1] + 1 if len(ends) else 0, _ESCAPE, dtype=np.uint8)
    codes[ends] = gaps % _ESCAPE
    packed = [_deflate(codes.tobytes(), strategy) for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)]
    return torch.frombuffer(bytearray(min(packed, key=len)), dtype=torch.uint8)


def _deflate(data: bytes, strategy: int) -> bytes:
    packer = zlib.compressobj(level=6, strategy=strategy)
    return packer.compress(data) + packer.flush()


def _decode(tensors: Mapping[str, Tensor], name: str, sizes: Sequence[int]) -> _Positions:
    gaps, counts = tensors[f"{name}.gaps"], typed(tuple[int, ...], tensors[f"{name}.counts"].tolist(), name)
    if any(not 0 <= count <= size for count, size in zip(counts, sizes, strict=True)):
        raise TypeError(f"the positions of {name} are altered")
    unpacker = zlib.decompressobj()
    largest = sum(counts) + sum(sizes) // _ESCAPE + 1
    codes = np.frombuffer(unpacker.decompress(gaps.numpy().tobytes(), largest), dtype=np.uint8)
    ends = np.flatnonzero(codes != _ESCAPE)
    if not unpacker.eof or unpacker.unused_data or len(ends) != sum(counts) or len(codes) != (ends[-1:] + 1).sum():
        raise TypeError(f"the positions of {name} are altered")
    steps = (np.diff(ends, prepend=-1) - 1) * _ESCAPE + codes[ends] + 1
    sets = [np.cumsum(each) - 1 for each in np.split(steps, np.cumsum(counts)[:-1])]
    if any(len(positions) and positions[-1] >= size for positions, size in zip(sets, sizes, strict=True)):
        raise TypeError(f"the positions of {name} lie outside their matrix")
    return sets


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
