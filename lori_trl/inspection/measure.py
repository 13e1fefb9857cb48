"""
Measure adapters: where tasks train, and how far their masks and deltas meet. Files in, statistics out.

Everything is read matrix by matrix, and the base model not at all. With delta W = s B A, inner products of deltas come
from the small factors: <s1 B1 A1, s2 B2 A2> = s1 s2 trace((A2 A1^T) (B1^T B2)).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.folder import AdapterFolder, open_adapter, read_modules
from ..hub.download import is_repo_id
from ..method.layers import GRANULARITIES
from .statistics import (
    AdapterStatistics,
    Cell,
    Inspection,
    Magnitudes,
    Overlap,
    Place,
    ProjectionPair,
    TaskPair,
    TaskStatistics,
    total_cell,
)


def inspect_adapters(
    adapters: Sequence[str | Path],
    *,
    token: str | None = None,
    allow_modified: bool = False,
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Inspection:
    """
    Measure adapters and hold their tasks against each other.

    Args:
        adapters (`Sequence[str]` or `Sequence[Path]`):
            Folders or repositories on the Hub: LoRI adapters of one task or several, plain LoRA, merged ones. An
            adapter without masks counts as one task of its name.
        token (`str`, *optional*): a token that may read the repositories; by default that of `hf auth login`.
        allow_modified (`bool`, *optional*, defaults to `False`): as of [`load_lori_adapter`].
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
            _Adapter(stack.enter_context(open_adapter(source, token=token, allow_modified=allow_modified)), name)
            for source, name in zip(adapters, _names(adapters), strict=True)
        ]
        tasks = [_Task(adapter, task) for adapter in opened for task in adapter.masks or [None]]
        _label(tasks)
        pairs = [_Pair(*two) for two in combinations(tasks, 2)]
        projection_pairs = [_ProjectionPair(*two) for two in combinations(opened, 2)]
        files = [adapter.file for adapter in opened]
        paths = sorted(set().union(*(file.shapes for file in files)))
        for path, read in read_modules(files, track(paths), torch.float64):
            factors = {opened[number].name: pair for number, pair in read.items()}
            for number, (_, B) in read.items():
                opened[number].count_outside(path, B)
            own = {task.label: task.add(path, *factors[task.adapter.name]) for task in tasks if path in task}
            for pair in pairs:
                pair.add(path, own, factors)
            for two in projection_pairs:
                two.add(path, factors)
        finished = [pair.finish() for pair in pairs]
        return Inspection(
            [adapter.statistics([task.label for task in tasks if task.adapter is adapter]) for adapter in opened],
            [task.finish() for task in tasks],
            finished,
            [pair.finish() for pair in projection_pairs if pair.count],
            _notes(opened, tasks, finished),
        )


class _Adapter:
    """An adapter's masks, and what is counted while its matrices are read."""

    def __init__(self, file: AdapterFolder, name: str):
        self.file, self.name, self.outside = file, name, 0
        changed = [f"{key}={file.config[key]!r}" for key in ("use_dora", "target_parameters") if file.config.get(key)]
        if changed:
            raise ValueError(
                f"`{file.name}` has {', '.join(changed)}, so its delta is not s B A. LoRA and LoRI on linear layers "
                "can be inspected. Pass such an adapter."
            )
        if file.unpaired or not file.shapes:
            missing = f"pair of lora_A and lora_B for {file.unpaired[0]}" if file.unpaired else "lora_A and lora_B"
            raise ValueError(
                f"`{file.name}` holds no {missing}. LoRA and LoRI on linear layers can be inspected: lora_A (rank, "
                "in_features) and lora_B (out_features, rank). Pass the folder of such an adapter."
            )
        self.masks = file.masks

    def count_outside(self, path: str, B: Tensor) -> None:
        if self.masks:
            moved = B != 0
            for mask in self.masks.values():
                moved &= ~mask[path]
            self.outside += int(moved.count_nonzero())

    def statistics(self, tasks: list[str]) -> AdapterStatistics:
        shapes = self.file.shapes.values()
        return AdapterStatistics(
            name=self.name,
            base_model=self.file.base,
            modules=len(shapes),
            ranks=sorted({rank for _, rank, _ in shapes}),
            scalings=sorted({*self.file.scalings.values()}),
            tasks=tasks,
            numel_B=sum(rows * rank for rows, rank, _ in shapes),
            outside=self.outside,
        )


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
        return path in self.adapter.file.shapes

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
        own = own.mul_(self.adapter.file.scalings[path])
        cell = self.cells.setdefault(_place(path), Cell())
        cell.selected += int(selected.count_nonzero())
        cell.numel += B.numel()
        cell.squared_norm += _inner(A, own, A, own)
        return own

    def total(self, layer: int | None = None) -> Cell:
        return total_cell(self.cells, layer)

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
        ours, theirs = first.adapter.file.shapes, second.adapter.file.shapes
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
            masks = [task.mask[path] for task in self.tasks if task.mask is not None]
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


def _place(path: str) -> Place:
    return int(GRANULARITIES["layer"](path)), GRANULARITIES["projection"](path)


def _names(adapters: Sequence[str | Path]) -> list[str]:
    """Name adapters by the last part of their paths, or by as many parts as tell them apart."""
    parts = [(str(source),) if is_repo_id(source) else Path(source).resolve().parts for source in adapters]
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
    bases = {name: None for adapter in adapters if (name := adapter.file.base)}
    if len(bases) > 1:
        notes.append(
            f"The adapters name different base models ({', '.join(bases)}). Deltas and masks of different models are "
            "not comparable, even where the shapes agree."
        )
    for adapter in adapters:
        if others := len(adapter.file.others):
            notes.append(f"{adapter.name} holds {others} tensors beside A and B. They are left out.")
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
