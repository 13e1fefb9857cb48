"""The model card: facts in, one template, a README.md and its picture out."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..inputs.typed_values import plain
from ..recipes.find import shipped_folder
from .layout import EVAL_RESULTS_NAME, PICTURE_NAME
from .masks import LoriMasks
from .record import LoriRecord
from .record_fields import Training
from .vllm_limits import max_lora_rank

GENERATED = "<!-- Written by lori_trl. Delete this line to keep changes of your own. -->"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_NOT_THE_MODELS = {"majority_baseline"}  # results to compare with: in the card's table, not in its model-index


def read_or_render_card(existing: Path, record: LoriRecord, *arguments: Any, **keywords: Any) -> str:
    """Return a card that was edited by hand, else a new one. Args: as of [`render_model_card`]."""
    if existing.is_file():
        text = existing.read_text(encoding="utf-8")
        if GENERATED not in text:
            return text
    return render_model_card(record, *arguments, **keywords)


def render_model_card(
    record: LoriRecord,
    adapter_config: Mapping[str, Any],
    masks: LoriMasks | None,
    *,
    eval_results: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    forms: Sequence[str] = ("peft",),
    recipe: bool = False,
    picture: bool = False,
    tokenizer: bool = False,
) -> str:
    """
    Render an adapter's card.

    Args:
        record ([`LoriRecord`]): the contents of `lori_config.json`.
        adapter_config (`Mapping[str, Any]`): the contents of PEFT's `adapter_config.json`.
        masks ([`LoriMasks`] or `None`): those of the newest task.
        eval_results (`Mapping[str, Any]`, *optional*): the contents of `eval_results.json`:
            `{"format_version": 1, "results": [{"task": "gsm8k", "metric": "accuracy", "value": 0.63}]}`; a result may
            also have `stderr`, in the value's unit, and `dataset`, a Hub name.
        repo_id (`str`, *optional*): where the adapter is on the Hub.
        forms (`Sequence[str]`, *optional*, defaults to `("peft",)`): what is there: `"peft"`, `"compact"` or both.
        recipe (`bool`, *optional*, defaults to `False`): whether there is a `recipe.yaml` beside it.
        picture (`bool`, *optional*, defaults to `False`): whether there is a picture beside it.
        tokenizer (`bool`, *optional*, defaults to `False`): whether its own tokenizer is beside it.

    Returns:
        `str`: the card, with metadata that the Hub accepts. Names from outside reach it only as plain text.

    Raises:
        `ValueError`: a result or a fact is not of its form.
    """
    facts = record.training or Training(base_model=None)
    on_record = facts.base_model.id if facts.base_model else hub_id(adapter_config.get("base_model_name_or_path"))
    base_model = _valid(on_record)
    dataset = _valid(facts.dataset.id if facts.dataset else None)
    license = facts.license if re.fullmatch(r"[a-z0-9.-]+", str(facts.license)) else None
    results = _checked_results(eval_results)
    own_results = [result for result in results if result["metric"] not in _NOT_THE_MODELS]
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        datasets=[dataset] if dataset else None,
        library_name="peft",
        license=license,
        pipeline_tag="text-generation",
        tags=[
            "lori",
            "lora",
            "peft",
            "trl",
            *_plain(facts.tags or ()),
            *(["merged"] if record.merge else []),
        ],
        model_name=repo_id or record.task,
        eval_results=[_model_index_entry(result) for result in own_results] or None,
    )
    if not own_results:
        data.model_name = None  # a name belongs to the model-index only
    card = ModelCard.from_template(
        data,
        template_path=shipped_folder("model_cards") / "lori_adapter.md.jinja",
        generated=GENERATED,
        base_model=base_model,
        dataset=dataset,
        repo_id=repo_id,
        forms=list(forms),
        recipe=recipe,
        picture=PICTURE_NAME if picture else None,
        tokenizer=tokenizer,
        install=install_command(),
        max_rank=_max_rank_of(adapter_config),
        results=_plain(results),
        facts=_plain({"losses": (), **plain(facts)}),
        lora=_plain(dict(adapter_config)),
        targets=_plain(_target_names(adapter_config["target_modules"])),
        by_projection=_plain(masks.by_projection()) if masks is not None else {},
        **_plain({"merge": None, **plain(record), "training": None, "tensors": None}),
    )
    return f"{str(card).rstrip()}\n"


def hub_id(name: str | None) -> str | None:
    """Return a base model's Hub name; None for a local folder and for a model made in memory."""
    return None if not name or Path(name).exists() else _valid(name)


def _plain(value: Any) -> Any:
    """Reduce every text in a value to characters that mean nothing in Markdown, HTML and YAML; round floats."""
    if isinstance(value, str):
        return re.sub(r"[^\w .,:;+@/=%()'-]", "", " ".join(value.split()))[:200]
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set) else value)]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _valid(repo_id: str | None) -> str | None:
    return repo_id if isinstance(repo_id, str) and _REPO_ID.fullmatch(repo_id) else None


def _target_names(target_modules: str | Sequence[str]) -> str:
    """Name the target modules by the last parts of their paths."""
    if isinstance(target_modules, str):
        return target_modules
    return ", ".join(sorted({name.rpartition(".")[2] for name in target_modules}))


def _max_rank_of(adapter_config: Mapping[str, Any]) -> int | None:
    """Return vLLM's `--max-lora-rank` for an adapter; None for one that not every release of vLLM reads rightly."""
    if any(adapter_config.get(name) for name in ("rank_pattern", "alpha_pattern", "modules_to_save")):
        return None
    rank = adapter_config["r"]
    return max_lora_rank(rank) if isinstance(rank, int) else None


def _checked_results(eval_results: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if eval_results is None:
        return []
    try:
        results = [
            {
                "task": str(result["task"]),
                "metric": str(result["metric"]),
                "value": float(result["value"]),
                "stderr": None if result.get("stderr") is None else float(result["stderr"]),
                "dataset": result.get("dataset"),
            }
            for result in eval_results["results"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        form = {"format_version": 1, "results": [{"task": "gsm8k", "metric": "accuracy", "value": 0.5}]}
        raise ValueError(
            f"`{EVAL_RESULTS_NAME}` is not of its form ({error!r}). It is e.g. {json.dumps(form)}. Correct it."
        ) from error
    return results


def _model_index_entry(result: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=_valid(result["dataset"]) or _plain(result["task"]),
        dataset_name=_plain(result["task"]),
        metric_type=_plain(result["metric"]),
        metric_value=result["value"],
    )


def install_command() -> str | None:
    """
    Return the command that installs the package from its repository, as `[project.urls]` of pyproject.toml names it;
    `None` in a source tree that is not installed.
    """
    try:
        urls = dict(line.split(", ", 1) for line in metadata("lori-trl").get_all("Project-URL", []))
    except PackageNotFoundError:
        return None
    return f"pip install git+{urls['Repository']}" if "Repository" in urls else None
