"""How several adapters become one: what the merged adapter looks like, and each of its modules and masks."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from ..adapter.folder import AdapterFolder, open_adapter
from ..adapter.mask_files import MasksMetadata
from ..adapter.masks import LoriMasks
from ..adapter.plain_lora import check_plain
from .checks import check_bases, check_method, check_ranks
from .methods import METHODS, PAPERS, RANDOM, Factors, svd

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """
    How the sources become one adapter.

    Attributes:
        lost (`dict[str, float]`): module path -> the share of its delta's norm that `svd` has lost, in [0, 1].
    """

    sources: Sequence[AdapterFolder]  # the adapters
    method: str  # one of `METHODS`
    density: float | None  # what the pruning methods keep, a fraction in (0, 1]
    seed: int  # of the random numbers of `dare` and `dare_ties`
    base: str | None  # the base model's name
    svd_rank: int | None = None  # what `svd` is to leave; by default the highest rank of the sources
    lost: dict[str, float] = field(default_factory=dict, init=False)

    @cached_property
    def paths(self) -> list[str]:
        """All modules, sorted."""
        return sorted({path for source in self.sources for path in source.shapes})

    @cached_property
    def offsets(self) -> list[int]:
        """Where each source's rows of A and columns of B begin: one behind the other for `concat`, else all at 0."""
        ranks = [source.rank if self.method == "concat" else 0 for source in self.sources]
        return [sum(ranks[:number]) for number in range(len(ranks))]

    @cached_property
    def rank(self) -> int:
        """
        The merged adapter's rank, the same in all modules: what a module has less is filled with zeros. PEFT's
        `rank_pattern` would save them, but vLLM does not read it.
        """
        if self.method == "svd" and self.svd_rank is not None:
            return self.svd_rank
        return max(offset + source.rank for offset, source in zip(self.offsets, self.sources, strict=True))

    @property
    def fits(self) -> bool:
        """Whether `svd` has nothing to cut: the ranks together are no higher than the one to be left."""
        return self.method == "svd" and sum(source.rank for source in self.sources) <= self.rank

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out_features, in_features)."""
        shapes: dict[str, tuple[int, int]] = {}
        for source in self.sources:
            shapes |= {path: (rows, columns) for path, (rows, _, columns) in source.shapes.items()}
        return shapes

    @cached_property
    def scaling(self) -> float:
        """
        The merged adapter's alpha / rank: the one that all inputs have, so that one adapter of weight 1 stays as it
        is, bit for bit; 1 where they differ, and for PEFT's methods, which give it 1.
        """
        scalings = {scaling for source in self.sources for scaling in source.scalings.values()}
        papers = self.fits or self.method in PAPERS or (len(self.sources) == 1 and self.method != "svd")
        return scalings.pop() if papers and len(scalings) == 1 else 1.0

    @property
    def alpha(self) -> int | float:
        """The merged adapter's `lora_alpha`; whole wherever it can be."""
        alpha = self.scaling * self.rank
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

    @cached_property
    def random_states(self) -> dict[str, Tensor]:
        """
        Module path -> the state of torch's generator in which PEFT draws for it, with `dare` and `dare_ties`, after
        `torch.manual_seed(seed)`. Before that, `add_weighted_adapter` draws to initialise the merged adapter.
        """
        order, states = sorted(self.paths, key=_model_order), {}
        init = self.sources[0].config.get("init_lora_weights", True)
        density = 1.0 if self.density is None else self.density
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for path in order:
                rows, columns = self.shapes[path]
                A = torch.nn.Linear(columns, self.rank, bias=False).weight
                torch.nn.Linear(self.rank, rows, bias=False)
                if init == "gaussian":
                    torch.nn.init.normal_(A)
                elif init:
                    torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            for path in order:
                states[path] = torch.get_rng_state()
                shapes = [source.shapes[path] for source in self.sources if path in source.shapes]
                drawn = [(rank, columns) for _, rank, columns in shapes] + [(rows, rank) for rows, rank, _ in shapes]
                for shape in drawn if density < 1 else []:
                    torch.bernoulli(torch.full(shape, density))
        return states

    def merge(
        self, path: str, factors: Mapping[int, tuple[Tensor, Tensor]], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """
        Merge one module.

        Args:
            path (`str`): the module's path.
            factors (`Mapping[int, tuple[Tensor, Tensor]]`): number of a source that has the module -> its A and B.
            weights (`Sequence[float]`): the weight of every source.

        Returns:
            `tuple[Tensor, Tensor]`: A `(rank, in_features)` and B `(out_features, rank)`.
        """
        (rows, columns), method = self.shapes[path], self.method
        if self.fits or (len(self.sources) == 1 and method not in (*PAPERS, "svd")):
            method = "concat"  # as PEFT, which merges a single adapter by `linear` whatever the method
        shares = {
            number: Factors(A, B, weights[number], self.sources[number].scalings[path] / self.scaling)
            for number, (A, B) in factors.items()
        }
        if method == "concat":
            for number, share in shares.items():
                shares[number] = share._replace(
                    A=_padded(share.A, 0, self.sources[number].rank), B=_padded(share.B, 1, self.sources[number].rank)
                )
            for number, source in enumerate(self.sources):
                if number not in shares:
                    zeros = torch.zeros(source.rank, columns), torch.zeros(rows, source.rank)
                    shares[number] = Factors(*zeros, 1.0, 1.0)
        ordered = [shares[number] for number in sorted(shares)]
        if method == "svd":
            A, B, self.lost[path] = svd(ordered, self.rank)
            return _padded(A, 0, self.rank), _padded(B, 1, self.rank)
        with torch.random.fork_rng(devices=[], enabled=method in RANDOM):
            if method in RANDOM:
                torch.set_rng_state(self.random_states[path])
            A, B = METHODS[method](ordered, self.density)
        return _padded(A, 0, self.rank), _padded(B, 1, self.rank)

    def mask(self, task: str) -> LoriMasks:
        """
        Unite the masks that the sources have of a task, each where its B lies in the merged one.

        With `concat` such an entry is the task's own and the mask belongs to the merged A. With the other methods it
        says where the task's B went into the sum, and belongs to the A that the task was trained on, which the
        merged adapter no longer has.
        """
        found = {number: source.read_masks(task) for number, source in enumerate(self.sources) if task in source.tasks}
        entries = {path: torch.zeros(rows, self.rank, dtype=torch.bool) for path, (rows, _) in self.shapes.items()}
        for number, masks in found.items():
            offset = self.offsets[number]
            for path, mask in masks.items():
                entries[path][:, offset : offset + mask.shape[1]] |= mask
        first = next(iter(found.values()))
        metadata = first.metadata if len(found) == 1 else MasksMetadata(task, granularity=first.granularity)
        return LoriMasks(entries, **vars(metadata))

    @cached_property
    def tokenizer(self) -> dict[str, Path]:
        """The tokenizer's files that all sources with one have alike; none, with a warning, where two differ."""
        with_one = [source for source in self.sources if source.tokenizer]
        if not with_one:
            return {}
        first, *others = with_one
        contents = {name: file.read_bytes() for name, file in first.tokenizer.items()}
        for other in others:
            own = {name: file.read_bytes() for name, file in other.tokenizer.items()}
            differing = sorted(name for name in contents.keys() | own.keys() if contents.get(name) != own.get(name))
            if differing:
                logger.warning(
                    f"`{first.title}` and `{other.title}` bring different tokenizers ({', '.join(differing)}), so the "
                    "merged adapter has none, and is used with its base's. If one serves all tasks, copy its files "
                    "into the merged adapter's folder."
                )
                return {}
        return first.tokenizer

    def adapter_config(self) -> LoraConfig:
        """Return PEFT's configuration of the merged adapter."""
        configs = [source.config for source in self.sources]
        targets = [config.get("target_modules") for config in configs]
        by_name = all(isinstance(target, list) for target in targets) and not any(
            config.get("layers_to_transform") is not None or config.get("exclude_modules") for config in configs
        )
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=sorted({name for target in targets for name in target or ()}) if by_name else self.paths,
            base_model_name_or_path=self.base,
            task_type=common_value([config.get("task_type") for config in configs]),
            lora_dropout=common_value([config.get("lora_dropout", 0.0) for config in configs], 0.0),
            fan_in_fan_out=any(config.get("fan_in_fan_out") for config in configs),
            inference_mode=True,
        )


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = [missing if number == dim else length for number, length in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _model_order(path: str) -> tuple:
    """Sort modules as Llama and its kin hold them, which is the order PEFT draws in: layers by number, q before k."""
    name = path.rpartition(".")[2]
    number = _PROJECTIONS.index(name) if name in _PROJECTIONS else len(_PROJECTIONS)
    layer = [int(part) for part in path.split(".") if part.isdigit()]
    return layer, number, path


def common_value(values: Sequence[Any], otherwise: Any = None) -> Any:
    """Return the value that all have; `otherwise` where they differ."""
    return values[0] if all(value == values[0] for value in values) else otherwise


@contextmanager
def open_plan(
    adapters: Sequence[str | Path],
    method: str,
    *,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    base_model: str | None = None,
    token: str | None = None,
    allow_modified: bool = False,
) -> Iterator[Plan]:
    """
    Fetch, unpack and check adapters, and yield how they become one.

    Args and raises: as [`merge_lori_adapters`].
    """
    if isinstance(adapters, (str, Path)) or not adapters:
        raise ValueError(
            f"`adapters={adapters!r}` is no list of adapters. Pass one or more folders or Hub names, e.g. "
            "`adapters=['math-lori-s', 'me/code-lori-s']`."
        )
    check_method(method, density, rank)
    with ExitStack() as stack:
        sources = []
        for name in map(str, adapters):
            sources.append(stack.enter_context(open_adapter(name, token=token, allow_modified=allow_modified)))
            check_plain(sources[-1], "merged")
        base = check_bases(sources, base_model)
        check_ranks(sources, method)
        yield Plan(sources, method, density, seed, base, rank)
