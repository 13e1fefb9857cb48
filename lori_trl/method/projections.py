"""The projection A: drawn from a seed, frozen for good, and recognised by its fingerprint."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..inputs.typed_values import left_out
from .layers import lora_layers

if TYPE_CHECKING:
    from peft import PeftModel

PROJECTION_INITS = ("gaussian", "kaiming_uniform", "contrastive")
CONTRASTIVE = "contrastive"  # the one that comes from activations and not from a seed


@dataclass(frozen=True)
class Block:
    """Some rows of every A of an adapter that was grown: those that one of its tasks brought along."""

    rank: int  # how many rows
    init: str | None  # these and the next three as of a [`Projection`], of these rows alone
    seed: int | None
    fingerprint: str
    protected: tuple[str, ...] | None = left_out()


@dataclass(frozen=True)
class Projection:
    """
    Which A an adapter has: how to draw it again, and how to recognise it.

    Args:
        init (`str` or `None`):
            One of `PROJECTION_INITS`; unknown where A came with a foreign adapter, or its blocks have their own.
        seed (`int` or `None`): the projection seed; likewise.
        fingerprint (`str`): see [`fingerprint`].
        protected (`tuple[str, ...]`, *optional*): the data that a contrastive A leaves alone.
        blocks (`tuple[Block, ...]`, *optional*): the rows of an A that was grown, in their order.
    """

    init: str | None
    seed: int | None
    fingerprint: str
    protected: tuple[str, ...] | None = left_out()
    blocks: tuple[Block, ...] | None = left_out()

    @classmethod
    def of_blocks(cls, blocks: Iterable[Block], fingerprint: str) -> "Projection":
        """Return what is known of an A with these rows, one block behind the other."""
        blocks = tuple(blocks)
        if len(blocks) > 1:
            return cls(None, None, fingerprint, blocks=blocks)
        return cls(blocks[0].init, blocks[0].seed, fingerprint, blocks[0].protected)

    def as_blocks(self, rank: int) -> tuple[Block, ...]:
        """Return its blocks; an A of `rank` rows that was never grown is one."""
        return self.blocks or (Block(rank, self.init, self.seed, self.fingerprint, self.protected),)

    @property
    def is_stored(self) -> bool:
        """Whether rows of it come from activations: no seed draws them again."""
        return CONTRASTIVE in (self.init, *(block.init for block in self.blocks or ()))

    def with_fingerprints(self, tensors: Mapping[str, Tensor]) -> "Projection":
        """Return the same with the fingerprints of these A: module path -> `(rank, in_features)`."""
        blocks, begin = [], 0
        for block in self.blocks or ():
            rows = {path: A[begin : begin + block.rank] for path, A in tensors.items()}
            blocks.append(replace(block, fingerprint=fingerprint(rows)))
            begin += block.rank
        return replace(self, fingerprint=fingerprint(tensors), blocks=tuple(blocks) or None)

    def before_its_making(self) -> "Projection":
        """Return what is known before the newest rows are made. Another machine computes other last digits of them."""
        blocks = self.blocks and (*self.blocks[:-1], replace(self.blocks[-1], fingerprint=""))
        return replace(self, fingerprint="", blocks=blocks)

    def same_draw(self, other: "Projection") -> bool:
        """Say whether two come from one seed, though one of them may be rounded to bfloat16."""
        return self.seed is not None and (self.seed, self.init) == (other.seed, other.init)


def derive_projection_seed(seed: int, task_name: str) -> int:
    """
    Derive the seed of a task's projections, so that two tasks get independent A and one task always the same.

    Args:
        seed (`int`): the run's seed (`TrainingArguments.seed`).
        task_name (`str`): the task.

    Returns:
        `int`: the first 48 bits of SHA-256 (JSON readers that keep numbers as doubles can hold them).

    Source: paper section 2.2, which needs independent A; deriving them from the task's name is ours.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{task_name}".encode()).digest()[:6], "big")


def draw_projection(path: str, rank: int, in_features: int, *, seed: int, init: str = "gaussian") -> Tensor:
    """
    Draw one module's A from its own CPU generator, which depends on `(seed, path)` alone.

    The numbers come from a 53-bit integer stream through float64 arithmetic and are rounded to float32 at the end, so
    that another platform's last-digit differences in `log` and `cos` practically never show.

    Args:
        path (`str`): the module's path in the base model.
        rank (`int`): rows of A.
        in_features (`int`): columns of A.
        seed (`int`): the projection seed.
        init (`str`, *optional*, defaults to `"gaussian"`):
            `"gaussian"` is N(0, 1/(3 in_features)); `"kaiming_uniform"` is uniform within 1/sqrt(in_features) of 0,
            which has the same variance.

    Returns:
        `Tensor`: `(rank, in_features)`, float32.

    Source: Algorithm 1, line 3, draws N(0, sigma^2) and leaves sigma open. The authors' code uses PEFT's Kaiming
    uniform, whose variance is taken here, so that the paper's learning rates carry over.
    """
    key = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:4], "big"))  # mt19937 takes 32 bits of seed
    if init == "kaiming_uniform":
        uniform = torch.rand(rank, in_features, generator=generator, dtype=torch.float64)
        return ((2 * uniform - 1) / math.sqrt(in_features)).float()
    u, v = torch.rand(2, rank, in_features, generator=generator, dtype=torch.float64)
    normal = (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)  # Box-Muller; 1 - u is never 0
    return (normal / math.sqrt(3 * in_features)).float()


@torch.no_grad()
def init_projections(model: "PeftModel", adapter_name: str, *, seed: int, init: str = "gaussian") -> None:
    """Draw every A of an adapter again, in place, and freeze it. See [`draw_projection`]."""
    for path, layer in lora_layers(model, adapter_name).items():
        weight = layer.lora_A[adapter_name].weight
        weight.copy_(draw_projection(path, *weight.shape, seed=seed, init=init))
    freeze_projections(model, adapter_name)


def freeze_projections(model: "PeftModel", adapter_name: str) -> None:
    """
    Freeze A through PEFT's registry of frozen weights.

    `requires_grad = False` by hand would be undone by the next `set_adapter()`; the registry is consulted there.
    The registry's function is private in PEFT 0.21; this is the one place that calls it.
    """
    from peft.tuners.lora.variants import _register_frozen_peft_weight

    for layer in lora_layers(model, adapter_name).values():
        _register_frozen_peft_weight(layer, adapter_name, "lora_A")


def projections(model: "PeftModel", adapter_name: str) -> dict[str, Tensor]:
    """Return every A of an adapter: module path -> `(rank, in_features)`."""
    return {
        path: layer.lora_A[adapter_name].weight.detach() for path, layer in lora_layers(model, adapter_name).items()
    }


class Fingerprint:
    """
    Take the fingerprint of a set of projections, one after the other: SHA-256 over paths, shapes and float32 values.

    The same for any adapter name and device, and for a bfloat16 tensor and its float32 copy.
    """

    def __init__(self):
        self.digest = hashlib.sha256()

    def add(self, path: str, tensor: Tensor) -> None:
        """
        Add the next projection; they come in sorted order of their paths.

        Args:
            path (`str`): the module's path in the base model.
            tensor (`Tensor`): its A, `(rank, in_features)`.
        """
        tensor = tensor.detach().float().cpu().contiguous()
        self.digest.update(f"{path} {tuple(tensor.shape)}\n".encode())
        self.digest.update(tensor.numpy().astype("<f4", copy=False).data)

    def __str__(self) -> str:
        return f"sha256:{self.digest.hexdigest()}"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """
    Fingerprint a set of projections. See [`Fingerprint`].

    Args:
        tensors (`Mapping[str, Tensor]`): module path -> A `(rank, in_features)`, in any order.

    Returns:
        `str`: `"sha256:"` and 64 hexadecimal digits.
    """
    taken = Fingerprint()
    for path in sorted(tensors):
        taken.add(path, tensors[path])
    return str(taken)
