"""The arithmetic of LoRA's branch on a frozen A: forward and backward, with B dense or packed.

In the shapes, `n` is the number of tokens (all leading dimensions together), `in` and `out` are the layer's features.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def fold_into(B: Tensor, indices: Tensor, values: Tensor) -> None:
    """
    Write values into B, at flat positions.

    Args:
        B (`Tensor`): `(out, rank)`, of any layout.
        indices (`Tensor`): `(k,)`, int64, no position twice.
        values (`Tensor`): `(k,)`, of any floating type.
    """
    # Through `.data`: the same numbers again must not count as a change of a tensor that a backward pass has saved.
    B = B.data
    flat = B.reshape(-1)  # a view of B where B is contiguous, else a copy
    flat.index_copy_(0, indices, values.detach().to(B.dtype))
    if not B.is_contiguous():
        B.copy_(flat.view(B.shape))


class Unpacked(torch.autograd.Function):
    """B with the values in it. Of B's gradient, the values get what lies at their positions."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, B: Tensor) -> Tensor:
        fold_into(B, indices, values)
        ctx.save_for_backward(indices)
        ctx.dtype = values.dtype
        return B.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_B: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return d_B.reshape(-1)[indices].to(ctx.dtype), None, None


class Branch(torch.autograd.Function):
    """
    result + scaling * dropout(x) A^T B^T, written into `result` where `in_place` says that nobody else needs it.

    For the backward pass it keeps x A^T, which is `rank` wide, and the positions that dropout zeroed. x itself is not
    needed, since A is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,  # (..., out); first, as autograd wants it where it is a view that is written to
        x: Tensor,  # (..., in)
        A: Tensor,  # (rank, in)
        B: Tensor,  # (out, rank)
        scaling: float,
        drop_share: float,
        in_place: bool,
    ) -> Tensor:
        h, dropped = _project(x, A, drop_share)  # h: (n, rank)
        ctx.save_for_backward(h, A, B, dropped)
        ctx.scaling, ctx.input_shape = scaling / (1 - drop_share), x.shape
        if in_place and result.dtype == h.dtype and result.is_contiguous():
            ctx.mark_dirty(result)
            return _add_expanded(result, h, B, ctx.scaling)
        return result + (h @ B.to(h.dtype).T).mul_(ctx.scaling).view(result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, A, B, dropped = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1]).to(h.dtype)  # (n, out)
        d_x = d_B = None
        if ctx.needs_input_grad[1]:
            d_x = _input_gradient(g, A, B, ctx.scaling, dropped).view(ctx.input_shape)
        if ctx.needs_input_grad[3]:
            d_B = (g.T @ h).mul_(ctx.scaling).to(B.dtype)  # (out, rank)
        return gradient, d_x, None, d_B, None, None, None


class LayerWithBranch(torch.autograd.Function):
    """
    x W^T + b + scaling * dropout(x) A^T B^T: a frozen linear layer and its branch as one function.

    So the two parts of the gradient for x are added up in place, and the layer's x W^T + b, which was computed
    already, is the place where the output is written.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in)
        result: Tensor,  # (..., out): x W^T + b, detached
        W: Tensor,  # (out, in)
        A: Tensor,  # (rank, in)
        B: Tensor,  # (out, rank)
        scaling: float,
        drop_share: float,
    ) -> Tensor:
        h, dropped = _project(x, A, drop_share)  # h: (n, rank)
        ctx.save_for_backward(h, W, A, B, dropped)
        ctx.scaling, ctx.input_shape = scaling / (1 - drop_share), x.shape
        ctx.mark_dirty(result)
        return _add_expanded(result, h, B, ctx.scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, W, A, B, dropped = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])  # (n, out)
        d_x = d_B = None
        if ctx.needs_input_grad[0]:
            d_x = _input_gradient(g, A, B, ctx.scaling, dropped).addmm_(g, W).view(ctx.input_shape)
        if ctx.needs_input_grad[4]:
            d_B = (g.T @ h).mul_(ctx.scaling).to(B.dtype)  # (out, rank)
        return d_x, None, None, None, d_B, None, None


def _project(x: Tensor, A: Tensor, drop_share: float) -> tuple[Tensor, Tensor | None]:
    """Return dropout(x) A^T, `(n, rank)`, not yet scaled for what was dropped, and which entries of x those were."""
    rows, dropped = x.reshape(-1, x.shape[-1]), None  # (n, in)
    if drop_share > 0:
        dropped = draw_dropped(x.numel(), drop_share, x.device)
        rows = torch.cat([rows.reshape(-1), rows.new_zeros(1)]).index_fill_(0, dropped, 0)[:-1].view(rows.shape)
    return rows @ A.to(rows.dtype).T, dropped


def _add_expanded(result: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Add scaling * h B^T to a contiguous `result` in place."""
    result.view(-1, result.shape[-1]).addmm_(h, B.to(h.dtype).T, alpha=scaling)
    return result


def _input_gradient(g: Tensor, A: Tensor, B: Tensor, scaling: float, dropped: Tensor | None) -> Tensor:
    """Return the branch's part of the gradient for x, `(n, in)`, from the output's gradient `g` `(n, out)`."""
    d_h, A = (g @ B.to(g.dtype)).mul_(scaling), A.to(g.dtype)  # d_h: (n, rank)
    if dropped is None:
        return d_h @ A
    # The product is written into all but the last entry of a buffer, which takes the positions past the end.
    buffer = g.new_empty(g.shape[0] * A.shape[1] + 1)
    torch.mm(d_h, A, out=buffer[:-1].view(-1, A.shape[1]))
    return buffer.index_fill_(0, dropped, 0)[:-1].view(-1, A.shape[1])


def draw_dropped(numel: int, drop_share: float, device: torch.device) -> Tensor:
    """
    Draw which of `numel` entries are dropped: each with probability `drop_share`, independently.

    Random numbers are most of what dropout costs on a CPU. So one is drawn for every dropped entry, not for every
    entry: the gap to the next dropped one, which is geometrically distributed.

    Returns:
        `Tensor`:
            flat positions, int64, rising. How many there are depends on nothing that was drawn, so that a GPU need not
            be waited for: positions past the end are all `numel`, and the caller keeps one entry more for them.
    """
    # The number of dropped entries is binomial, with a standard deviation below sqrt(expected). Six of these more than
    # expected are too few once in 1e9 draws. Then the last entries are kept.
    expected = numel * drop_share
    count = int(expected + 6 * math.sqrt(expected) + 10)
    # With u uniform in [0, 1), floor(log(1 - u) / log(1 - p)) entries are kept before the next one is dropped.
    kept_before = torch.rand(count, device=device).neg_().log1p_().div_(math.log1p(-drop_share)).long()
    positions = kept_before.add_(1).cumsum(0).sub_(1)
    return positions.clamp_(max=numel)
