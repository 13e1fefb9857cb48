"""What adapters must have in common to be merged, and what a merge may be asked for."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from ..adapter.folder import AdapterFolder, may_be_one_base
from ..adapter.record_fields import Independence
from ..method.projections import Block
from ..recipes.find import nearest
from .methods import ANY_RANKS, METHODS, PRUNING

logger = logging.getLogger(__name__)


def check_method(method: str, density: float | None, rank: int | None = None) -> None:
    if method not in METHODS:
        raise ValueError(
            f"`method={method!r}` is not known{nearest(str(method), METHODS)}. Allowed are {', '.join(METHODS)}. "
            "Leave it unset for 'concat', which is exact."
        )
    if method in PRUNING and not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise ValueError(
            f"`density={density}` with `method={method!r}`: the share of entries to keep must be in (0, 1]. Pass e.g. "
            "`density=0.7`, as the paper's Tables 8 to 10 do."
        )
    if method not in PRUNING and density is not None:
        raise ValueError(
            f"`density={density}` has no meaning with `method={method!r}`, which prunes nothing. It is for "
            f"{', '.join(PRUNING)}. Leave it unset, or choose one of these."
        )
    if rank is not None and method != "svd":
        raise ValueError(
            f"`rank={rank}` has no meaning with `method={method!r}`, whose rank follows from the adapters. It is for "
            "'svd'. Leave it unset, or pass `method='svd'`."
        )
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"`rank={rank}` is no rank. A whole number from 1 on is allowed. Pass e.g. `rank=32`, or leave it unset "
            "for the highest rank of the adapters."
        )


def checked_weights(weights: float | Sequence[float] | None, count: int) -> list[float]:
    """Return one weight for each of the adapters."""
    if weights is None:
        weights = 1 / count
    weights = [weights] * count if isinstance(weights, (int, float)) else list(weights)
    if len(weights) != count:
        raise ValueError(
            f"`weights={weights}` are {len(weights)} for {count} adapters. One for each is needed, or a single number "
            "for all. Correct the weights, or leave them unset for the average."
        )
    if not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"`weights={weights}` are not all finite numbers. Any finite number is allowed, negative ones too. "
            "Correct them."
        )
    if not any(weights):
        raise ValueError(
            f"`weights={weights}` are all 0, so nothing would be merged. At least one must differ from 0. Pass e.g. "
            "`weights=0.5`."
        )
    return weights


def check_bases(sources: Sequence[AdapterFolder], base_model: str | None) -> str | None:
    """Return the base model's name; raise if the sources have several and none was named."""
    names = {source.title: source.base for source in sources}
    known = {base for base in names.values() if base is not None}
    hub = {base for base in known if "/" in base}
    if base_model is None and not may_be_one_base(known):
        found = "; ".join(f"{name}: {base}" for name, base in names.items())
        raise ValueError(
            f"The adapters have different base models ({found}). All must be of one: on another base, B and A mean "
            "nothing. Merge adapters of one base, or, if these are the same weights under several names, say which "
            "to record: `base_model='namespace/name'`."
        )
    shapes: dict[str, tuple[str, int, int]] = {}
    for source in sources:
        for path, (rows, _, columns) in source.shapes.items():
            name, *other = shapes.setdefault(path, (source.title, rows, columns))
            if other != [rows, columns]:
                raise ValueError(
                    f"{path} has {other[1]} inputs and {other[0]} outputs in `{name}`, {columns} and {rows} in "
                    f"`{source.title}`. Adapters of one base model have the same shapes. Merge adapters of one base."
                )
    if base_model is not None:
        return base_model
    if known and None in names.values():
        logger.warning(
            f"{', '.join(name for name, base in names.items() if base is None)} names no base model; taken to be "
            f"{min(hub or known)}, as the others say. Pass `base_model` to say so."
        )
    paths = [source.config.get("base_model_name_or_path") for source in sources]
    return min(hub) if hub else next((path for path in paths if path), None)


def check_ranks(sources: Sequence[AdapterFolder], method: str) -> None:
    if method in ANY_RANKS:
        return
    ranks: dict[str, dict[int, str]] = {}
    for source in sources:
        for path, (_, rank, _) in source.shapes.items():
            ranks.setdefault(path, {})[rank] = source.title
    for path, found in ranks.items():
        if len(found) > 1:
            met = ", ".join(f"{rank} in `{name}`" for rank, name in sorted(found.items()))
            raise ValueError(
                f"`method={method!r}` adds matrices entry by entry, and {path} has rank {met}. It needs equal ranks. "
                "Use `method='concat'` or `'svd'`, which take any."
            )


def check_dtypes(sources: Sequence[AdapterFolder]) -> None:
    found = {source.title: "+".join(sorted(source.dtypes)) for source in sources}
    if len({*found.values()}) > 1:
        logger.warning(
            f"The adapters have different dtypes ({', '.join(f'{name}: {dtype}' for name, dtype in found.items())}). "
            "The merge is computed and written in float32, so none of them is rounded."
        )


def _blocks(source: AdapterFolder) -> tuple[Block, ...]:
    """Return what is on record of an adapter's rows of A: several blocks where it was grown."""
    return source.record.projection.as_blocks(source.rank) if source.record is not None else ()


class IndependenceOfA:
    """
    How independent the sources' A are: the mean squared cosine between rows of one and rows of another.

    By chance it is 1 / in_features. LoRI keeps tasks apart because their A are independent: paper Property 1.
    """

    LIMIT = 1.5  # times chance; two equal A of rank 32 in 4096 dimensions have 129 times
    MODULES = 64  # spread over the model; they have pairs of rows enough

    def __init__(self):
        self.excess: dict[tuple[int, int], list[tuple[float, int]]] = {}
        self.shared: dict[tuple[int, int], bool] = {}

    def add(self, factors: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Take one module's A of every source into account."""
        norms_of = {number: torch.linalg.vector_norm(A, dim=1) for number, (A, _) in factors.items()}
        for pair in combinations(sorted(factors), 2):
            first, second = (factors[number][0] for number in pair)
            norms = torch.outer(*(norms_of[number] for number in pair))
            counted = norms > 0  # rows of zeros are padding
            if (pairs := int(counted.sum())) == 0:
                continue
            excess = ((first @ second.T)[counted] / norms[counted]).square().mean().item() * first.shape[1]
            self.excess.setdefault(pair, []).append((excess, pairs))
            self.shared[pair] = self.shared.get(pair, True) and excess > self.LIMIT and torch.equal(first, second)

    def report(self, sources: Sequence[AdapterFolder]) -> list[Independence]:
        """Return each pair's mean squared cosine in units of chance; warn of those that are not independent."""
        entries = []
        for pair, found in self.excess.items():
            pairs = sum(count for _, count in found)
            excess = sum(value * count for value, count in found) / pairs
            names, shared = [sources[number].title for number in pair], self.shared[pair]
            entries.append(Independence(tuple(names), shared, round(excess, 4)))
            common = {*_blocks(sources[pair[0]])} & {*_blocks(sources[pair[1]])}
            if common and not shared:
                logger.warning(
                    f"`{names[0]}` and `{names[1]}` have {sum(block.rank for block in common)} rows of A in common: "
                    "one was grown on the other, or both on one adapter. What both have learnt there counts twice in "
                    "the merge. Merge what they don't share: `lori tasks ADAPTER --extract TASK` takes a task out."
                )
            elif shared:
                logger.warning(
                    f"`{names[0]}` and `{names[1]}` have the same A. Their deltas lie in one subspace, so nothing "
                    "keeps the two tasks apart: merging adds their B as `linear` would. Train each task with a "
                    "`projection_seed` or `task_name` of its own."
                )
            elif excess > self.LIMIT + 6 * math.sqrt(2 / pairs):  # six standard errors: few rows scatter
                logger.warning(
                    f"The A of `{names[0]}` and `{names[1]}` are not independent: the mean squared cosine between "
                    f"their rows is {excess:.3g} times that of random A. The tasks will disturb each other more than "
                    "LoRI's do. LoRI's A, drawn from different seeds, are independent; those of plain LoRA are "
                    "trained, and start equal where the seeds were equal."
                )
        return entries
