"""From a cell to its figures."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lori_trl import LoriMasks, merge_lori_adapters
from lori_trl.compact import expand, export_compact
from lori_trl.evaluation import completion_loss, is_refusal
from lori_trl.evaluation.harness import BENIGN_FILE
from lori_trl.recipes.raw_rows import alpaca_prompt

from .cells import SALIENCIES, SNAPSHOTS, STEPS, Base, Cell, Gradients, Held, Merge, Overlaps, Refusals, Rounded, Train
from .data import Rows, tokenizer
from .model import generate
from .store import Figures
from .training import Folder, base_model, take_gradients, train

REQUESTS = 24  # harmful ones and harmless ones, each


def measure(cell: Cell, rows: Rows, folder: Folder) -> Figures:
    """Run a cell. Its files, if other cells need any, are then in its folder."""
    kinds: dict[type, Callable[[Any, Rows, Folder], Figures]] = {
        Base: lambda cell, rows, _: _losses(base_model(), rows, cell.task),
        Train: _train,
        Gradients: lambda cell, rows, folder: take_gradients(cell, rows, folder) or {},
        Overlaps: _overlaps,
        Merge: _merge,
        Held: _held,
        Refusals: _refusals,
        Rounded: _rounded,
    }
    return kinds[type(cell)](cell, rows, folder)


def _losses(model: PreTrainedModel, rows: Rows, task: str) -> Figures:
    """Measure the loss on a task's test rows, in nats a completion token."""
    test = completion_loss(model, tokenizer(), rows.test(task))
    return {"loss": test.loss, "loss_stderr": test.stderr}


def _dev_loss(model: PreTrainedModel, rows: Rows, task: str) -> Figures:
    """Measure the loss on the rows to choose by."""
    return {"dev_loss": completion_loss(model, tokenizer(), rows.dev(task)).loss}


def _train(cell: Train, rows: Rows, folder: Folder) -> Figures:
    model = train(cell, rows, folder)
    return _losses(model, rows, cell.task) | (_dev_loss(model, rows, cell.task) if cell.seed == 0 else {})


def _overlaps(cell: Overlaps, rows: Rows, folder: Folder) -> Figures:
    dense, gradients = (folder(need) / "masks_on_the_way" / "masks" for need in cell.needs)
    read = LoriMasks.from_pretrained
    full = read(dense / f"train-{STEPS}.safetensors")
    files = {f"train-{steps}": dense for steps in SNAPSHOTS[:-1]}
    counts = [count for count in SNAPSHOTS if count <= cell.batches]
    files |= {f"{saliency}-{count}": gradients for saliency in SALIENCIES for count in counts}
    return {name: full.overlap(read(place / f"{name}.safetensors")) for name, place in files.items()}


def _merge(cell: Merge, rows: Rows, folder: Folder) -> Figures:
    adapters = [folder(adapter) for adapter in cell.adapters]
    merged = folder(cell) / "merged"
    merge_lori_adapters(adapters, weights=[cell.weight] * len(adapters), method=cell.how, output_dir=merged)
    model = _with_adapter(merged)
    measure_on = {"test": _losses, "dev": _dev_loss}[cell.rows]
    return {adapter.task: measure_on(model, rows, adapter.task) for adapter in cell.adapters}


def _held(cell: Held, rows: Rows, folder: Folder) -> Figures:
    model = _with_adapter(_adapter(cell.of, folder))
    return {task: _losses(model, rows, task) for task in cell.tasks}


def _refusals(cell: Refusals, rows: Rows, folder: Folder) -> Figures:
    model = base_model() if cell.of is None else _with_adapter(_adapter(cell.of, folder))
    lines = BENIGN_FILE.read_text(encoding="utf-8").splitlines()[:REQUESTS]
    prompts = {
        "harmful": [row["prompt"] for row in rows.harmful()[:REQUESTS]],
        "harmless": [alpaca_prompt(json.loads(line)["instruction"]) for line in lines],
    }
    own = copy.deepcopy(tokenizer())  # it is set to pad on the left
    answers = {name: generate(model, own, asked, name, 24) for name, asked in prompts.items()}
    return {name: sum(map(is_refusal, given)) / len(given) for name, given in answers.items()} | {"of": REQUESTS}


def _rounded(cell: Rounded, rows: Rows, folder: Folder) -> Figures:
    dtype = getattr(torch, cell.dtype) if cell.dtype else None
    file = export_compact(folder(cell.of), folder(cell) / "adapter.safetensors", dtype=dtype)
    expand(file, folder(cell) / "expanded")
    return _losses(_with_adapter(folder(cell) / "expanded"), rows, cell.of.task) | {"bytes": file.stat().st_size}


def _adapter(cell: Train | Merge, folder: Folder) -> Path:
    return folder(cell) / "merged" if isinstance(cell, Merge) else folder(cell)


def _with_adapter(adapter: Path) -> PreTrainedModel:
    return PeftModel.from_pretrained(base_model(), adapter).merge_and_unload()
