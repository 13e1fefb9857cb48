"""Several tasks in one adapter: what is still free, who owns what, and taking one task out again."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from .method.layers import module_path, pools
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
    record: TaskRecord  # what is known of its run: data, steps, calibration


@dataclass(frozen=True)
class TaskLedger:
    """Who owns how much of an adapter's B."""

    tasks: list[OwnedTask]  # oldest first
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
        record, masks = _record_of_tasks(opened), opened.masks
    newest = masks[record.tasks[-1].task]
    free, owned = feasible_entries({path: mask.shape for path, mask in newest.items()}, {}), {}
    for task in reversed(masks):
        owned[task] = (masks[task] & free).num_selected
        free = free - masks[task]
    sparsity = 1 - newest.density if newest.sparsity is None else newest.sparsity
    return TaskLedger(
        tasks=[OwnedTask(task.task, task.selected, owned[task.task], task) for task in record.history],
        numel=free.numel,
        free=free.num_selected,
        sparsity=sparsity,
        more_tasks=tasks_that_fit(free, sparsity, newest.granularity),
    )


def extract_task(adapter: str | Path, task: str, output_dir: str | Path, *, allow_modified: bool = False) -> None:
    """
    Write one task's own adapter: A, and of B the entries that this task trained.

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
        _rewrite(opened, [task], output_dir, lambda B, mask: B.masked_fill(~mask, 0), opened.masks[task])


def remove_task(adapter: str | Path, task: str, output_dir: str | Path, *, allow_modified: bool = False) -> None:
    """
    Write an adapter without one of its tasks: this task's entries of B are 0 again, all others are bit-identical.

    For the newest task that is the adapter before it. The others were trained while this one was there, and do
    without it from now on.

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
        _rewrite(opened, others, output_dir, lambda B, mask: B.masked_fill(mask, 0), opened.masks[task])


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
    adapter: AdapterFolder,
    tasks: Sequence[str],
    output_dir: str | Path,
    change: Callable[[Tensor, Tensor], Tensor],
    mask: LoriMasks,
) -> None:
    """Write an adapter with some of its tasks, B changed by what a task's mask says."""
    contents, masks = adapter.contents(), {name: adapter.masks[name] for name in tasks}
    state = {
        name: change(tensor, mask[module_path(name)]) if ".lora_B." in name else tensor
        for name, tensor in contents.tensors.items()
    }
    newest = masks[tasks[-1]]
    record = contents.record.keeping(
        tasks,
        sparsity=newest.sparsity,
        granularity=newest.granularity,
        threshold=newest.threshold,
        selected=newest.num_selected,
    )
    with staged(output_dir) as stage:
        shutil.copy(adapter.folder / ADAPTER_CONFIG, stage / ADAPTER_CONFIG)
        copy_files(adapter.tokenizer, stage)
        save_file(state, stage / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        for task_masks in masks.values():
            task_masks.save_pretrained(stage)
        complete(stage, record, newest)
        check_output(output_dir)  # another process may have been faster


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
