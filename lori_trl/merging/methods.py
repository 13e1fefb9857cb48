"""The methods of a merge: the factors of one module in, merged A and B out. Pure tensor arithmetic."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor


class Factors(NamedTuple):
    """
    One adapter's share in one module of a merge.

    Args:
        A (`Tensor`): `(rank, in_features)`, float32.
        B (`Tensor`): `(out_features, rank)`, float32.
        weight (`float`): the adapter's weight in the merge.
        scaling (`float`): its alpha / rank, in units of the merged adapter's.
    """

    A: Tensor
    B: Tensor
    weight: float
    scaling: float


def concat(factors: Sequence[Factors], density: None = None) -> tuple[Tensor, Tensor]:
    """
    Stack A and weighted B: the merged delta is the weighted sum of the deltas, exactly.

    Returns:
        `tuple[Tensor, Tensor]`: A `(sum of ranks, in_features)` and B `(out_features, sum of ranks)`.

    Source: paper eq. 3 and 4, with each adapter's alpha / rank, which the paper's equations leave out.
    """
    ranks = [factor.A.shape[0] for factor in factors]
    B = factors[0].B.new_empty(factors[0].B.shape[0], sum(ranks))
    for factor, columns in zip(factors, B.split(ranks, dim=1), strict=True):
        torch.mul(factor.B, factor.weight * factor.scaling, out=columns)
    return torch.cat([factor.A for factor in factors]), B


def linear(factors: Sequence[Factors], density: None = None) -> tuple[Tensor, Tensor]:
    """
    Sum weighted A and weighted B: the weights of two adapters multiply in their cross terms.

    Returns:
        `tuple[Tensor, Tensor]`: A `(rank, in_features)`, the sum of w A; B `(out_features, rank)`, that of w s B.

    Source: paper eq. 5. Its delta leaves out alpha / rank; here that of each adapter goes with its B, once, so one
    adapter of weight w counts w squared times its delta.
    """
    zero = torch.zeros(())
    A = sum((factor.A * factor.weight for factor in factors), start=zero)
    B = sum((factor.B * (factor.weight * factor.scaling) for factor in factors), start=zero)
    return A, B


def svd(factors: Sequence[Factors], rank: int) -> tuple[Tensor, Tensor, float]:
    """
    Merge to a fixed rank: the best approximation of the weighted sum of the deltas that the rank allows.

    The delta, `(out_features, in_features)`, is never made. Of the stacked factors of `concat`, B = Q_B R_B and
    A^T = Q_A R_A; then B A = Q_B (R_B R_A^T) Q_A^T, and the core in brackets is only as large as the ranks together.

    Returns:
        `tuple[Tensor, Tensor, float]`: A `(rank, in_features)` and B `(out_features, rank)`, which share the singular
            values as square roots; and the share of the delta's Frobenius norm that is lost, a fraction in [0, 1].

    Source: the Eckart-Young theorem. PEFT's `svd` decomposes the whole delta, with the same result.
    """
    A, B = concat(factors)
    basis_B, core_B = torch.linalg.qr(B)
    basis_A, core_A = torch.linalg.qr(A.T)
    core = core_B @ core_A.T
    if not core.isfinite().all():  # beyond float32: whoever called refuses such factors, and names the module
        return torch.full_like(A[:rank], math.nan), torch.full_like(B[:, :rank], math.nan), math.nan
    U, values, Vh = torch.linalg.svd(core, full_matrices=False)
    roots = values[:rank].sqrt()
    energy = values.double().square()
    lost = (energy[rank:].sum() / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt().item()
    return (roots[:, None] * Vh[:rank]) @ basis_A.T, (basis_B @ U[:, :rank]) * roots, lost


def _as_peft(combine: Callable[..., Tensor], takes_density: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """
    Make a method of one of PEFT's, which work on A and on B by themselves, with the square roots of weight times
    alpha / rank. Of one adapter, they are the weighted adapter itself.

    Source: `LoraModel.add_weighted_adapter` of PEFT 0.21.
    """

    def merge(factors: Sequence[Factors], density: float | None = None) -> tuple[Tensor, Tensor]:
        weights = [factor.weight * factor.scaling for factor in factors]
        roots = [math.sqrt(abs(weight)) for weight in weights]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
        arguments = (density,) if takes_density else ()
        A = combine([factor.A for factor in factors], torch.tensor(signed), *arguments)  # A first: dare draws
        B = combine([factor.B for factor in factors], torch.tensor(roots), *arguments)
        return A, B

    return merge


METHODS: dict[str, Callable[..., Any]] = {
    "concat": concat,
    "linear": linear,
    "linear_peft": _as_peft(task_arithmetic, takes_density=False),
    "magnitude": _as_peft(magnitude_prune, takes_density=True),
    "ties": _as_peft(ties, takes_density=True),
    "dare": _as_peft(dare_linear, takes_density=True),
    "dare_ties": _as_peft(dare_ties, takes_density=True),
    "svd": svd,
}
PAPERS = ("concat", "linear")  # their result keeps the inputs' alpha / rank; that of PEFT's methods is 1
PRUNING = ("magnitude", "ties", "dare", "dare_ties")
RANDOM = ("dare", "dare_ties")
ANY_RANKS = ("concat", "svd")  # the others add matrices entry by entry
