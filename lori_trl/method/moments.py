"""Second moments of what goes into the layers that carry an adapter: what a task uses, one input at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer

MAX_TOKENS = 8192  # of all rows of one kind: enough for 32 directions, and few enough for 14,336 dimensions
MAX_BYTES = 4 << 30  # of the moments that are in memory at once, beside the model


MOMENTS_RANK = 64  # directions of a layer's input that an adapter carries


@dataclass(frozen=True, eq=False)
class LowRank:
    """
    The leading part of a second moment, as an adapter carries it.

    Args:
        factor (`Tensor`): F `(rank, dimensions)`: FᵀF is C on its leading eigenvectors.
        tokens (`int`): how many C is the mean of.
        energy (`float`): C's trace, what the factor leaves out included.
    """

    factor: Tensor
    tokens: int
    energy: float


class Moments:
    """
    The second moment C of one layer's input: the mean of x xᵀ over tokens, uncentred.

    While there are fewer tokens than dimensions, the tokens themselves are kept: C = FᵀF has their rank and no more.

    Args:
        dimensions (`int`): of the input.

    Attributes:
        tokens (`int`): how many were added.
    """

    def __init__(self, dimensions: int):
        self.dimensions, self.tokens = dimensions, 0
        self._rows: list[Tensor] = []
        self._kept = 0
        self._sum: Tensor | None = None
        self._left_out = 0.0

    def add(self, tokens: Tensor) -> None:
        """
        Add tokens.

        Args:
            tokens (`Tensor`): `(tokens, dimensions)`, of any type and on any device; they are summed up in float32.
        """
        self.tokens += len(tokens)
        self._keep(tokens.detach().to("cpu", torch.float32, copy=True))

    def add_low_rank(self, moments: LowRank) -> None:
        """Add the moments that an adapter carries. What their factor leaves out counts alike in all directions."""
        self.tokens += moments.tokens
        self._left_out += moments.tokens * max(0.0, moments.energy - moments.factor.double().square().sum().item())
        self._keep(moments.factor.float() * moments.tokens**0.5)

    def _keep(self, rows: Tensor) -> None:
        self._rows.append(rows)
        self._kept += len(rows)
        if self._kept >= self.dimensions:
            rows = torch.cat(self._rows)
            self._sum = rows.T @ rows if self._sum is None else self._sum.addmm_(rows.T, rows)
            self._rows = []

    @property
    def energy(self) -> float:
        """The trace of C: the mean of |x|²."""
        if self._sum is not None:
            kept = self._sum.diagonal().sum(dtype=torch.float64).item()
        else:
            kept = sum(rows.double().square().sum().item() for rows in self._rows)
        return (kept + self._left_out) / self.tokens

    @property
    def floor(self) -> float:
        """What is to be added to every eigenvalue of C, for what low-rank factors have left out."""
        return self._left_out / self.tokens / self.dimensions

    @property
    def factor(self) -> Tensor | None:
        """F `(tokens, dimensions)`, float64, with C = FᵀF; `None` once there are as many tokens as dimensions."""
        return None if self._sum is not None else torch.cat(self._rows).double() / self.tokens**0.5

    @property
    def matrix(self) -> Tensor:
        """C `(dimensions, dimensions)`, float64."""
        if self._sum is not None:
            return self._sum.double() / self.tokens
        factor = torch.cat(self._rows).double()
        return factor.T @ factor / self.tokens

    def compress(self, rank: int = MOMENTS_RANK) -> LowRank:
        """Return the leading part of C."""
        factor = self.factor
        if factor is None:
            values, vectors = torch.linalg.eigh(self.matrix)
            factor = (vectors * values.clamp(min=0).sqrt()).T.flip(0)
        else:
            values, vectors = torch.linalg.svd(factor, full_matrices=False)[1:]
            factor = values[:, None] * vectors
        return LowRank(factor[:rank].float(), self.tokens, self.energy)


Rows = Sequence[Sequence[int]]  # token ids, a row each


def collect_moments(
    model: nn.Module, layers: Mapping[str, "LoraLayer"], rows: Sequence[Rows]
) -> Iterator[dict[str, list[Moments]]]:
    """
    Run rows through a model and take the moments of its layers' inputs, as many layers at once as `MAX_BYTES` hold.

    Rows go through one by one, so that no token is padding. Of rows with more than `MAX_TOKENS` tokens together, each
    row's last ones count, as many of every row: those that bear loss.

    Args:
        model (`nn.Module`): the model, on the device where it is to run.
        layers (`Mapping[str, LoraLayer]`): module path -> layer.
        rows (`Sequence[Sequence[Sequence[int]]]`): kinds of rows, e.g. the new task's and the protected ones.

    Yields:
        `dict[str, list[Moments]]`: module path -> the moments of every kind of rows. Layers with one input, such as
        `q_proj`, `k_proj` and `v_proj`, share the same object.
    """
    leaders = _leaders(model, layers, rows[0][:1])
    for group in _groups(leaders, layers, rows):
        taken = [_moments(model, {path: layers[path] for path in group}, kind) for kind in rows]
        by_leader = {path: [moments[path] for moments in taken] for path in group}
        del taken
        yield {path: by_leader[leader] for path, leader in leaders.items() if leader in by_leader}


def _moments(model: nn.Module, layers: Mapping[str, "LoraLayer"], rows: Rows) -> dict[str, Moments]:
    """Return the moments of some layers' inputs over rows: module path -> moments."""
    moments = {path: Moments(layer.in_features) for path, layer in layers.items()}
    last = MAX_TOKENS // len(rows) if sum(map(len, rows)) > MAX_TOKENS else None

    def note(path: str, inputs: Tensor) -> None:
        tokens = inputs[0, -last:] if last is not None and inputs.dim() == 3 else inputs
        moments[path].add(tokens.reshape(-1, tokens.shape[-1]))

    _forward(model, layers, rows, note)
    return moments


def _leaders(model: nn.Module, layers: Mapping[str, "LoraLayer"], rows: Rows) -> dict[str, str]:
    """Find which layers have the very same input: module path -> the first one with it."""
    leaders: dict[str, str] = {}
    latest: list[tuple[Tensor, str]] = []

    def note(path: str, inputs: Tensor) -> None:
        same = next((leader for tensor, leader in latest if tensor is inputs), path)
        latest[:] = [(inputs, same)]
        leaders.setdefault(path, same)

    _forward(model, layers, rows, note)
    # A layer that the row did not reach, say an expert, is by itself.
    return {path: leaders.get(path, path) for path in layers}


def _groups(
    leaders: Mapping[str, str], layers: Mapping[str, "LoraLayer"], rows: Sequence[Rows]
) -> Iterable[list[str]]:
    """Deal the inputs out to groups of which each fits into memory."""
    group: list[str] = []
    held = 0
    for path in sorted(set(leaders.values())):
        width = layers[path].in_features
        size = sum(4 * width * min(width, MAX_TOKENS, sum(map(len, kind))) for kind in rows)
        if group and held + size > MAX_BYTES:
            yield group
            group, held = [], 0
        group.append(path)
        held += size
    if group:
        yield group


@torch.no_grad()
def _forward(model: nn.Module, layers: Mapping[str, "LoraLayer"], rows: Rows, note) -> None:
    """Run rows through a model, and call `note(path, input)` for every layer."""
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs, path=path: note(path, inputs[0]))
        for path, layer in layers.items()
    ]
    device = next(model.parameters()).device
    try:
        with _evaluating(model):
            for row in rows:
                model(input_ids=torch.tensor([row], device=device))
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout and checkpointing off for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
