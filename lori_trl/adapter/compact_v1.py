"""Positions as version 1 of the compact form has them: gaps between neighbours in a Rice code. Read, never written."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

_INVERTED = 128  # added to a module's parameter where its complement is coded


def read_positions(tensors: Mapping[str, Tensor], name: str, sizes: list[int]) -> list[np.ndarray]:
    """
    Decode sorted positions, module by module: a gap g is g >> k ones and a zero, and the k lowest bits of g.

    Args:
        tensors (`Mapping[str, Tensor]`): `<name>.unary`, `.remainder`; a module each, `.counts`, `.parameters`.
        name (`str`): which positions.
        sizes (`list[int]`): entries of every module's B.

    Raises:
        `TypeError`: the code is altered. `KeyError`: a tensor is missing.
    """
    unary, remainder, counts, parameters = (
        tensors[f"{name}.{part}"].numpy() for part in ("unary", "remainder", "counts", "parameters")
    )
    ends = np.flatnonzero(np.unpackbits(unary) == 0)
    remainder = np.unpackbits(remainder)
    sets, entries, bits, start = [], 0, 0, 0
    for size, count, parameter in zip(sizes, counts.tolist(), parameters.tolist(), strict=True):
        k = parameter & ~_INVERTED
        if not 0 <= count <= size or entries + count > len(ends) or k > 40:
            raise TypeError(f"the positions of {name} are altered")
        stops = ends[entries : entries + count]
        gaps = (np.diff(stops, prepend=start - 1) - 1) << k
        low = remainder[bits : bits + count * k].reshape(count, k).astype(np.int64)
        positions = np.cumsum(gaps + (low << np.arange(k)).sum(axis=1) + 1) - 1
        if count and positions[-1] >= size:
            raise TypeError(f"the positions of {name} lie outside their matrix")
        sets.append(np.setdiff1d(np.arange(size), positions) if parameter & _INVERTED else positions)
        start = stops[-1] + 1 if count else start
        entries, bits = entries + count, bits + count * k
    return sets
