"""safetensors files: opened with care, hashed tensor by tensor, written tensor by tensor."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# As the format names them, each with its own size in bytes.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_MAX_HEADER_BYTES = 10_000_000  # that of Llama-3-8B has 40 kB; a parser would build gigabytes from 100 MB


@contextmanager
def opened(file: str | Path) -> Iterator[safe_open]:
    """
    Open a safetensors file, after a look at how large its header claims to be.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: it is no whole safetensors file, or its header is larger than any adapter's. What is read inside
            the context counts too.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"`{file}` does not exist. A safetensors file is needed. Correct the path, or fetch or save it again."
        )
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
    if size > _MAX_HEADER_BYTES:
        raise ValueError(
            f"`{file}` announces {size / 1e6:,.0f} MB of metadata, or is no safetensors file. An adapter's have at "
            f"most {_MAX_HEADER_BYTES / 1e6:.0f} MB. Do not use this file; fetch or save it again."
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`{file}` is unreadable ({error}). It must be a whole safetensors file. Fetch or save it again."
        ) from error


def hash_tensor(*blocks: Tensor) -> str:
    """
    Hash a tensor, given whole or as blocks of rows from top to bottom: SHA-256 of its dtype, shape and bytes.

    Returns:
        `str`: 64 hexadecimal digits, the same for any file, device and process.
    """
    shape = (sum(block.shape[0] for block in blocks), *blocks[0].shape[1:]) if len(blocks) > 1 else blocks[0].shape
    digest = hashlib.sha256(f"{str(blocks[0].dtype).removeprefix('torch.')} {tuple(shape)}\n".encode())
    for block in blocks:
        digest.update(block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_tensors(file: str | Path) -> dict[str, str]:
    """Hash every tensor of a file: its name -> SHA-256. See [`hash_tensor`]."""
    with opened(file) as tensors:
        return {name: hash_tensor(tensors.get_tensor(name)) for name in sorted(tensors.keys())}


class SafetensorsWriter:
    """
    Write a safetensors file, its tensors in any order, with no more than one of them in memory.

    `safetensors.torch.save_file` takes all tensors at once; the file is the same, byte for byte.

    Args:
        file (`str` or `Path`): where to.
        shapes (`Mapping[str, Sequence[int]]`): the name and shape of every tensor.
        metadata (`Mapping[str, str]`, *optional*): what goes into the file's header.
        dtypes (`Mapping[str, torch.dtype]`, *optional*): what each tensor is written in; by default float32.

    Attributes:
        hashes (`dict[str, str]`): of the tensors written so far. See [`hash_tensor`].

    Raises:
        `RuntimeError`: at the end, if a tensor was not written.

    Source: the format's description in safetensors: a header of JSON, padded with spaces to a multiple of 8 bytes and
    preceded by its length; then the tensors, those of wider dtypes first, sorted by name.
    """

    def __init__(
        self,
        file: str | Path,
        shapes: Mapping[str, Sequence[int]],
        metadata: Mapping[str, str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ):
        self.dtypes = dict(dtypes or dict.fromkeys(shapes, torch.float32))
        order = sorted(shapes, key=lambda name: (-self.dtypes[name].itemsize, name))
        self.shapes = {name: list(shapes[name]) for name in order}
        self.hashes: dict[str, str] = {}
        header: dict = {"__metadata__": dict(metadata)} if metadata else {}
        offsets, end = {}, 0
        for name, shape in self.shapes.items():
            offsets[name] = end
            end += self.dtypes[name].itemsize * math.prod(shape)
            header[name] = {"dtype": DTYPES[self.dtypes[name]], "shape": shape, "data_offsets": [offsets[name], end]}
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
        blocks = tuple(block.to(self.dtypes[name]).contiguous() for block in blocks)
        self.file.seek(self.offsets[name])
        for block in blocks:
            self.file.write(block.reshape(-1).view(torch.uint8).numpy().data)
        self.hashes[name] = hash_tensor(*blocks)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, error, *_) -> None:
        self.file.close()
        missing = self.shapes.keys() - self.hashes.keys()
        if error is None and missing:
            raise RuntimeError(f"{len(missing)} tensors were not written, e.g. {min(missing)}.")
