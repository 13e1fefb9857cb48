"""Several tasks in one adapter: what is still free, who owns what, and taking one task out again."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .adapter import (
    CONFIG_NAME,
    PEFT_FILES,
    RUN_FACTS,
    plain_folder,
    read_lori_config,
    read_masks,
    staged,
    task_records,
    write_card,
)
from .heatmaps import draw_density
from .layers import module_path
from .masks import LoriMasks, check_header, pools
from .model_card import PICTURE_NAME
from .selection import num_to_select

_TOKENIZER_FILES = ("tokenizer", "chat_template", "special_tokens")


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
    """
    A task in the ledger of an adapter.

    Attributes:
        task (`str`): its name.
        trained (`int`): entries of B that its mask has.
        owned (`int`): those of them that no later task has trained again.
        record (`dict[str, Any]`): what `lori_config.json` says of its run: data, steps, calibration.
    """

    task: str
    trained: int
    owned: int
    record: dict[str, Any]


@dataclass(frozen=True)
class TaskLedger:
    """
    Who owns how much of an adapter's B.

    Attributes:
        tasks (`list[OwnedTask]`): oldest first.
        numel (`int`): entries of B.
        free (`int`): entries that no task has.
        sparsity (`float`): the newest task's, a fraction in [0, 1).
        more_tasks (`int`): how many more disjoint tasks of this sparsity fit.
    """

    tasks: list[OwnedTask]
    numel: int
    free: int
    sparsity: float
    more_tasks: int


def read_ledger(adapter: str | Path) -> TaskLedger:
    """
    Read who owns how much of an adapter's B.

    Args:
        adapter (`str` or `Path`): its folder, compact file or repository on the Hub.

    Raises: as [`load_lori_adapter`].
    """
    with plain_folder(adapter) as folder:
        config, masks = _read_tasks(folder)
    newest = masks[config["tasks"][-1]["task"]]
    free, owned = feasible_entries({path: mask.shape for path, mask in newest.items()}, {}), {}
    for task in reversed(masks):
        owned[task] = (masks[task] & free).num_selected
        free = free - masks[task]
    sparsity = 1 - newest.density if newest.sparsity is None else newest.sparsity
    return TaskLedger(
        tasks=[
            OwnedTask(record["task"], record["selected"], owned[record["task"]], record)
            for record in task_records(config)
        ],
        numel=free.numel,
        free=free.num_selected,
        sparsity=sparsity,
        more_tasks=tasks_that_fit(free, sparsity, newest.granularity),
    )


def extract_task(adapter: str | Path, task: str, output_dir: str | Path) -> None:
    """
    Write one task's own adapter: A, and of B the entries that this task trained.

    The extracted adapters of all tasks add up to the whole one's B, where every entry belongs to a task.

    Args:
        adapter (`str` or `Path`): the adapter with several tasks: its folder, compact file or repository on the Hub.
        task (`str`): which task.
        output_dir (`str` or `Path`): a new folder.

    Raises:
        `FileNotFoundError`: the adapter has no such task.
        `FileExistsError`: `output_dir` is not empty.
        `ValueError`: other tasks have trained entries of this one, so that its values are not its own.
    """
    _rewrite(adapter, task, output_dir, keep=lambda tasks: [task], change=lambda B, mask: B.masked_fill(~mask, 0))


def remove_task(adapter: str | Path, task: str, output_dir: str | Path) -> None:
    """
    Write an adapter without one of its tasks: this task's entries of B are 0 again, all others are bit-identical.

    For the newest task that is the adapter before it. The others were trained while this one was there, and do
    without it from now on.

    Args:
        adapter (`str` or `Path`): the adapter with several tasks: its folder, compact file or repository on the Hub.
        task (`str`): which task.
        output_dir (`str` or `Path`): a new folder.

    Raises: as [`extract_task`], and `ValueError` where it is the only task.
    """

    def others(tasks: list[str]) -> list[str]:
        if tasks == [task]:
            raise ValueError(
                f"`task={task!r}` is the only task of `{adapter}`. Another one must remain. To be rid of it, do "
                "without the adapter."
            )
        return [name for name in tasks if name != task]

    _rewrite(adapter, task, output_dir, keep=others, change=lambda B, mask: B.masked_fill(mask, 0))


def _rewrite(adapter, task, output_dir, *, keep, change) -> None:
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(
            f"`output_dir={output_dir}` is not empty. The changed adapter goes to a new folder, and the old one stays "
            "as it is. Pass another name."
        )
    with plain_folder(adapter) as folder:
        config, masks = _read_tasks(folder)
        if task not in masks:
            raise FileNotFoundError(
                f"`task={task!r}` is not in `{adapter}`. It has {', '.join(masks)}. Pass one of these."
            )
        _check_own(task, masks)
        kept = keep(list(masks))
        check_header(folder / PEFT_FILES[1])
        state = load_file(folder / PEFT_FILES[1])
        masks[task].check_shapes({module_path(name): B.shape for name, B in state.items() if ".lora_B." in name})
        state = {
            name: change(tensor, masks[task][module_path(name)]) if ".lora_B." in name else tensor
            for name, tensor in state.items()
        }
        remaining = {name: masks[name] for name in kept}
        config = _config_of(config, remaining)
        with staged(output_dir) as stage:
            for file in folder.iterdir():
                if file.name == PEFT_FILES[0] or file.name.startswith(_TOKENIZER_FILES):
                    shutil.copy(file, stage / file.name)
            save_file(state, stage / PEFT_FILES[1], metadata={"format": "pt"})
            for task_masks in remaining.values():
                task_masks.save_pretrained(stage)
            (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            draw_density(remaining, stage / PICTURE_NAME)
            write_card(stage, stage)


def _read_tasks(folder: Path) -> tuple[dict[str, Any], dict[str, LoriMasks]]:
    config = read_lori_config(folder)
    if config.get("merge"):
        raise ValueError(
            f"`{folder}` is a merged adapter. The ledger is kept for adapters that learnt their tasks one after the "
            "other. Use the adapters that were merged."
        )
    if not config["tasks"]:
        raise ValueError(
            f"`{folder}` holds no task with masks. An adapter has them once it is calibrated. Pass one that is."
        )
    return config, read_masks(folder, config)


def _check_own(task: str, masks: Mapping[str, LoriMasks]) -> None:
    shared = {name: (masks[task] & other).num_selected for name, other in masks.items() if name != task}
    shared = [f"{count:,} with {name}" for name, count in shared.items() if count]
    if shared:
        raise ValueError(
            f"`task={task!r}` shares entries of B: {', '.join(shared)}. Their values come from both tasks and cannot "
            "be taken apart. Only disjoint tasks can: train with `disjoint_masks=True`."
        )


def _config_of(config: Mapping[str, Any], masks: Mapping[str, LoriMasks]) -> dict[str, Any]:
    """Describe an adapter that has only these of its tasks left."""
    task, newest = list(masks.items())[-1]
    records = [record for record in task_records(config) if record["task"] in masks]
    facts = {name: records[-1].get(name) for name in RUN_FACTS}
    records[-1] = {name: value for name, value in records[-1].items() if name not in RUN_FACTS}
    return {
        **config,
        "task": task,
        "variant": "LoRI-D" if newest.sparsity == 0 else "LoRI-S",
        "sparsity": newest.sparsity,
        "granularity": newest.granularity,
        "threshold": newest.threshold,
        **facts,
        "counts": {**config["counts"], "selected": newest.num_selected},
        "tasks": records,
    }
