"""The model card: facts gathered while training in, one template, a README.md and its picture out."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from trl.data_utils import is_conversational

from .adapter.facts import BaseModel, Losses, Scalar, Training, TrainingData
from .adapter.layout import EVAL_RESULTS_NAME, PICTURE_NAME
from .adapter.record import LoriRecord
from .adapter.typed import plain
from .masks import LoriMasks
from .package import install_command
from .recipes import shipped_folder
from .rows import fingerprint_rows
from .vllm import max_lora_rank

GENERATED = "<!-- Written by lori_trl. Delete this line to keep changes of your own. -->"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_OF_ADAPTERS = re.compile(r"\.(lora_|modules_to_save\.|trainable_tokens_)")
_MAX_LOSSES = 20  # rows of the card's table
_NOT_THE_MODELS = {"majority_baseline"}  # results to compare with: in the card's table, not in its model-index

# What decides the outcome of a run. Names of folders, of the Hub and of logging services are not among them.
_HYPERPARAMETERS = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio num_train_epochs max_steps
    per_device_train_batch_size gradient_accumulation_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon
    max_grad_norm label_smoothing_factor neftune_noise_alpha seed data_seed bf16 fp16 activation_checkpointing
    max_length packing completion_only_loss assistant_only_loss loss_type average_tokens_across_devices
    sparsity mask_granularity disjoint_masks calibration_method calibration_learning_rate
    calibration_num_train_epochs calibration_max_steps calibration_fraction calibration_lr_scheduler_type
    calibration_warmup_steps projection_init sparse_backend
""".split()


class CardFacts(TrainerCallback):
    """
    Gather what a card says of a run, while it runs.

    Args:
        model (`PreTrainedModel`): the base model.
        rows (`Dataset` or `IterableDataset`): the training data as they were given.
        tags (`Sequence[str]`): the trainer's.

    Attributes:
        training ([`Training`]): the facts so far.
    """

    def __init__(self, model: PreTrainedModel, rows: Dataset | IterableDataset, tags: Sequence[str]):
        self.training = Training(
            base_model=_base_model_facts(model),
            dataset=_dataset_facts(rows),
            tags=tuple(tag for tag in tags if tag not in ("trl", "lori")),
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = replace(
            self.training,
            hyperparameters=hyperparameters(args),
            world_size=args.world_size,
            device=_device_name(args.device),
        )
        base_model = self.training.base_model
        base_id = base_model.id if base_model is not None else None
        if base_id is not None and self.training.license is None and state.is_world_process_zero:
            self.training = replace(self.training, license=_license_of(base_id))

    def on_log(self, args, state, control, logs, **kwargs):
        if any(name.startswith("calibration_") for name in logs):
            return  # a card tells of the adaptation
        self.training = replace(
            self.training,
            steps=state.global_step,
            epochs=round(state.epoch or 0, 2),
            losses=_losses(state.log_history),
        )

    def name_dataset(self, dataset_name: str | None) -> None:
        """Note the data set's Hub name, as TRL's `push_to_hub(dataset_name=...)` gives it."""
        dataset = self.training.dataset
        if dataset is not None and _hub_id(dataset_name) is not None:
            self.training = replace(self.training, dataset=replace(dataset, id=dataset_name))


def hyperparameters(args: TrainingArguments) -> dict[str, Scalar]:
    """Return what of the arguments decides the outcome of a run and differs from its default."""
    defaults = {field.name: field.default for field in fields(args) if field.default is not MISSING}
    values = {name: vars(args)[name] for name in _HYPERPARAMETERS if name in vars(args)}
    return {
        name: value.value if hasattr(value, "value") else value
        for name, value in values.items()
        if value != defaults.get(name) and isinstance(value, (bool, int, float, str))
    }


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
    on_record = facts.base_model.id if facts.base_model else _hub_id(adapter_config.get("base_model_name_or_path"))
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


def _hub_id(name: str | None) -> str | None:
    """Return a base model's Hub name; None for a local folder and for a model made in memory."""
    return None if not name or Path(name).exists() else _valid(name)


def _target_names(target_modules: str | Sequence[str]) -> str:
    """Name the target modules by the last parts of their paths."""
    if isinstance(target_modules, str):
        return target_modules
    return ", ".join(sorted({name.rpartition(".")[2] for name in target_modules}))


def _max_rank_of(adapter_config: Mapping[str, Any]) -> int | None:
    """Return vLLM's `--max-lora-rank` for an adapter; None if it is one that vLLM does not read."""
    if adapter_config.get("rank_pattern") or adapter_config.get("alpha_pattern"):
        return None
    rank = adapter_config["r"]
    return max_lora_rank(rank) if isinstance(rank, int) else None


def _base_model_facts(model: PreTrainedModel) -> BaseModel:
    name = model.config.name_or_path
    return BaseModel(
        id=_hub_id(name),
        name=Path(name).name or None,  # of a local folder, not where it lies
        architecture=type(model).__name__,
        parameters=sum(weight.numel() for path, weight in model.named_parameters() if not _OF_ADAPTERS.search(path)),
    )


def _dataset_facts(rows: Dataset | IterableDataset) -> TrainingData:
    sources = [re.match(r"hf://datasets/([^@]+)@", url) for url in rows.info.download_checksums or {}]
    known = isinstance(rows, Dataset)
    return TrainingData(
        id=next((source[1] for source in sources if source), None),
        rows=len(rows) if known else None,
        conversational=is_conversational(rows[0]) if known and len(rows) else False,
        fingerprint=fingerprint_rows(rows),
    )


def _license_of(base_model: str) -> str | None:
    """Ask the Hub for the base model's licence; None where it does not answer."""
    try:
        card_data = HfApi().model_info(base_model, timeout=5).card_data
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, ValueError):
        return None
    return card_data.license if card_data is not None and isinstance(card_data.license, str) else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _losses(log_history: Sequence[Mapping[str, Any]]) -> tuple[Losses, ...]:
    """Take the losses from the Trainer's log: those of every step, thinned to a short table."""
    rows: dict[int, Losses] = {}
    for entry in log_history:
        for name in ("loss", "eval_loss"):
            if name in entry:
                row = rows.get(entry["step"], Losses(entry["step"], None, None))
                rows[row.step] = replace(row, **{name: round(entry[name], 4)})
    losses = [rows[step] for step in sorted(rows)]
    if len(losses) > _MAX_LOSSES:
        losses = [losses[round(i * (len(losses) - 1) / (_MAX_LOSSES - 1))] for i in range(_MAX_LOSSES)]
    return tuple(losses)


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
