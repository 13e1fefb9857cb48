"""Interference in numbers: where tasks train, and how far their masks and deltas meet. Files in, statistics out.

Everything is read matrix by matrix, and the base model not at all. With delta W = s B A, inner products of deltas come
from the small factors: <s1 B1 A1, s2 B2 A2> = s1 s2 trace((A2 A1^T) (B1^T B2)).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adapter import CONFIG_NAME, PEFT_FILES, check_peft_files, plain_folder, read_lori_config, trained_mask
from .download import is_repo_id
from .masks import COMPACT_NAME, GRANULARITIES, MASKS_FOLDER, LoriMasks, choose_mask_files
from .projections import module_path

FORMAT_VERSION = 1

Place = tuple[int, str]  # layer, projection; as in the paper's Figure 6

_DECADES, _BINS_A_DECADE = (-12, 4), 20  # of |B|; smaller and larger entries count in the outermost bins


@dataclass
class AdapterStatistics:
    """
    What is told of one adapter.

    Args:
        name (`str`): of its folder or repository.
        base_model (`str` or `None`): the base model's name, without the way to a local folder.
        modules (`int`): matrices that the adapter changes.
        ranks (`list[int]`): every rank that occurs.
        scalings (`list[float]`): every scaling s that occurs, `alpha / rank` or `alpha / sqrt(rank)`.
        tasks (`list[str]`): names of its tasks, oldest first.
        numel_B (`int`): entries of B.
        outside (`int`): entries of B that are not zero and on no task's mask; 0 where an adapter has no masks.
    """

    name: str
    base_model: str | None
    modules: int
    ranks: list[int]
    scalings: list[float]
    tasks: list[str]
    numel_B: int
    outside: int = 0


@dataclass
class TaskStatistics:
    """
    What is told of one task: the delta s B A, with B reduced to the entries that belong to the task.

    Args:
        name (`str`): the task; with its adapter's name before it where two adapters have a task of that name.
        adapter (`str`): its adapter.
        masked (`bool`): whether it has a mask. Without one, all of B belongs to it and `density` counts what is not 0.
        selected (`int`): entries on its mask.
        owned (`int`): entries that belong to it: where masks overlap, an entry belongs to the newest task.
        density (`float`): `selected` over all entries of B, a fraction in [0, 1].
        norm (`float`): Frobenius norm of the delta, over all matrices.
        cells (`dict[tuple[int, str], Cell]`): the parts, by layer and projection; a [`Cell`] each.
        magnitudes ([`Magnitudes`]): of the owned entries.
    """

    name: str
    adapter: str
    masked: bool
    selected: int
    owned: int
    density: float
    norm: float
    cells: "dict[Place, Cell]"
    magnitudes: "Magnitudes"

    def total(self, layer: int | None = None, projection: str | None = None) -> "Cell":
        """Put the cells of a layer, of a kind of projection, or all together."""
        return _total(self.cells, layer, projection)


@dataclass
class Cell:
    """
    One layer's part of a task in one kind of projection.

    Args:
        selected (`int`): entries on the task's mask; without one, entries that are not 0.
        numel (`int`): all entries of B.
        squared_norm (`float`): of the delta, Frobenius.
    """

    selected: int = 0
    numel: int = 0
    squared_norm: float = 0.0

    @property
    def density(self) -> float:
        """`selected / numel`, a fraction in [0, 1]."""
        return self.selected / max(self.numel, 1)

    @property
    def norm(self) -> float:
        """The Frobenius norm of the delta."""
        return math.sqrt(max(self.squared_norm, 0.0))  # rounding can leave a zero's square below 0


class Magnitudes:
    """
    How large entries are: a histogram of log10 |B|, twenty bins a decade, with the squares that every bin holds.

    Attributes:
        counts (`Tensor`): entries in every bin, int64.
        squares (`Tensor`): the sum of their squares, float64.
        zeros (`int`): entries that are 0.
    """

    def __init__(self):
        bins = (_DECADES[1] - _DECADES[0]) * _BINS_A_DECADE
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.squares = torch.zeros(bins, dtype=torch.float64)
        self.zeros = 0

    def add(self, entries: Tensor) -> None:
        """Count entries, any shape, float64."""
        entries = entries[entries != 0].abs()
        bins = ((entries.log10() - _DECADES[0]) * _BINS_A_DECADE).floor().long().clamp_(0, len(self.counts) - 1)
        self.counts += torch.bincount(bins, minlength=len(self.counts))
        self.squares += torch.bincount(bins, weights=entries.square(), minlength=len(self.counts))

    @property
    def numel(self) -> int:
        """All entries that were counted."""
        return int(self.counts.sum()) + self.zeros

    @property
    def span(self) -> slice:
        """The bins from the first to the last that holds an entry."""
        filled = self.counts.nonzero().flatten().tolist()
        return slice(filled[0], filled[-1] + 1) if filled else slice(0, 0)

    @property
    def edges(self) -> list[float]:
        """The edges of `span`'s bins as log10 |B|, one more than there are bins."""
        return [self.edge(i) for i in range(self.span.start, self.span.stop + 1)]

    @staticmethod
    def edge(i: int) -> float:
        """Return the lower edge of a bin as log10 |B|."""
        return _DECADES[0] + i / _BINS_A_DECADE

    def shares(self) -> tuple[list[float], list[float]]:
        """Return the cumulative curve, from the largest entries down: shares of the entries, of the squared norm."""
        span = self.span
        entries = self.counts[span].flip(0).cumsum(0) / max(self.numel, 1)
        squares = self.squares[span].flip(0).cumsum(0) / self.squares.sum().clamp(min=1e-300)
        return [0.0, *entries.tolist()], [0.0, *squares.tolist()]

    def top(self, share: float) -> float:
        """Return how much of the squared norm the largest entries hold. Inside a bin it is shared out evenly."""
        entries, squares = self.shares()
        for i in range(1, len(entries)):
            if entries[i] >= share:
                part = (share - entries[i - 1]) / (entries[i] - entries[i - 1])
                return squares[i - 1] + part * (squares[i] - squares[i - 1])
        return squares[-1]


@dataclass
class Overlap:
    """
    How far the first task's mask lies on the second's, and the other way round: fractions of the own entries.

    Args:
        shares (`tuple[float, float]`): of the first's entries those on the second mask; of the second's on the first.
        chance (`tuple[float, float]`): the same for a mask that lies at random: the density of the other mask.
        chance_by_matrix (`tuple[float, float]`):
            the same where each matrix keeps its density: what is above it is not due to both tasks favouring the
            same matrices.
    """

    shares: tuple[float, float]
    chance: tuple[float, float]
    chance_by_matrix: tuple[float, float]


@dataclass
class TaskPair:
    """
    Two tasks beside each other.

    Args:
        first, second (`str`): the tasks' names.
        same_A (`bool`): whether both have the same A, bit for bit, wherever both change a matrix. If not, a mask's
            columns count other directions, and an overlap says nothing about interference.
        overlap ([`Overlap`], *optional*): of the masks; `None` where it is not defined.
        cosine (`float`, *optional*): of the deltas over all matrices; `None` where it is not defined.
        cosine_by_layer (`dict[int, float]`): the same in every layer in which both have a delta.
        undefined (`list[str]`): why something is not defined.
    """

    first: str
    second: str
    same_A: bool
    overlap: Overlap | None = None
    cosine: float | None = None
    cosine_by_layer: dict[int, float] = field(default_factory=dict)
    undefined: list[str] = field(default_factory=list)


@dataclass
class ProjectionPair:
    """
    The A of two adapters: |cosine| between rows of the one and rows of the other, over all matrices they share.

    Args:
        first, second (`str`): the adapters' names.
        same (`bool`): whether they are the same bit for bit.
        mean (`float`): mean |cosine|.
        chance (`float`): what independent random rows have: sqrt(2 / (pi in_features)).
        max (`float`): the largest |cosine|; 1 for a row that both have.
    """

    first: str
    second: str
    same: bool
    mean: float
    chance: float
    max: float


@dataclass
class Inspection:
    """
    What [`inspect_adapters`] found.

    Args:
        adapters (`list[AdapterStatistics]`): in the order given.
        tasks (`list[TaskStatistics]`): of all adapters, each adapter's oldest first.
        pairs (`list[TaskPair]`): every two tasks.
        projections (`list[ProjectionPair]`): every two adapters that can be compared.
        notes (`list[str]`): what a reader of the numbers must know.
    """

    adapters: list[AdapterStatistics]
    tasks: list[TaskStatistics]
    pairs: list[TaskPair]
    projections: list[ProjectionPair]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with a `format_version`. What is not defined is `None`."""

        def cells(task: TaskStatistics) -> list[dict[str, Any]]:
            return [
                {"layer": layer, "projection": name, "selected": cell.selected, "numel": cell.numel}
                | {"density": cell.density, "norm": cell.norm}
                for (layer, name), cell in task.cells.items()
            ]

        def magnitudes(found: Magnitudes) -> dict[str, Any]:
            return {
                "log10_edges": found.edges,
                "counts": found.counts[found.span].tolist(),
                "squares": found.squares[found.span].tolist(),
                "zeros": found.zeros,
            }

        tasks = [vars(task) | {"cells": cells(task), "magnitudes": magnitudes(task.magnitudes)} for task in self.tasks]
        pairs = [
            vars(pair)
            | {
                "overlap": None if pair.overlap is None else {name: list(v) for name, v in vars(pair.overlap).items()},
                "cosine_by_layer": [{"layer": layer, "cosine": c} for layer, c in pair.cosine_by_layer.items()],
            }
            for pair in self.pairs
        ]
        return {
            "format_version": FORMAT_VERSION,
            "adapters": [dict(vars(adapter)) for adapter in self.adapters],
            "tasks": tasks,
            "pairs": pairs,
            "projections": [dict(vars(pair)) for pair in self.projections],
            "notes": list(self.notes),
        }


def inspect_adapters(
    adapters: Sequence[str | Path],
    *,
    token: str | None = None,
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Inspection:
    """
    Measure adapters and hold their tasks against each other.

    Args:
        adapters (`Sequence[str]` or `Sequence[Path]`):
            Folders or repositories on the Hub: LoRI adapters of one task or several, plain LoRA, merged ones. An
            adapter without masks counts as one task of its name.
        token (`str`, *optional*): a token that may read the repositories; by default that of `hf auth login`.
        track (`Callable`, *optional*): wraps the sequence of matrices, to show progress; e.g. `rich.progress.track`.

    Returns:
        [`Inspection`]

    Raises:
        `FileNotFoundError`: a folder, repository or file is missing.
        `PermissionError`: a repository may not be read.
        `ConnectionError`: the Hub cannot be reached, and the cache does not have the files.
        `ValueError`: an adapter is given twice, is no LoRA on linear layers, or has a file that is unreadable or not
            finite.

    Source: paper Figure 6 (density), Property 1 (A), section 3.4 (overlap).
    """
    with ExitStack() as stack:
        opened = [
            stack.enter_context(_open_adapter(source, name, token))
            for source, name in zip(adapters, _names(adapters), strict=True)
        ]
        tasks = [_Task(adapter, task) for adapter in opened for task in adapter.masks or [None]]
        _label(tasks)
        pairs = [_Pair(*two) for two in combinations(tasks, 2)]
        projection_pairs = [_ProjectionPair(*two) for two in combinations(opened, 2)]
        for path in track(sorted(set().union(*(adapter.shapes for adapter in opened)))):
            factors = {adapter.name: adapter.read(path) for adapter in opened if path in adapter.shapes}
            own = {task.label: task.add(path, *factors[task.adapter.name]) for task in tasks if path in task}
            for pair in pairs:
                pair.add(path, own, factors)
            for pair in projection_pairs:
                pair.add(path, factors)
        finished = [pair.finish() for pair in pairs]
        return Inspection(
            [adapter.statistics([task.label for task in tasks if task.adapter is adapter]) for adapter in opened],
            [task.finish() for task in tasks],
            finished,
            [pair.finish() for pair in projection_pairs if pair.count],
            _notes(opened, tasks, finished),
        )


class _Adapter:
    """An adapter's files: headers and masks at once, matrices on demand."""

    def __init__(self, folder: Path, name: str):
        self.name, self.folder = name, folder
        self.config = _read_peft_config(folder)
        self.keys: dict[str, dict[str, str]] = {}
        self.shapes: dict[str, tuple[int, int, int]] = {}  # out_features, rank, in_features
        self.others = 0
        with self._opened() as file:
            for key in file.keys():
                part = next((part for part in ("lora_A", "lora_B") if f".{part}." in key), None)
                if part is None:
                    self.others += 1
                else:
                    self.keys.setdefault(module_path(key), {})[part] = key
            for path, keys in sorted(self.keys.items()):
                self.shapes[path] = self._checked_shape(path, {part: file.get_slice(keys[part]) for part in keys})
        if not self.shapes:
            raise ValueError(
                f"`{folder / PEFT_FILES[1]}` holds no lora_A and lora_B. Adapters on linear layers can be inspected. "
                "Pass the folder of a LoRA or LoRI adapter."
            )
        self.masks = self._read_masks()
        self.outside = 0

    @contextmanager
    def _opened(self):
        """Open the weights for a moment: as long as a file is mapped, all that was read of it stays in memory."""
        try:
            file = safe_open(self.folder / PEFT_FILES[1], framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"`{self.folder / PEFT_FILES[1]}` is unreadable: {error}. It must be a whole safetensors file. Fetch "
                "or save it again."
            ) from error
        with file as opened:
            yield opened

    def _checked_shape(self, path: str, parts: Mapping[str, Any]) -> tuple[int, int, int]:
        try:
            (rank, columns), (rows, rank_B) = (parts[part].get_shape() for part in ("lora_A", "lora_B"))
        except (KeyError, ValueError):
            rank, rank_B = 0, -1
        if rank != rank_B:
            raise ValueError(
                f"`{path}` in `{self.folder}` is no pair of lora_A (rank, in_features) and lora_B (out_features, "
                "rank). Adapters on linear layers can be inspected. Fetch or save it again."
            )
        return rows, rank, columns

    def _read_masks(self) -> dict[str, LoriMasks]:
        if (self.folder / CONFIG_NAME).is_file():
            tasks = [record["task"] for record in read_lori_config(self.folder)["tasks"]]
            masks = {task: LoriMasks.from_pretrained(self.folder, task=task) for task in tasks}
        elif list((self.folder / MASKS_FOLDER).glob("*_mask.pt")):  # the authors' own
            with self._opened() as file:
                moved = LoriMasks({path: file.get_tensor(keys["lora_B"]) != 0 for path, keys in self.keys.items()})
            masks = {self.name: trained_mask(moved, LoriMasks.from_pretrained(self.folder))}
        else:
            masks = {}
        for mask in masks.values():
            mask.check_shapes({path: (rows, rank) for path, (rows, rank, _) in self.shapes.items()})
        return masks

    def scaling(self, path: str) -> float:
        """Return s of a matrix, as PEFT computes it."""
        config = self.config
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
        rank = self.shapes[path][1]
        return alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def read(self, path: str) -> tuple[Tensor, Tensor]:
        """Read A `(rank, in_features)` and B `(out_features, rank)`, in float64."""
        with self._opened() as file:
            A, B = (file.get_tensor(self.keys[path][part]).double() for part in ("lora_A", "lora_B"))
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(
                f"`{path}` in `{self.folder}` holds NaN or infinity. Every entry of an adapter must be finite. The "
                "training that wrote it has diverged: train again with a lower learning rate."
            )
        if self.masks:
            moved = B != 0
            for mask in self.masks.values():
                moved &= ~mask[path]
            self.outside += int(moved.count_nonzero())
        return A, B

    def statistics(self, tasks: list[str]) -> AdapterStatistics:
        return AdapterStatistics(
            name=self.name,
            base_model=_base_name(self.config.base_model_name_or_path),
            modules=len(self.shapes),
            ranks=sorted({rank for _, rank, _ in self.shapes.values()}),
            scalings=sorted({self.scaling(path) for path in self.shapes}),
            tasks=tasks,
            numel_B=sum(rows * rank for rows, rank, _ in self.shapes.values()),
            outside=self.outside,
        )


@contextmanager
def _open_adapter(source: str | Path, name: str, token: str | None) -> Iterator[_Adapter]:
    with plain_folder(source, token=token, choose=_choose_files) as folder:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"`{source}` does not exist. An adapter is a folder, a compact file or a repository on the Hub, "
                "namespace/name. Correct the name."
            )
        check_peft_files(folder)
        yield _Adapter(folder, name)


def _choose_files(names: list[str]) -> list[str]:
    """Choose what to fetch of a repository: the plain files, with masks where there are some; else the compact one."""
    if not {*PEFT_FILES} <= {*names}:
        return [name for name in names if name == COMPACT_NAME]
    return [*(choose_mask_files(names) or [name for name in names if name == CONFIG_NAME]), *PEFT_FILES]


def _read_peft_config(folder: Path) -> LoraConfig:
    file = folder / PEFT_FILES[0]
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("peft_type")
        config = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"`{file}` is unreadable ({error!r}). It must be the JSON that PEFT wrote. Fetch or save it again."
        ) from error
    fault = f"peft_type={kind!r}" if config is None else "use_dora=True" if config.use_dora else None
    if fault is None and config.target_parameters:
        fault = f"target_parameters={config.target_parameters}"
    if fault is not None:
        raise ValueError(
            f"`{file}` says `{fault}`, so the adapter's delta is not s B A. LoRA and LoRI on linear layers can be "
            "inspected. Pass such an adapter."
        )
    return config


class _Task:
    """A task's sums while matrices are read."""

    def __init__(self, adapter: _Adapter, task: str | None):
        self.adapter = adapter
        self.name = self.label = task if task is not None else adapter.name
        self.mask = adapter.masks[task] if task is not None else None
        order = list(adapter.masks)
        self.newer = [adapter.masks[name] for name in order[order.index(task) + 1 :]] if task is not None else []
        self.cells: dict[Place, Cell] = {}
        self.owned = 0
        self.magnitudes = Magnitudes()

    def __contains__(self, path: str) -> bool:
        return path in self.adapter.shapes

    def add(self, path: str, A: Tensor, B: Tensor) -> Tensor:
        """Count a matrix. Returns s B, reduced to the task's own entries."""
        owned = torch.ones_like(B, dtype=torch.bool) if self.mask is None else self.mask[path]
        for newer in self.newer:
            owned = owned & ~newer[path]
        selected = (B != 0) if self.mask is None else self.mask[path]
        own = torch.where(owned, B, 0)
        count = int(owned.count_nonzero())
        self.owned += count
        self.magnitudes.add(own)
        self.magnitudes.zeros += count - int(own.count_nonzero())
        own = own.mul_(self.adapter.scaling(path))
        cell = self.cells.setdefault(_place(path), Cell())
        cell.selected += int(selected.count_nonzero())
        cell.numel += B.numel()
        cell.squared_norm += _inner(A, own, A, own)
        return own

    def total(self, layer: int | None = None) -> Cell:
        return _total(self.cells, layer)

    def finish(self) -> TaskStatistics:
        total = self.total()
        return TaskStatistics(
            name=self.label,
            adapter=self.adapter.name,
            masked=self.mask is not None,
            selected=total.selected,
            owned=self.owned,
            density=total.density,
            norm=total.norm,
            cells=dict(sorted(self.cells.items())),
            magnitudes=self.magnitudes,
        )


class _Pair:
    """What two tasks have in common, while matrices are read."""

    def __init__(self, first: _Task, second: _Task):
        self.tasks = first, second
        self.inner: dict[int, float] = {}
        self.same_A = True
        self.both = 0  # entries on both masks
        self.selected = [0, 0]  # in matrices that both change
        self.expected = 0.0
        ours, theirs = first.adapter.shapes, second.adapter.shapes
        shared = [path for path in ours if path in theirs]
        self.undefined = {}
        if not shared:
            self.undefined["cosine and overlap"] = "they change no matrix in common"
        for path in shared:
            (rows, rank, columns), (other_rows, other_rank, other_columns) = ours[path], theirs[path]
            if (rows, columns) != (other_rows, other_columns):
                self.undefined["cosine and overlap"] = (
                    f"{path} is ({rows}, {columns}) here and ({other_rows}, {other_columns}) there: other base models"
                )
                break
            if rank != other_rank:
                self.undefined["overlap"] = f"{path} has rank {rank} here and {other_rank} there"
        unmasked = [task.label for task in self.tasks if task.mask is None]
        if unmasked and "cosine and overlap" not in self.undefined:
            self.undefined["overlap"] = f"{' and '.join(unmasked)} {'have' if len(unmasked) > 1 else 'has'} no mask"

    def add(self, path: str, own: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        first, second = self.tasks
        if path not in first or path not in second or "cosine and overlap" in self.undefined:
            return
        (A, _), (other_A, _) = factors[first.adapter.name], factors[second.adapter.name]
        self.same_A = self.same_A and torch.equal(A, other_A)
        layer = _place(path)[0]
        inner = _inner(A, own[first.label], other_A, own[second.label])
        self.inner[layer] = self.inner.get(layer, 0.0) + inner
        if "overlap" not in self.undefined:
            masks = first.mask[path], second.mask[path]
            counts = [int(mask.count_nonzero()) for mask in masks]
            self.both += int((masks[0] & masks[1]).count_nonzero())
            self.selected = [sum(two) for two in zip(self.selected, counts, strict=True)]
            self.expected += counts[0] * counts[1] / masks[0].numel()

    def finish(self) -> TaskPair:
        first, second = self.tasks
        found = TaskPair(first.label, second.label, same_A=self.same_A and bool(self.inner))
        if not self.undefined:
            selected = [max(task.total().selected, 1) for task in self.tasks]
            numel = [task.total().numel for task in self.tasks]
            found.overlap = Overlap(
                (self.both / selected[0], self.both / selected[1]),
                (self.selected[1] / numel[0], self.selected[0] / numel[1]),
                (self.expected / selected[0], self.expected / selected[1]),
            )
        if "cosine and overlap" not in self.undefined:
            empty = [task.label for task in self.tasks if task.total().norm == 0]
            if empty:
                self.undefined["cosine"] = f"the delta of {' and '.join(empty)} is zero"
            else:
                found.cosine = _cosine(sum(self.inner.values()), first.total(), second.total())
            for layer in sorted(self.inner):
                totals = first.total(layer), second.total(layer)
                if totals[0].norm > 0 and totals[1].norm > 0:
                    found.cosine_by_layer[layer] = _cosine(self.inner[layer], *totals)
        found.undefined = [f"{what}: {why}" for what, why in self.undefined.items()]
        return found


class _ProjectionPair:
    """The A of two adapters, while matrices are read."""

    def __init__(self, first: _Adapter, second: _Adapter):
        self.adapters = first, second
        self.same, self.sum, self.chance, self.max, self.count = True, 0.0, 0.0, 0.0, 0

    def add(self, path: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        names = [adapter.name for adapter in self.adapters]
        if not all(name in factors for name in names):
            return
        A, other = (factors[name][0] for name in names)
        if A.shape[1] != other.shape[1]:
            return
        self.same = self.same and torch.equal(A, other)
        cosines = (torch.nn.functional.normalize(A) @ torch.nn.functional.normalize(other).T).abs()
        self.sum += float(cosines.sum())
        self.max = max(self.max, float(cosines.max()))
        self.count += cosines.numel()
        self.chance += cosines.numel() * math.sqrt(2 / (math.pi * A.shape[1]))

    def finish(self) -> ProjectionPair:
        first, second = self.adapters
        return ProjectionPair(
            first.name, second.name, self.same, self.sum / self.count, self.chance / self.count, min(self.max, 1.0)
        )


def _inner(A: Tensor, B: Tensor, other_A: Tensor, other_B: Tensor) -> float:
    """Return <B A, B' A'> = sum of (A A'^T) * (B^T B'), for A `(rank, in_features)` and B `(out_features, rank)`."""
    return float(((A @ other_A.T) * (B.T @ other_B)).sum())


def _cosine(inner: float, first: Cell, second: Cell) -> float:
    return max(-1.0, min(1.0, inner / first.norm / second.norm))


def _total(cells: Mapping[Place, Cell], layer: int | None = None, projection: str | None = None) -> Cell:
    total = Cell()
    for place, cell in cells.items():
        if layer in (None, place[0]) and projection in (None, place[1]):
            total.selected += cell.selected
            total.numel += cell.numel
            total.squared_norm += cell.squared_norm
    return total


def _place(path: str) -> Place:
    return int(GRANULARITIES["layer"](path)), GRANULARITIES["projection"](path)


def _base_name(name: str | None) -> str | None:
    """Return a base model's name; of a local folder the last part, not where it lies."""
    return name if name is None or is_repo_id(name) else Path(name).name


def _names(adapters: Sequence[str | Path]) -> list[str]:
    """Name adapters by the last part of their paths, or by as many parts as tell them apart."""
    parts = [(source,) if is_repo_id(source) else Path(source).resolve().parts for source in adapters]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next((str(source) for i, source in enumerate(adapters) if parts[i] in parts[:i]), None)
    raise ValueError(
        f"`adapters={list(map(str, adapters))}`: {f'{twice} is there twice' if twice else 'none is named'}. One or "
        "more different adapters can be inspected. Pass each once."
    )


def _label(tasks: Sequence[_Task]) -> None:
    """Put the adapter's name before the task's where two adapters have a task of that name."""
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            task.label = f"{task.adapter.name}: {task.name}"


def _notes(adapters: Sequence[_Adapter], tasks: Sequence[_Task], pairs: Sequence[TaskPair]) -> list[str]:
    notes = []
    bases = {name: None for adapter in adapters if (name := _base_name(adapter.config.base_model_name_or_path))}
    if len(bases) > 1:
        notes.append(
            f"The adapters name different base models ({', '.join(bases)}). Deltas and masks of different models are "
            "not comparable, even where the shapes agree."
        )
    for adapter in adapters:
        if adapter.others:
            notes.append(f"{adapter.name} holds {adapter.others} tensors beside A and B. They are left out.")
        if adapter.outside:
            notes.append(
                f"{adapter.name}: {adapter.outside:,} entries of B are not 0 and on no task's mask. They are left out."
            )
    for task in tasks:
        selected = task.total().selected
        if task.mask is not None and task.owned < selected:
            notes.append(
                f"{selected - task.owned:,} of the {selected:,} entries on the mask of {task.label} are on a newer "
                "task's mask too. Such an entry holds what both have trained; here it belongs to the newer task."
            )
    if any(pair.overlap is not None and not pair.same_A for pair in pairs):
        notes.append(
            "Masks on different A: the columns of B count directions of A, so equal positions are not equal "
            "directions there. Such an overlap says which rows are favoured, not that tasks interfere."
        )
    undefined: dict[str, list[str]] = {}
    for pair in pairs:
        for reason in pair.undefined:
            undefined.setdefault(reason, []).append(f"{pair.first} and {pair.second}")
    without_masks = {reason for reason in undefined if reason.endswith(" no mask")}  # the list of tasks shows that
    notes += [f"No {why} ({'; '.join(who)})." for why, who in undefined.items() if why not in without_masks]
    return notes
