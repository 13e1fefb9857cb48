"""A from activations: the directions that a new task uses and that what is to be left alone does not."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layers import lora_layers
from .moments import LowRank, Moments, Rows, collect_moments
from .sharding import full_shape

if TYPE_CHECKING:
    from peft import PeftModel

_DENSE = 2048  # rows up to which all eigenvectors are taken; beyond, the leading ones by iteration
_ROUNDING = 1e-7  # of a response beside the largest: sums in float32 tell no less from nothing
_MAX_ITERATIONS, _TOLERANCE = 500, 1e-9


@torch.no_grad()
def contrastive_projections(
    model: "PeftModel",
    adapter_name: str,
    *,
    rows: Rows,
    protected: Rows = (),
    known: Sequence[Mapping[str, LowRank]] = (),
    epsilon: float,
    rank: int | None = None,
) -> dict[str, Tensor]:
    """
    Make every A of an adapter from activations. See [`contrastive_projection`].

    Args:
        model (`PeftModel`): the model with the adapter, and what that has learnt so far; it is left on its device.
        adapter_name (`str`): the adapter.
        rows (`Sequence[Sequence[int]]`): token ids of the new task's rows.
        protected (`Sequence[Sequence[int]]`, *optional*): of rows that are to be left alone.
        known (`Sequence[Mapping[str, LowRank]]`, *optional*): the moments of adapters that are to be left alone.
        epsilon (`float`): see [`contrastive_projection`].
        rank (`int`, *optional*): rows to make; by default as many as each A has.

    Returns:
        `dict[str, Tensor]`: module path -> A `(rank, in_features)`, float32, on the CPU.

    Raises:
        `ValueError`: a layer's input has fewer tokens, dimensions or directions than A has rows.
    """
    layers = lora_layers(model, adapter_name)
    kinds: Sequence[Rows] = [rows, protected] if protected else [rows]
    made: dict[str, Tensor] = {}
    for by_path in collect_moments(model, layers, kinds):
        shared: dict[tuple[int, int], Tensor] = {}  # layers with one input have one A
        for path, moments in by_path.items():
            own_rank, width = full_shape(layers[path].lora_A[adapter_name].weight)
            rows_of_A = rank or own_rank
            if rows_of_A > (most := min(moments[0].tokens, width)):
                raise ValueError(
                    f"`projection_init='contrastive'` with r = {rows_of_A}, but the input of {path} has {most} "
                    f"directions: {moments[0].tokens} tokens of the new task in {width} dimensions. Needed are as "
                    "many as A has rows. Raise `protect_rows`, lower `lora_r`, or leave this layer out of "
                    "`target_modules`."
                )
            key = id(moments), rows_of_A
            if key not in shared:
                alone = _with_known(moments[1:], [adapter[path] for adapter in known if path in adapter], width)
                shared[key] = contrastive_projection(moments[0], alone, rank=rows_of_A, epsilon=epsilon)
                if not shared[key].isfinite().all():
                    raise ValueError(
                        f"`projection_init='contrastive'`: the {moments[0].tokens} tokens of the new task's rows "
                        f"reach {path} in fewer than {rows_of_A} directions: most of them are the same token. Needed "
                        "are as many as A has rows. Check that the tokenizer knows the words of the rows, or lower "
                        "the rank."
                    )
            made[path] = shared[key]
    return made


def _with_known(protected: Sequence[Moments], known: Sequence[LowRank], width: int) -> Moments | None:
    """Put what is known of adapters to the moments of the protected rows."""
    if not known:
        return protected[0] if protected else None
    moments = protected[0] if protected else Moments(width)
    for each in known:
        moments.add_low_rank(each)
    return moments


def contrastive_projection(new: Moments, protected: Moments | None = None, *, rank: int, epsilon: float) -> Tensor:
    """
    Return the A that responds to a new task's inputs and not to protected ones.

    Its rows are the leading generalised eigenvectors of (C2, C1 + eps I): each is the direction v with the largest
    vᵀ C2 v / vᵀ (C1 + eps I) v that is C2-orthogonal to those before. Every row is scaled so that the mean of (v·x)²
    over the new task's tokens is the one that a random A's rows have, |x|² / (3 d), and its largest entry is positive.

    Args:
        new ([`Moments`]): C2, of the new task's tokens.
        protected ([`Moments`], *optional*): C1; without it, C1 is zero, and the rows are C2's principal directions.
        rank (`int`): rows of A.
        epsilon (`float`): eps in units of C1's mean eigenvalue.

    Returns:
        `Tensor`: `(rank, dimensions)`, float32; NaN in rows for which the new task's tokens have no direction left.

    Source: ours. Related: OSRM (arXiv 2505.22934) and LoRA-Null (2503.02659) take the directions that earlier inputs
    use least, InfLoRA (CVPR 2024) the new task's within their complement; GuardSpace (2510.14301).
    """
    energy = new.energy / (3 * new.dimensions)
    if protected is None:
        solve: Callable[[Tensor], Tensor] = lambda Y: Y  # noqa: E731
        ridge, C1 = 1.0, None
    else:
        ridge, C1 = epsilon * protected.energy / protected.dimensions + protected.floor, protected
        solve = _solver(C1, ridge)
    if (F2 := new.factor) is not None:
        V = solve(F2.T @ _leading(F2 @ solve(F2.T), rank))
    elif C1 is None:
        V = _leading(new.matrix, rank)
    else:
        L = torch.linalg.cholesky(_ridged(C1.matrix, ridge))
        half = torch.linalg.solve_triangular(L, new.matrix, upper=False)
        S = torch.linalg.solve_triangular(L, half.T, upper=False)
        V = torch.linalg.solve_triangular(L.T, _leading(S, rank), upper=True)
    A = V.T.contiguous()
    responses = (F2 @ V).square().sum(0) if F2 is not None else (V * (new.matrix @ V)).sum(0)
    A *= (energy / responses).sqrt()[:, None]
    A[responses <= _ROUNDING * responses.max()] = torch.nan  # a direction that no token has
    largest = A.gather(1, A.abs().argmax(1, keepdim=True))
    return (A * largest.sign()).float()


def _solver(moments: Moments, ridge: float) -> Callable[[Tensor], Tensor]:
    """Return Y -> (C + ridge I)⁻¹ Y; where C is known by a factor, in the factor's dimensions alone (Woodbury)."""
    F = moments.factor
    if F is None:
        L = torch.linalg.cholesky(_ridged(moments.matrix, ridge))
        return lambda Y: torch.cholesky_solve(Y, L)
    L = torch.linalg.cholesky(_ridged(F @ F.T, ridge))
    return lambda Y: (Y - F.T @ torch.cholesky_solve(F @ Y, L)) / ridge


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    matrix.diagonal().add_(ridge)
    return matrix


def _leading(S: Tensor, count: int) -> Tensor:
    """Return the leading eigenvectors of a symmetric matrix, as columns, the largest eigenvalue's first."""
    S = (S + S.T) / 2
    if len(S) <= _DENSE:
        return torch.linalg.eigh(S).eigenvectors[:, -count:].flip(1)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(S), 3 * count, generator=generator, dtype=S.dtype)
    for _ in range(_MAX_ITERATIONS):  # subspace iteration; more columns than asked for make it quick
        block, _ = torch.linalg.qr(S @ block)
        image = S @ block
        values, rotation = torch.linalg.eigh(block.T @ image)
        block, image = (block @ rotation).flip(1), (image @ rotation).flip(1)
        residual = image[:, :count] - block[:, :count] * values.flip(0)[:count]
        if torch.linalg.vector_norm(residual, dim=0).max() <= _TOLERANCE * values[-1]:
            break
    return block[:, :count]
