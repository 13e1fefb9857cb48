"""Several tasks in one adapter: what is still free, who owns what, and taking one task out again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .adapter.folder import AdapterFolder, open_adapter
from .adapter.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .adapter.masks import LoriMasks
from .adapter.record import LoriRecord, read_record
from .adapter.record_fields import TaskRecord
from .adapter.write import check_output, complete, staged
from .inputs.files import copy_files
from .method.growth import alpha_for
from .method.layers import module_path, pools
from .method.projections import Block, Projection, fingerprint
from .method.sparsity import num_to_select


def feasible_entries(shapes: Mapping[str, Sequence[int]], earlier: Mapping[str, LoriMasks]) -> LoriMasks:
    """
    Return which entries of B no earlier task has: the feasible mask Omega.

    Args:
        shapes (`Mapping[str, Sequence[int]]`): module path -> `(out_features, rank)`.
        earlier (`Mapping[str, LoriMasks]`): task -> its masks.

    Source: LoRAF, Algorithm 1, lines 1 and 12.
    """
    free = LoriMasks({path: torch.ones(tuple(shape), dtype=torch.bool) for path, shape in shapes.items()})
    for masks in earlier.values():
        free = free - masks
    return free


def tasks_that_fit(feasible: LoriMasks, sparsity: float, granularity: str = "model") -> int:
    """
    Count how many more tasks of a sparsity find all their entries among the free ones.

    Args:
        feasible ([`LoriMasks`]): the free entries.
        sparsity (`float`): of every further task, a fraction in [0, 1).
        granularity (`str`, *optional*, defaults to `"model"`): every pool must have room.
    """
    room = []
    for paths in pools(feasible, granularity).values():
        needed = num_to_select(sparsity, sum(feasible[path].numel() for path in paths))
        free = sum(int(feasible[path].count_nonzero()) for path in paths)
        room += [free // needed] if needed else []
    return min(room, default=0)


@dataclass(frozen=True)
class OwnedTask:
    """A task in the ledger of an adapter."""

    task: str  # its name
    trained: int  # entries of B that its mask has
    owned: int  # those of them that no later task has trained again
    columns: tuple[int, ...]  # where its own columns of B begin and end: all of them, but in an adapter that was grown
    record: TaskRecord  # what is known of its run: data, steps, calibration


@dataclass(frozen=True)
class TaskLedger:
    """Who owns how much of an adapter's B."""

    tasks: list[OwnedTask]  # oldest first
    rank: int  # columns of B
    numel: int  # entries of B
    free: int  # entries that no task has
    sparsity: float  # the newest task's, a fraction in [0, 1)
    more_tasks: int  # how many more disjoint tasks of this sparsity fit


def read_ledger(adapter: str | Path, *, allow_modified: bool = False) -> TaskLedger:
    """
    Read who owns how much of an adapter's B.

    Args:
        adapter (`str` or `Path`): its folder, compact file or repository on the Hub.
        allow_modified (`bool`, *optional*, defaults to `False`): as of [`load_lori_adapter`].

    Raises: as [`load_lori_adapter`].
    """
    with open_adapter(adapter, allow_modified=allow_modified) as opened:
        record, masks, rank = _record_of_tasks(opened), opened.masks, opened.rank
    newest = masks[record.tasks[-1].task]
    free, owned = feasible_entries({path: mask.shape for path, mask in newest.items()}, {}), {}
    for task in reversed(masks):
        owned[task] = (masks[task] & free).num_selected
        free = free - masks[task]
    sparsity = 1 - newest.density if newest.sparsity is None else newest.sparsity
    return TaskLedger(
        tasks=[
            OwnedTask(task.task, task.selected, owned[task.task], task.columns or (0, rank), task)
            for task in record.history
        ],
        rank=rank,
        numel=free.numel,
        free=free.num_selected,
        sparsity=sparsity,
        more_tasks=tasks_that_fit(free, sparsity, newest.granularity),
    )


def extract_task(adapter: str | Path, task: str, output_dir: str | Path, *, allow_modified: bool = False) -> None:
    """
    Write one task's own adapter: A, and of B the entries that this task trained. Of an adapter that was grown, that is
    the task's own rows of A and columns of B; of its first task, the adapter as it was before it was grown.

    The extracted adapters of all tasks add up to the whole one's B, where every entry belongs to a task.

    Args:
        adapter (`str` or `Path`): the adapter with several tasks: its folder, compact file or repository on the Hub.
        task (`str`): which task.
        output_dir (`str` or `Path`): a new folder.
        allow_modified (`bool`, *optional*, defaults to `False`): as of [`load_lori_adapter`].

    Raises:
        `FileNotFoundError`: the adapter has no such task.
        `FileExistsError`: `output_dir` is not empty.
        `ValueError`: other tasks have trained entries of this one, so that its values are not its own.
    """
    with _tasks_of(adapter, task, output_dir, allow_modified) as opened:
        _rewrite(opened, [task], output_dir, {path: ~mask for path, mask in opened.masks[task].items()})


def remove_task(adapter: str | Path, task: str, output_dir: str | Path, *, allow_modified: bool = False) -> None:
    """
    Write an adapter without one of its tasks: this task's entries of B are 0 again, all others are bit-identical.

    For the newest task that is the adapter before it. The others were trained while this one was there, and do
    without it from now on. Rows of A and columns of B that the adapter was grown by for this task alone go with it.

    Args:
        adapter (`str` or `Path`): the adapter with several tasks: its folder, compact file or repository on the Hub.
        task (`str`): which task.
        output_dir (`str` or `Path`): a new folder.
        allow_modified (`bool`, *optional*, defaults to `False`): as of [`load_lori_adapter`].

    Raises: as [`extract_task`], and `ValueError` where it is the only task.
    """

    with _tasks_of(adapter, task, output_dir, allow_modified) as opened:
        others = [name for name in opened.masks if name != task]
        if not others:
            raise ValueError(
                f"`task={task!r}` is the only task of `{adapter}`. Another one must remain. To be rid of it, do "
                "without the adapter."
            )
        _rewrite(opened, others, output_dir, opened.masks[task])


@contextmanager
def _tasks_of(adapter: str | Path, task: str, output_dir: str | Path, allow_modified: bool) -> Iterator[AdapterFolder]:
    """Open an adapter of which a task can be taken apart, after a look at where the result goes."""
    output_dir = Path(output_dir)
    check_output(output_dir, [adapter])
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(
            f"`output_dir={output_dir}` is not empty. The changed adapter goes to a new folder, and the old one stays "
            "as it is. Pass another name."
        )
    with open_adapter(adapter, allow_modified=allow_modified) as opened:
        _record_of_tasks(opened)
        if task not in opened.masks:
            raise FileNotFoundError(
                f"`task={task!r}` is not in `{adapter}`. It has {', '.join(opened.masks)}. Pass one of these."
            )
        _check_own(task, opened.masks)
        yield opened


def _rewrite(
    adapter: AdapterFolder, tasks: Sequence[str], output_dir: str | Path, cleared: Mapping[str, Tensor]
) -> None:
    """Write an adapter with some of its tasks, without the entries of B that are cleared."""
    contents = adapter.contents()
    state = {
        name: tensor.masked_fill(cleared[module_path(name)], 0) if ".lora_B." in name else tensor
        for name, tensor in contents.tensors.items()
    }
    record, config = contents.record, dict(contents.adapter_config)
    kept = _Kept(adapter, record, tasks, state)
    masks = {name: kept.masks(adapter.masks[name], record.projection) for name in tasks}
    newest = masks[tasks[-1]]
    record = kept.record(record).keeping(
        tasks,
        sparsity=newest.sparsity,
        granularity=newest.granularity,
        threshold=newest.threshold,
        selected=newest.num_selected,
    )
    state = {name: kept.part(name, tensor) for name, tensor in state.items()}
    with staged(output_dir) as stage:
        text = json.dumps(config | kept.settings, indent=2, sort_keys=True)
        (stage / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        copy_files(adapter.tokenizer, stage)
        save_file(state, stage / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        for task_masks in masks.values():
            task_masks.save_pretrained(stage)
        complete(stage, record, newest)
        check_output(output_dir)  # another process may have been faster


class _Kept:
    """
    Which blocks of an adapter's rows of A and columns of B remain where some of its tasks do.

    A block goes if no task that remains has it, and what is left there of B is zero.

    Args:
        adapter ([`AdapterFolder`]): the adapter.
        record ([`LoriRecord`]): its record.
        tasks (`Sequence[str]`): those that remain.
        state (`Mapping[str, Tensor]`): name -> A and B, with what goes of B at zero.

    Raises:
        `ValueError`: A is another one than the blocks' fingerprints say.
    """

    def __init__(self, adapter: AdapterFolder, record: LoriRecord, tasks: Sequence[str], state: Mapping[str, Tensor]):
        owners = [each.columns or (0, adapter.rank) for each in record.tasks if each.task in tasks]
        self.blocks: list[tuple[int, Block]] = []  # where each block begins
        begin = 0
        for block in record.projection.as_blocks(adapter.rank):
            end = begin + block.rank
            needed = any(first < end and begin < last for first, last in owners)
            left = (B[:, begin:end].any() for name, B in state.items() if ".lora_B." in name)
            if needed or any(left):
                self.blocks.append((begin, block))
            begin = end
        self.is_whole = sum(block.rank for _, block in self.blocks) == adapter.rank
        self.columns = torch.tensor([n for begin, block in self.blocks for n in range(begin, begin + block.rank)])
        self.projection = record.projection
        self.settings: dict[str, int | float] = {}
        if not self.is_whole:
            self._cut(adapter, state)

    def _cut(self, adapter: AdapterFolder, state: Mapping[str, Tensor]) -> None:
        A = {module_path(name): self.part(name, tensor) for name, tensor in state.items() if ".lora_A." in name}
        done = 0
        for _, block in self.blocks:
            rows = {path: tensor[done : done + block.rank] for path, tensor in A.items()}
            done += block.rank
            if fingerprint(rows) != block.fingerprint:
                raise ValueError(
                    f"`{adapter.name}`: rows of A are not those that its record names as a task's own: their "
                    "fingerprint is another. They must be as they were trained on. Fetch or save the adapter again."
                )
        self.projection = Projection.of_blocks((block for _, block in self.blocks), fingerprint(A))
        scaling, rslora = next(iter(adapter.scalings.values())), bool(adapter.config.get("use_rslora"))
        rank = len(self.columns)
        alpha = alpha_for(scaling, rank, use_rslora=rslora) or scaling * (rank**0.5 if rslora else rank)
        self.settings = {"r": rank, "lora_alpha": alpha}

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return what remains of A or B."""
        if self.is_whole or not (".lora_A." in name or ".lora_B." in name):
            return tensor
        return (tensor[self.columns] if ".lora_A." in name else tensor[:, self.columns]).contiguous()

    def masks(self, masks: LoriMasks, before: Projection) -> LoriMasks:
        """Return the masks of a task that remains."""
        if self.is_whole:
            return masks
        own = self.projection if masks.projection == before else masks.projection
        entries = {path: mask[:, self.columns] for path, mask in masks.items()}
        return LoriMasks(entries, **vars(masks.metadata) | {"projection": own})

    def record(self, record: LoriRecord) -> LoriRecord:
        """Return the record with the counts, columns and A that remain."""
        if self.is_whole:
            return record
        rank, before = len(self.columns), sum(block.rank for block in record.projection.as_blocks(0))
        lora, lora_B = (count * rank // before for count in (record.counts.lora, record.counts.lora_B))
        return replace(
            record,
            projection=self.projection,
            counts=replace(record.counts, lora=lora, lora_B=lora_B),
            tasks=tuple(replace(each, columns=self._columns_of(each)) for each in record.tasks),
        )

    def _columns_of(self, task: TaskRecord) -> tuple[int, int] | None:
        first, last = task.columns or (0, int(self.columns[-1]) + 1)
        own = ((self.columns >= first) & (self.columns < last)).nonzero().flatten().tolist()
        return None if len(own) in (0, len(self.columns)) else (own[0], own[-1] + 1)


def _record_of_tasks(adapter: AdapterFolder) -> LoriRecord:
    record = adapter.record or read_record(adapter.folder)
    if record.merge is not None:
        raise ValueError(
            f"`{adapter.name}` is a merged adapter. The ledger is kept for adapters that learnt their tasks one after "
            "the other. Use the adapters that were merged."
        )
    if not record.tasks:
        raise ValueError(
            f"`{adapter.name}` holds no task with masks. An adapter has them once it is calibrated. Pass one that is."
        )
    return record


def _check_own(task: str, masks: Mapping[str, LoriMasks]) -> None:
    counts = {name: (masks[task] & other).num_selected for name, other in masks.items() if name != task}
    shared = [f"{count:,} with {name}" for name, count in counts.items() if count]
    if shared:
        raise ValueError(
            f"`task={task!r}` shares entries of B: {', '.join(shared)}. Their values come from both tasks and cannot "
            "be taken apart. Only disjoint tasks can: train with `disjoint_masks=True`."
        )
