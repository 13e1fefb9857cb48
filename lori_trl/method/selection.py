"""Exact selection of the largest entries over many tensors: pure tensor arithmetic, no sort, no whole concatenation.

The bit pattern of a non-negative float32 grows with its value. So the K-th largest magnitude is found by counting bit
patterns: one histogram of the upper 16 bits over all tensors says in which bin it lies, a second one of the lower 16
bits within that bin says which value it is. bfloat16 and float16 become float32 exactly.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .sharding import gather_like, local, shard_like

# Entries looked at in one go, of several tensors together. It bounds the temporaries to some 20 MB. Smaller ones mean
# thousands of operations, each of which waits for all of its threads: on a busy machine, that is what takes the time.
_CHUNK = 1 << 20
_INFINITY = 0x7F80  # upper 16 bits of +inf; those of NaN lie above or are the same
_NOTHING = 0x7FFFFFFF  # above every finite bit pattern


def select_largest(
    tensors: Mapping[str, Tensor], k: int, exclude: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], float]:
    """
    Select the `k` entries of largest magnitude over all tensors together.

    Ties go to the lowest position in sorted order of the names. Zeros are never selected, so fewer than `k` entries
    come back where fewer are nonzero.

    Args:
        tensors (`Mapping[str, Tensor]`):
            Name -> tensor of any shape, float32, bfloat16 or float16, on any devices. Or, on every rank, `DTensor`s
            that are sharded by rows over one mesh (as FSDP2 does): the histograms are then summed over the ranks.
        k (`int`): how many entries to select.
        exclude (`Mapping[str, Tensor]`, *optional*): name -> bool tensor; its True entries are not candidates.

    Returns:
        `tuple[dict[str, Tensor], float]`: bool tensors of the same shapes and devices, whole and the same on every
        rank, and the smallest selected magnitude (0.0 where nothing is selected).

    Raises:
        `ValueError`: a tensor holds NaN or infinity.

    Source: paper eq. 2 and Algorithm 1, line 13. There a threshold keeps all ties; here K is exact.
    """
    names = sorted(tensors)
    sharded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    group = next(iter(sharded.values())).device_mesh.get_group() if sharded else None
    exclude = {name: local(shard_like(mask, tensors[name])) for name, mask in (exclude or {}).items()}
    tensors = {name: local(tensor) for name, tensor in tensors.items()}

    # Three passes over all entries: two for the K-th largest, one that compares each entry with it.
    kth, ties, ties_left_out = _kth_largest(tensors, exclude, names, k, group)
    if ties_left_out == 0:
        above, ties = kth - 1, 0  # all of them are taken: no counting
    else:
        above = kth
    # Each tensor learns beforehand how many of its ties it may take. So no rank needs to know the others' rows.
    quotas = _tie_quotas(tensors, exclude, names, kth, ties, group) if ties > 0 else {}
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for pieces, bits in _magnitude_bits(tensors, exclude, names):
        chosen = bits > above
        for (name, _, _), part, part_bits in zip(pieces, *_split(pieces, chosen, bits), strict=True):
            if quotas.get(name, 0) > 0:
                positions = (part_bits == kth).nonzero().flatten()[: quotas[name]]
                part[positions] = True
                quotas[name] -= positions.numel()
            parts[name].append(part)
    masks = {name: _join(parts.pop(name), tensors[name]) for name in names}
    masks |= {name: gather_like(masks[name], sharded[name]) for name in sharded}
    smallest = torch.tensor(kth if kth < _NOTHING else 0, dtype=torch.int32).view(torch.float32).item()
    return masks, smallest


def _kth_largest(
    tensors: Mapping[str, Tensor],
    exclude: Mapping[str, Tensor],
    names: list[str],
    k: int,
    group: dist.ProcessGroup | None,
) -> tuple[int, int, int]:
    """Return the bit pattern of the K-th largest magnitude, and how many of its ties to take and to leave out."""
    # The sign bit is cleared, so 15 of the upper 16 bits remain: 32,768 bins, the largest numbers in the last ones.
    upper = torch.zeros(1 << 15, dtype=torch.int64)
    for _, bits in _magnitude_bits(tensors, exclude, names):
        upper += torch.bincount(bits >> 16, minlength=1 << 15).cpu()
    _sum_over_ranks(upper, group)
    if upper[_INFINITY:].any():
        broken = [name for name in names if not torch.isfinite(tensors[name]).all()]
        raise ValueError(
            f"The saliency holds NaN or infinity in {len(broken)} tensors: {', '.join(broken[:3])}"
            f"{', ...' if len(broken) > 3 else ''}. Ranking needs finite numbers: the calibration diverged. Lower "
            "`calibration_learning_rate`."
        )
    high, above = _bin_of_kth(upper, min(k, int(upper.sum())))

    # Within that bin, the lower 16 bits tell the values apart: one value a bin, so that a bin's count is its ties.
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for _, bits in _magnitude_bits(tensors, exclude, names):
        lower += torch.bincount(bits[(bits >> 16) == high] & 0xFFFF, minlength=1 << 16).cpu()
    _sum_over_ranks(lower, group)
    if high == 0:
        lower[0] = 0  # zeros are no candidates
    k_within = min(k - above, int(lower.sum()))
    if k_within <= 0:
        # Fewer than k entries are nonzero: bin 0 holds zeros alone. All that lie above it are asked for instead.
        return _kth_largest(tensors, exclude, names, above, group) if above > 0 else (_NOTHING, 0, 0)
    low, above_within = _bin_of_kth(lower, k_within)
    ties = k_within - above_within
    return high << 16 | low, ties, int(lower[low]) - ties


def _tie_quotas(
    tensors: Mapping[str, Tensor],
    exclude: Mapping[str, Tensor],
    names: list[str],
    kth: int,
    ties: int,
    group: dist.ProcessGroup | None,
) -> dict[str, int]:
    """Share the ties out over (name, rank) in order: rank by rank is row by row, since tensors are sharded by rows."""
    # Ties go to the lowest position. Entries are counted here by (name, rank), which is the order of their positions.
    counts = torch.tensor(
        [sum(int((bits == kth).sum()) for _, bits in _magnitude_bits(tensors, exclude, [name])) for name in names]
    )
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    by_rank = torch.zeros(len(names), ranks, dtype=torch.int64)
    by_rank[:, rank] = counts
    _sum_over_ranks(by_rank, group)
    # What (name, rank) may take is what is left of the ties after all before it took theirs.
    taken_before = by_rank.flatten().cumsum(0).view_as(by_rank) - by_rank
    quotas = torch.minimum(by_rank, (ties - taken_before).clamp(min=0))
    return dict(zip(names, quotas[:, rank].tolist(), strict=True))


def _sum_over_ranks(counts: Tensor, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        on_device = counts.cuda() if dist.get_backend(group) == "nccl" else counts
        dist.all_reduce(on_device, group=group)
        counts.copy_(on_device)


def _bin_of_kth(histogram: Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the K-th largest entry (k >= 1), and how many entries lie in the bins above it."""
    # from_top[i] counts the entries in the i + 1 highest bins. The first one that reaches k is the bin that is wanted.
    from_top = histogram.flip(0).cumsum(0)
    bins_above = int(torch.searchsorted(from_top, k))
    return histogram.numel() - 1 - bins_above, int(from_top[bins_above - 1]) if bins_above else 0


Piece = tuple[str, int, int]  # a tensor's name, and from where to where it is in the chunk


def _magnitude_bits(
    tensors: Mapping[str, Tensor], exclude: Mapping[str, Tensor], names: list[str]
) -> Iterator[tuple[list[Piece], Tensor]]:
    """Yield (pieces, bit patterns of their magnitudes as int32) chunk by chunk; excluded entries read as 0."""
    for pieces in _chunks(tensors, names):
        # float32 has every bfloat16 and float16 exactly. Without the sign bit, its bits are those of the magnitude.
        parts = [tensors[name].detach().reshape(-1)[start:end].float() for name, start, end in pieces]
        bits = torch.cat(parts).view(torch.int32).bitwise_and_(0x7FFFFFFF)
        for (name, start, end), piece in zip(pieces, *_split(pieces, bits), strict=True):
            if name in exclude:
                piece.masked_fill_(exclude[name].reshape(-1)[start:end].to(bits.device), 0)
        yield pieces, bits


def _chunks(tensors: Mapping[str, Tensor], names: list[str]) -> Iterator[list[Piece]]:
    """Put the entries of all tensors, in order, into chunks of at most `_CHUNK` on one device."""
    chunk: list[Piece] = []
    free, device = _CHUNK, None
    for name in names:
        numel = tensors[name].numel()
        for start in range(0, numel, _CHUNK):
            end = min(start + _CHUNK, numel)
            if chunk and (end - start > free or tensors[name].device != device):
                yield chunk
                chunk, free = [], _CHUNK
            chunk.append((name, start, end))
            free, device = free - (end - start), tensors[name].device
    if chunk:
        yield chunk


def _join(parts: list[Tensor], model: Tensor) -> Tensor:
    """Give a tensor's parts its shape. A single part stays a view of its chunk, all of which is in use."""
    whole = parts[0] if len(parts) == 1 else torch.cat([model.new_empty(0, dtype=torch.bool), *parts])
    return whole.view(model.shape)


def _split(pieces: list[Piece], *chunks: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Split chunks into views of their pieces."""
    sizes = [end - start for _, start, end in pieces]
    return tuple(chunk.split(sizes) for chunk in chunks)
