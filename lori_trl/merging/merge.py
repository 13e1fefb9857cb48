"""Several adapters into one, from their files: matrix by matrix, without the base model."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..adapter import CONFIG_NAME, FORMAT_VERSION, PEFT_FILES, RECIPE_NAME, staged, task_records, write_card
from ..adapter_file import AdapterFile, read_modules
from ..download import hash_file
from ..model_card import PICTURE_NAME
from ..projections import Fingerprint
from ..streaming import SafetensorsWriter
from .checks import Independence, check_dtypes, checked_weights
from .plan import Plan, common_value, open_plan


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
            How the weights were found, to note in `lori_config.json`: a [`~merging.search.Search`]'s `record`.

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
        weights = checked_weights(weights, len(sources))
        check_dtypes(sources)
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
            plan.adapter_config().save_pretrained(stage)
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
    independence, taken, anything = Independence(), Fingerprint(), False
    compared = {*plan.paths[:: -(-len(plan.paths) // Independence.MODULES)]}
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


def _task(source: AdapterFile) -> str:
    """Return the task's name; that of the folder or repository where the adapter is plain LoRA."""
    if source.lori_config is not None:
        return source.lori_config["task"]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.title).name).lstrip("._-")[:96] or "lora"


def _hashes(source: AdapterFile) -> dict[str, str]:
    """Return the SHA-256 of its files."""
    names = [*PEFT_FILES, *([CONFIG_NAME] if source.lori_config is not None else [])]
    return {name: hash_file(source.folder / name, lfs=True) for name in names}


def _tasks(sources: Sequence[AdapterFile]) -> dict[str, dict[str, Any]]:
    """Return the record of every task that has masks, in the order of the adapters, oldest first."""
    records: dict[str, dict[str, Any]] = {}
    for source in sources:
        for record in task_records(source.lori_config) if source.lori_config is not None else []:
            records.setdefault(record["task"], record)
    return records


def _lori_config(plan: Plan, projection: dict[str, Any], tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """What `lori_config.json` says of every adapter; of a merged one, much is unknown."""
    lora_A, lora_B = (plan.rank * sum(shape[side] for shape in plan.shapes.values()) for side in (1, 0))
    training = [(source.lori_config or {}).get("training") or {} for source in plan.sources]
    base_models = [facts["base_model"] for facts in training if facts.get("base_model")]
    return {
        "format_version": FORMAT_VERSION,
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
            "license": common_value([facts.get("license") for facts in training]),
        },
        "versions": {name: version(name) for name in ("lori_trl", "peft", "torch", "safetensors")},
    }
