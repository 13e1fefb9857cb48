"""Several adapters into one, from their files: matrix by matrix, without the base model."""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from peft import LoraConfig
from peft.utils.merge_utils import dare_linear, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from .adapter import CONFIG_NAME, PEFT_FILES, RECIPE_NAME, staged, task_records, write_card
from .adapter import FORMAT_VERSION as ADAPTER_FORMAT_VERSION
from .adapter_file import AdapterFile, open_adapter, read_modules
from .download import hash_file
from .masks import LoriMasks
from .model_card import PICTURE_NAME
from .projections import Fingerprint
from .recipes import nearest
from .streaming import SafetensorsWriter

logger = logging.getLogger(__name__)


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


# ---- the methods: factors of one module in, merged A and B out ---------------------------------------------------


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
    A = sum(factor.A * factor.weight for factor in factors)
    B = sum(factor.B * (factor.weight * factor.scaling) for factor in factors)
    return A, B


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


METHODS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "concat": concat,
    "linear": linear,
    "linear_peft": _as_peft(task_arithmetic, takes_density=False),
    "magnitude": _as_peft(magnitude_prune, takes_density=True),
    "ties": _as_peft(ties, takes_density=True),
    "dare": _as_peft(dare_linear, takes_density=True),
}
PAPERS = ("concat", "linear")  # their result keeps the inputs' alpha / rank; that of PEFT's methods is 1
PRUNING = ("magnitude", "ties", "dare")


# ---- the inputs ------------------------------------------------------------------------------------------------


# What PEFT's LoRA can be besides plain, and what it is then.
_FORMS = {
    "use_dora": "DoRA trains a magnitude besides",
    "lora_bias": "biases were trained",
    "modules_to_save": "whole modules were trained",
    "target_parameters": "it targets parameters, not linear layers",
    "trainable_token_indices": "embeddings were trained",
    "alora_invocation_tokens": "it acts on some tokens only",
    "layer_replication": "its base model has copied layers",
    "use_qalora": "its inputs are pooled",
    "use_bdlora": "its matrices are block diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it has singular values besides",
    "monteclora_config": "it samples its weights",
    "velora_config": "it compresses its activations",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base model


def _check_mergeable(source: AdapterFile) -> None:
    """Raise `ValueError` unless an adapter is plain LoRA, whose A and B are all there is."""
    config = source.config
    faults = [f"{key}={config[key]!r} ({what})" for key, what in _FORMS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        faults.append(f"bias={config['bias']!r} (biases were trained)")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        faults.append(f"init_lora_weights={config['init_lora_weights']!r} (it belongs to a changed base model)")
    if faults:
        raise ValueError(
            f"`{source.name}` has {', '.join(faults)}. Plain LoRA and LoRI adapters can be merged: their A and B are "
            "all there is. Train it as one of these, or convert it with PEFT first."
        )
    met = [*source.others, *source.unpaired, *sorted(source.dtypes - {"F32", "BF16", "F16"})]
    if met or not source.shapes:
        raise ValueError(
            f"`{source.name}` holds {len(met) or 'no'} tensors that cannot be merged"
            f"{': ' if met else ''}{', '.join(met[:3])}{', ...' if len(met) > 3 else ''}. An adapter to merge has "
            "a pair lora_A `(rank, in_features)`, lora_B `(out_features, rank)` for each of its linear layers, in "
            "float32, bfloat16 or float16, and nothing else (no DoRA, embeddings, biases or modules_to_save). "
            "Train it as plain LoRA or LoRI."
        )
    for path, (_, rank, _) in source.shapes.items():
        if rank != (expected := source.setting(path, "r", "rank_pattern")):
            raise ValueError(
                f"`{source.name}`: {path} has rank {rank}, adapter_config.json says {expected}. They must agree, "
                "for alpha / rank depends on it. Fetch or save the adapter again."
            )


def _task(source: AdapterFile) -> str:
    """Return the task's name; that of the folder or repository where the adapter is plain LoRA."""
    if source.lori_config is not None:
        return source.lori_config["task"]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.title).name).lstrip("._-")[:96] or "lora"


def _hashes(source: AdapterFile) -> dict[str, str]:
    """Return the SHA-256 of its files."""
    names = [*PEFT_FILES, *([CONFIG_NAME] if source.lori_config is not None else [])]
    return {name: hash_file(source.folder / name, lfs=True) for name in names}


# ---- what they have in common ----------------------------------------------------------------------------------


@dataclass
class Plan:
    """
    How the sources become one adapter.

    Args:
        sources (`Sequence[AdapterFile]`): the adapters.
        method (`str`): one of `METHODS`.
        density (`float` or `None`): what the pruning methods keep, a fraction in (0, 1].
        seed (`int`): of the random numbers of `dare`.
        base (`str` or `None`): the base model's name.
    """

    sources: Sequence[AdapterFile]
    method: str
    density: float | None
    seed: int
    base: str | None

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
        return max(offset + source.rank for offset, source in zip(self.offsets, self.sources, strict=True))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out_features, in_features)."""
        shapes = {}
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
        papers = self.method in PAPERS or len(self.sources) == 1
        return scalings.pop() if papers and len(scalings) == 1 else 1.0

    @property
    def alpha(self) -> int | float:
        """The merged adapter's `lora_alpha`; whole wherever it can be."""
        alpha = self.scaling * self.rank
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

    @cached_property
    def random_states(self) -> dict[str, Tensor]:
        """
        Module path -> the state of torch's generator in which PEFT draws for it, with `dare`, after
        `torch.manual_seed(seed)`. Before that, `add_weighted_adapter` draws to initialise the merged adapter.
        """
        order, states = sorted(self.paths, key=_model_order), {}
        init = self.sources[0].config.get("init_lora_weights", True)
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
                for shape in drawn if self.density < 1 else []:
                    torch.bernoulli(torch.full(shape, self.density))
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
        if len(self.sources) == 1 and method not in PAPERS:
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
        with torch.random.fork_rng(devices=[], enabled=method == "dare"):
            if method == "dare":
                torch.set_rng_state(self.random_states[path])
            A, B = METHODS[method]([shares[number] for number in sorted(shares)], self.density)
        return _padded(A, 0, self.rank), _padded(B, 1, self.rank)

    def mask(self, task: str) -> LoriMasks:
        """
        Unite the masks that the sources have of a task, each where its B lies in the merged one.

        With `concat` such an entry is the task's own and the mask belongs to the merged A. With the other methods it
        says where the task's B went into the sum, and belongs to the A that the task was trained on, which the
        merged adapter no longer has.
        """
        found = {number: source.masks(task) for number, source in enumerate(self.sources) if task in source.tasks}
        entries = {path: torch.zeros(rows, self.rank, dtype=torch.bool) for path, (rows, _) in self.shapes.items()}
        for number, masks in found.items():
            offset = self.offsets[number]
            for path, mask in masks.items():
                entries[path][:, offset : offset + mask.shape[1]] |= mask
        first = next(iter(found.values()))
        one = len(found) == 1
        facts = first.metadata if one else {"granularity": first.granularity}
        return LoriMasks(entries, **{**facts, "task": task})


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


def _check_method(method: str, density: float | None) -> None:
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


def _checked_weights(weights: float | Sequence[float] | None, count: int) -> list[float]:
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


def _check_bases(sources: Sequence[AdapterFile], base_model: str | None) -> str | None:
    """Return the base model's name; raise if the sources have several and none was named."""
    names = {source.title: source.base for source in sources}
    known = {base for base in names.values() if base is not None}
    hub = {base for base in known if "/" in base}
    folders = {base.rpartition("/")[2].lower() for base in known}
    if base_model is None and (len(hub) > 1 or len(folders) > 1):
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


def _check_ranks(sources: Sequence[AdapterFile], method: str) -> None:
    if method == "concat":
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
                "Use `method='concat'`, which takes any."
            )


def _check_dtypes(sources: Sequence[AdapterFile]) -> None:
    found = {source.title: "+".join(sorted(source.dtypes)) for source in sources}
    if len({*found.values()}) > 1:
        logger.warning(
            f"The adapters have different dtypes ({', '.join(f'{name}: {dtype}' for name, dtype in found.items())}). "
            "The merge is computed and written in float32, so none of them is rounded."
        )


class _Independence:
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

    def report(self, sources: Sequence[AdapterFile]) -> list[dict[str, Any]]:
        """Return each pair's mean squared cosine in units of chance; warn of those that are not independent."""
        entries = []
        for pair, found in self.excess.items():
            pairs = sum(count for _, count in found)
            excess = sum(value * count for value, count in found) / pairs
            names, shared = [sources[number].title for number in pair], self.shared[pair]
            entries.append({"adapters": names, "same_A": shared, "squared_cosine_over_chance": round(excess, 4)})
            if shared:
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


# ---- the merge -------------------------------------------------------------------------------------------------


@contextmanager
def open_plan(
    adapters: Sequence[str | Path],
    method: str,
    *,
    density: float | None = None,
    seed: int = 0,
    base_model: str | None = None,
    token: str | None = None,
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
    _check_method(method, density)
    with ExitStack() as stack:
        sources = []
        for name in map(str, adapters):
            sources.append(stack.enter_context(open_adapter(name, token)))
            _check_mergeable(sources[-1])
        base = _check_bases(sources, base_model)
        _check_ranks(sources, method)
        yield Plan(sources, method, density, seed, base)


def merge_lori_adapters(
    adapters: Sequence[str | Path],
    weights: float | Sequence[float] | None = None,
    method: str = "concat",
    output_dir: str | Path = "merged-lori",
    *,
    density: float | None = None,
    seed: int = 0,
    base_model: str | None = None,
    token: str | None = None,
    search: Mapping[str, Any] | None = None,
) -> Path:
    """
    Merge adapters into one, from their files: matrix by matrix, without the base model.

    The result is a plain PEFT adapter in float32 with one rank and one alpha, so that PEFT and vLLM load it, with the
    recipe of the merge, the inputs' hashes, the masks of every task and a card beside it.

    Args:
        adapters (`Sequence[str]`):
            Folders, compact files or repositories on the Hub, of LoRI or plain LoRA, any number of them. Target
            modules may differ: what an adapter does not have contributes nothing. With `concat`, ranks may differ.
        weights (`float` or `Sequence[float]`, *optional*):
            One weight for each adapter, or one for all; by default 1 / their number. The paper takes 0.3 to 0.5
            for three or four adapters (Tables 8 to 10).
        method (`str`, *optional*, defaults to `"concat"`):
            `"concat"` is the weighted sum of the deltas, exactly; ranks add up. `"linear"` sums A and B by themselves;
            weights multiply. `"linear_peft"` does so with square roots of the weights, as PEFT's `linear` and the
            paper's tables. `"magnitude"` (PEFT's `magnitude_prune`), `"ties"` and `"dare"` (`dare_linear`) prune A
            and B first.
        output_dir (`str` or `Path`, *optional*, defaults to `"merged-lori"`): where to; written whole or not at all.
        density (`float`, *optional*): the share of A and of B that the pruning methods keep, in (0, 1].
        seed (`int`, *optional*, defaults to 0): `dare` draws as PEFT does after `torch.manual_seed(seed)`.
        base_model (`str`, *optional*): what to record as the base model, where the adapters name different ones.
        token (`str`, *optional*): a token that may read the repositories; by default that of `hf auth login`.
        search (`Mapping[str, Any]`, *optional*):
            How the weights were found, to note in `lori_config.json`: a [`~merge_search.Search`]'s `record`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        `FileNotFoundError`: an adapter does not exist or lacks a file.
        `ValueError`: an argument is not allowed; the adapters' base models or shapes differ; an adapter is no plain
            LoRA, unreadable or not finite; or nothing would be merged. Nothing is written then.
        `PermissionError`, `ConnectionError`: a repository cannot be fetched.

    Source: paper section 2.2, eq. 3 to 5. The scaling alpha / rank, which they leave out, is honoured for each input:
    with `concat` the merged delta is the sum of weight * alpha / rank * B A.

    ```python
    merge_lori_adapters(["math-lori-s", "code-lori-s"], weights=[0.5, 0.4], output_dir="math-code")
    ```
    """
    output_dir = Path(output_dir)
    with open_plan(adapters, method, density=density, seed=seed, base_model=base_model, token=token) as plan:
        sources = plan.sources
        weights = _checked_weights(weights, len(sources))
        _check_dtypes(sources)
        for source in sources:
            if source.folder.resolve() == output_dir.resolve():
                raise ValueError(
                    f"`output_dir={output_dir}` is one of the adapters to merge, which it would replace. Pass another."
                )
        with staged(output_dir) as stage, ThreadPoolExecutor(1) as pool:
            hashes = [pool.submit(_hashes, source) for source in sources]
            found, independence = _write_factors(plan, weights, stage / PEFT_FILES[1])
            projection = {"init": None, "seed": None, "fingerprint": found}
            for source in sources:
                known = source.lori_config["projection"] if source.lori_config is not None else projection
                projection = known if known["fingerprint"] == projection["fingerprint"] else projection
            tasks = []
            for task, record in _tasks(sources).items():
                masks = plan.mask(task)
                if method == "concat":
                    masks.projection = projection
                masks.save_pretrained(stage)
                tasks.append({**record, "selected": masks.num_selected})
            adapter_config(plan).save_pretrained(stage)
            lori_config = {
                **_lori_config(plan, projection, tasks),
                "merge": {
                    "method": method,
                    "adapters": [
                        {
                            "task": _task(source),
                            "weight": weight,
                            "source": source.title,
                            "rank": source.rank,
                            "offset": offset,
                            "sha256": future.result(),
                        }
                        for source, weight, offset, future in zip(sources, weights, plan.offsets, hashes, strict=True)
                    ],
                    **({"density": density} if density is not None else {}),
                    **({"seed": seed} if method == "dare" else {}),
                    **({"search": dict(search)} if search is not None else {}),
                    "independence": independence,
                },
            }
            (stage / CONFIG_NAME).write_text(json.dumps(lori_config, indent=2) + "\n", encoding="utf-8")
            recipe = {"adapters": [source.name for source in sources], "weights": weights, "method": method}
            recipe |= {"density": density} if density is not None else {}
            recipe |= {"seed": seed} if method == "dare" else {}
            recipe |= {"base_model": base_model} if base_model is not None else {}
            (stage / RECIPE_NAME).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
            write_card(stage, stage, beside=output_dir)
    (output_dir / PICTURE_NAME).unlink(missing_ok=True)  # that of another adapter before this one
    return output_dir


def _write_factors(plan: Plan, weights: Sequence[float], file: Path) -> tuple[str, list[dict[str, Any]]]:
    """Merge all modules into a file. Returns A's fingerprint and the report on the independence of the sources' A."""
    names = {path: [f"base_model.model.{path}.lora_{part}.weight" for part in "AB"] for path in plan.paths}
    shapes = {}
    for path, (rows, columns) in plan.shapes.items():
        shapes |= dict(zip(names[path], ((plan.rank, columns), (rows, plan.rank)), strict=True))
    independence, taken, anything = _Independence(), Fingerprint(), False
    compared = {*plan.paths[:: -(-len(plan.paths) // _Independence.MODULES)]}
    with SafetensorsWriter(file, shapes, {"format": "pt"}) as writer, ThreadPoolExecutor(1) as pool:
        behind = pool.submit(lambda: None)
        for path, factors in read_modules(plan.sources, plan.paths, torch.float32):
            if path in compared:
                independence.add(factors)
            A, B = plan.merge(path, factors, weights)
            anything = anything or bool(B.any())
            behind.result()  # one module at a time waits for being written
            behind = pool.submit(_store, writer, taken, path, names[path], A, B)
        behind.result()
    if not anything:
        raise ValueError(
            f"The merge of {', '.join(f'`{source.title}`' for source in plan.sources)} is empty: every entry of its B "
            "is 0, so it would change no weight of the base model. At least one trained adapter is needed. Check the "
            "adapters, the weights and the density."
        )
    return str(taken), independence.report(plan.sources)


def _store(writer: SafetensorsWriter, taken: Fingerprint, path: str, names: list[str], A: Tensor, B: Tensor) -> None:
    for name, tensor in zip(names, (A, B), strict=True):
        writer.write(name, tensor)
    taken.add(path, A)


def _tasks(sources: Sequence[AdapterFile]) -> dict[str, dict[str, Any]]:
    """Return the record of every task that has masks, in the order of the adapters, oldest first."""
    records: dict[str, dict[str, Any]] = {}
    for source in sources:
        for record in task_records(source.lori_config) if source.lori_config is not None else []:
            records.setdefault(record["task"], record)
    return records


def _common(values: Sequence[Any], otherwise: Any = None) -> Any:
    return values[0] if all(value == values[0] for value in values) else otherwise


def adapter_config(plan: Plan) -> LoraConfig:
    """Return PEFT's configuration of the merged adapter."""
    configs = [source.config for source in plan.sources]
    targets = [config.get("target_modules") for config in configs]
    by_name = all(isinstance(target, list) for target in targets) and not any(
        config.get("layers_to_transform") is not None or config.get("exclude_modules") for config in configs
    )
    return LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=sorted({name for target in targets for name in target}) if by_name else plan.paths,
        base_model_name_or_path=plan.base,
        task_type=_common([config.get("task_type") for config in configs]),
        lora_dropout=_common([config.get("lora_dropout", 0.0) for config in configs], 0.0),
        fan_in_fan_out=any(config.get("fan_in_fan_out") for config in configs),
        inference_mode=True,
    )


def _lori_config(plan: Plan, projection: dict[str, Any], tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """What `lori_config.json` says of every adapter; of a merged one, much is unknown."""
    lora_A, lora_B = (plan.rank * sum(shape[side] for shape in plan.shapes.values()) for side in (1, 0))
    training = [(source.lori_config or {}).get("training") or {} for source in plan.sources]
    base_models = [facts["base_model"] for facts in training if facts.get("base_model")]
    return {
        "format_version": ADAPTER_FORMAT_VERSION,
        "task": "-".join(dict.fromkeys(_task(source) for source in plan.sources))[:96],
        "phase": "adaptation",
        "variant": "merged",
        "sparsity": None,
        "granularity": None,
        "threshold": None,
        "projection": projection,
        "calibration": None,
        "counts": {"lora": lora_A + lora_B, "lora_B": lora_B, "selected": None},
        "tasks": tasks,
        "training": {
            "base_model": base_models[0] if base_models else None,
            "license": _common([facts.get("license") for facts in training]),
        },
        "versions": {name: version(name) for name in ("lori_trl", "peft", "torch", "safetensors")},
    }
