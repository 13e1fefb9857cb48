"""A safetensors file written tensor by tensor, so that one tensor at a time is in memory."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


class SafetensorsWriter:
    """
    Write a safetensors file of float32 tensors, in any order, with no more than one of them in memory.

    `safetensors.torch.save_file` takes all tensors at once; the file is the same, byte for byte.

    Args:
        file (`str` or `Path`): where to.
        shapes (`Mapping[str, Sequence[int]]`): the name and shape of every tensor.
        metadata (`Mapping[str, str]`, *optional*): what goes into the file's header.

    Raises:
        `RuntimeError`: at the end, if a tensor was not written.

    Source: the format's description in safetensors: a header of JSON, padded with spaces to a multiple of 8 bytes and
    preceded by its length; then the tensors, sorted by name where all have the same dtype.
    """

    def __init__(
        self, file: str | Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None
    ):
        self.shapes = {name: list(shapes[name]) for name in sorted(shapes)}
        self.missing = set(shapes)
        header: dict = {"__metadata__": dict(metadata)} if metadata else {}
        offsets, end = {}, 0
        for name, shape in self.shapes.items():
            offsets[name] = end
            end += 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offsets[name], end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.file = open(file, "wb")
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.offsets = {name: 8 + len(text) + offset for name, offset in offsets.items()}

    def write(self, name: str, *blocks: Tensor) -> None:
        """
        Write one tensor, given whole or as blocks of rows from top to bottom.

        Raises:
            `ValueError`: the blocks do not make up the tensor that was announced.
        """
        if sum(block.numel() for block in blocks) != math.prod(self.shapes[name]):
            raise ValueError(f"`{name}` was announced as {self.shapes[name]}, got {[list(b.shape) for b in blocks]}.")
        self.file.seek(self.offsets[name])
        for block in blocks:
            self.file.write(block.to(torch.float32).contiguous().numpy())
        self.missing.discard(name)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, error, *_) -> None:
        self.file.close()
        if error is None and self.missing:
            raise RuntimeError(f"{len(self.missing)} tensors were not written, e.g. {min(self.missing)}.")
