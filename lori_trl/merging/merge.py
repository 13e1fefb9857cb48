"""Several adapters into one, from their files: matrix by matrix, without the base model."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.folder import AdapterFolder, read_modules
from ..adapter.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_FILES, RECORD_NAME
from ..adapter.record import LoriRecord
from ..adapter.record_fields import Counts, Independence, Merge, MergedAdapter, TaskRecord
from ..adapter.safetensors import SafetensorsWriter
from ..adapter.vllm_limits import DEFAULT_MAX_RANK, max_lora_rank
from ..adapter.write import check_output, complete, staged
from ..hub.download import hash_file
from ..inputs.files import copy_files
from ..method.layers import tensor_name
from ..method.projections import Fingerprint, Projection
from .checks import IndependenceOfA, check_dtypes, checked_weights
from .methods import RANDOM
from .plan import Plan, open_plan

logger = logging.getLogger(__name__)


def merge_lori_adapters(
    adapters: Sequence[str | Path],
    weights: float | Sequence[float] | None = None,
    method: str = "concat",
    output_dir: str | Path = "merged-lori",
    *,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    base_model: str | None = None,
    token: str | None = None,
    search: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    allow_modified: bool = False,
) -> Path:
    """
    Merge adapters into one, from their files: matrix by matrix, without the base model.

    The result is a plain PEFT adapter in float32 with one rank and one alpha, so that PEFT and vLLM load it, with the
    recipe of the merge, the inputs' hashes, the masks of every task, a card, and the inputs' tokenizer, if those that
    bring one bring the same, beside it.

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
            paper's tables. `"magnitude"` (PEFT's `magnitude_prune`), `"ties"`, `"dare"` (`dare_linear`) and
            `"dare_ties"` prune A and B first. `"svd"` brings the weighted sum of the deltas down to `rank`; its B is
            dense and belongs to no task, so the merged adapter has no masks.
        output_dir (`str` or `Path`, *optional*, defaults to `"merged-lori"`): where to; written whole or not at all.
        density (`float`, *optional*): the share of A and of B that the pruning methods keep, in (0, 1].
        rank (`int`, *optional*): what `svd` is to leave; by default the highest rank of the adapters.
        seed (`int`, *optional*, defaults to 0): of `dare` and `dare_ties`, as PEFT after `torch.manual_seed(seed)`.
        base_model (`str`, *optional*): what to record as the base model, where the adapters name different ones.
        token (`str`, *optional*): a token that may read the repositories; by default that of `hf auth login`.
        search (`Mapping[str, Any]`, *optional*):
            How the weights were found, to note in `lori_config.json`: a [`~merging.search.Search`]'s `record`.

        overwrite (`bool`, *optional*, defaults to `False`): whether an adapter in `output_dir` may be replaced.
        allow_modified (`bool`, *optional*, defaults to `False`): as of [`load_lori_adapter`].

    Returns:
        `Path`: `output_dir`.

    Raises:
        `FileNotFoundError`: an adapter does not exist or lacks a file.
        `FileExistsError`: `output_dir` holds an adapter.
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
    settings: dict[str, Any] = {"density": density, "rank": rank, "seed": seed, "base_model": base_model}
    with open_plan(adapters, method, **settings, token=token, allow_modified=allow_modified) as plan:
        weights = checked_weights(weights, len(plan.sources))
        check_output(output_dir, [*map(str, adapters)], overwrite=overwrite)
        check_dtypes(plan.sources)
        _warn_of_rank(plan)
        with staged(output_dir) as stage, ThreadPoolExecutor(1) as pool:
            hashes = [pool.submit(_hashes, source) for source in plan.sources]
            projection, tensors, independence = _write_factors(plan, weights, stage / ADAPTER_WEIGHTS)
            plan.adapter_config().save_pretrained(stage)
            copy_files(plan.tokenizer, stage)
            merge = Merge(
                method=method,
                adapters=_merged_adapters(plan, weights, [future.result() for future in hashes]),
                density=density,
                seed=seed if method in RANDOM else None,
                search=None if search is None else dict(search),
                independence=tuple(independence),
                lost=dict(plan.lost) if method == "svd" else None,
            )
            masks, tasks = None, []
            for task in _tasks(plan.sources) if method != "svd" else ():
                masks = plan.mask(task.task)
                if method == "concat":
                    masks.projection = projection
                masks.save_pretrained(stage)  # one after the other: four of Llama-3-8B would be 0.7 GB in memory
                tasks.append(replace(task, selected=masks.num_selected, columns=None))
            records = [source.record for source in plan.sources]
            record = LoriRecord.merged(
                projection=projection, counts=_counts(plan), tasks=tasks, sources=records, merge=merge
            )
            recipe = {"adapters": [source.name for source in plan.sources], "weights": weights, "method": method}
            recipe |= {"density": density} if density is not None else {}
            recipe |= {"rank": plan.rank} if method == "svd" else {}
            recipe |= {"seed": seed} if method in RANDOM else {}
            recipe |= {"base_model": base_model} if base_model is not None else {}
            complete(stage, record, masks, recipe=recipe, tensors=tensors, beside=output_dir)
            check_output(output_dir, overwrite=overwrite)  # another process may have been faster
    return output_dir


def _write_factors(
    plan: Plan, weights: Sequence[float], file: Path
) -> tuple[Projection, dict[str, str], list[Independence]]:
    """Merge all modules into a file. Returns the merged A, the tensors' hashes, how independent the A were."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (rows, columns) in plan.shapes.items():
        shapes |= {tensor_name(path, "lora_A"): (plan.rank, columns), tensor_name(path, "lora_B"): (rows, plan.rank)}
    independence, taken, anything = IndependenceOfA(), Fingerprint(), False
    compared = {*plan.paths[:: -(-len(plan.paths) // IndependenceOfA.MODULES)]}
    with SafetensorsWriter(file, shapes, {"format": "pt"}) as writer, ThreadPoolExecutor(1) as pool:
        behind = pool.submit(lambda: None)
        for path, factors in read_modules(plan.sources, plan.paths, torch.float32):
            if path in compared:
                independence.add(factors)
            A, B = plan.merge(path, factors, weights)
            check_finite(path, A, B, weights)
            anything = anything or bool(B.any())
            behind.result()  # one module at a time waits for being written
            behind = pool.submit(_store, writer, taken, path, A, B)
        behind.result()
    if not anything:
        raise ValueError(
            f"The merge of {', '.join(f'`{source.title}`' for source in plan.sources)} is empty: every entry of its B "
            "is 0, so it would change no weight of the base model. At least one trained adapter is needed. Check the "
            "adapters, the weights and the density."
        )
    known = {source.record.projection for source in plan.sources if source.record is not None}
    merged_A = Projection(None, None, str(taken))
    projection = next((each for each in known if each.fingerprint == merged_A.fingerprint), merged_A)
    return projection, writer.hashes, independence.report(plan.sources)


def check_finite(path: str, A: Tensor, B: Tensor, weights: Sequence[float]) -> None:
    """Raise `ValueError` if an entry of a module's merged factors is not finite."""
    if A.sum().isfinite() and B.sum().isfinite():
        return  # a sum of which one term is not finite is not either
    if count := sum(tensor.numel() - int(tensor.isfinite().sum()) for tensor in (A, B)):
        raise ValueError(
            f"`weights={list(weights)}` give A or B of {path} {count:,} entries that are not finite. They must lie "
            "within float32, up to 3.4e38. Pass smaller weights: the paper's are 0.3 to 0.5."
        )


def _store(writer: SafetensorsWriter, taken: Fingerprint, path: str, A: Tensor, B: Tensor) -> None:
    for part, tensor in (("lora_A", A), ("lora_B", B)):
        writer.write(tensor_name(path, part), tensor)
    taken.add(path, A)


def _warn_of_rank(plan: Plan) -> None:
    if plan.rank <= DEFAULT_MAX_RANK:
        return
    needed = max_lora_rank(plan.rank)
    logger.warning(
        f"The merged adapter has rank {plan.rank}, and vLLM takes ranks up to {DEFAULT_MAX_RANK} unless it is told "
        + (f"otherwise. Serve it with `--max-lora-rank {needed}`" if needed else "otherwise, and none as high as this")
        + (", or merge by `svd`, which keeps the rank you name." if plan.method == "concat" else ".")
    )


def _merged_adapters(
    plan: Plan, weights: Sequence[float], hashes: Sequence[dict[str, str]]
) -> tuple[MergedAdapter, ...]:
    return tuple(
        MergedAdapter(source.task, weight, source.title, source.rank, offset, files)
        for source, weight, offset, files in zip(plan.sources, weights, plan.offsets, hashes, strict=True)
    )


def _hashes(source: AdapterFolder) -> dict[str, str]:
    """Return the SHA-256 of its files; a record holds those of the matrices, which are checked as they are read."""
    names = PEFT_FILES if source.record is None else (ADAPTER_CONFIG, RECORD_NAME)
    return {name: hash_file(source.folder / name, lfs=True) for name in names}


def _tasks(sources: Sequence[AdapterFolder]) -> list[TaskRecord]:
    """Return the record of every task that has masks, in the order of the adapters, oldest first."""
    records: dict[str, TaskRecord] = {}
    for source in sources:
        for task in source.record.history if source.record is not None else []:
            records.setdefault(task.task, task)
    return list(records.values())


def _counts(plan: Plan) -> Counts:
    lora_A, lora_B = (plan.rank * sum(shape[side] for shape in plan.shapes.values()) for side in (1, 0))
    return Counts(lora_A + lora_B, lora_B, None)
