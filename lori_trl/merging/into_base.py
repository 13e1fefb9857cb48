"""Adapters into their base model: a whole model of its own, written file by file of the base's."""

import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, ModelCard, ModelCardData
from rich.progress import Progress
from safetensors import safe_open
from torch import Tensor

from ..adapter.card import GENERATED, hub_id, install_command
from ..adapter.folder import read_modules
from ..adapter.layout import CARD_NAME, MAX_JSON_BYTES, is_tokenizers
from ..adapter.safetensors import DTYPES, SafetensorsWriter, opened
from ..adapter.write import check_output
from ..hub.commit import push_files, refuse_tokens
from ..hub.download import fetch_from_hub, is_repo_id
from ..inputs.files import read_json, remove_left_over, room_for, sole_writer
from ..recipes.find import shipped_folder
from .checks import checked_weights
from .merge import check_finite
from .plan import Plan, open_plan

logger = logging.getLogger(__name__)

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = ("F32", "BF16", "F16")
_MAX_TABLE_BYTES = 100_000_000  # an index of 10,000 tensors has 1 MB, a vocabulary of 262,144 tokens 33 MB


def merge_into_base(
    adapters: Sequence[str | Path],
    weights: float | Sequence[float] | None = None,
    method: str = "concat",
    output_dir: str | Path = "merged-model",
    *,
    base_model: str | None = None,
    dtype: str | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    token: str | None = None,
    overwrite: bool = False,
    allow_modified: bool = False,
) -> Path:
    """
    Write a whole model: the base with adapters added to its weights. It needs neither PEFT nor `lori_trl`.

    The base's files are read one after another. Each changed matrix is computed in float32 and rounded once, to the
    dtype that it has in the base; every other tensor is copied bit for bit. In memory are one matrix and its factors.

    Args:
        adapters (`Sequence[str]`): folders, compact files or repositories on the Hub, of LoRI or plain LoRA.
        weights, method, density, rank, seed, token: as of [`merge_lori_adapters`]; one adapter has weight 1.
        output_dir (`str` or `Path`, *optional*, defaults to `"merged-model"`):
            Where to; written whole or not at all.
        base_model (`str`, *optional*):
            The base in full precision, a folder or a name on the Hub; by default the one that the adapters name.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; by default what each tensor has.
        overwrite (`bool`, *optional*, defaults to `False`): whether a model that this function wrote may be replaced.
        allow_modified (`bool`, *optional*, defaults to `False`): as of [`load_lori_adapter`].

    Returns:
        `Path`: `output_dir`.

    Raises:
        `FileNotFoundError`: an adapter or the base does not exist, or not in safetensors.
        `FileExistsError`: `output_dir` is not empty.
        `ValueError`: the base is quantized, is not the adapters', ties a matrix that they change, or a matrix would
            stay as it is; or as of [`merge_lori_adapters`].

    Source: paper eq. 1 and 4: W + alpha / rank * B A, of several adapters the weighted sum.

    ```python
    merge_into_base(["code-lori-s"], output_dir="code-model")
    ```
    """
    output_dir = Path(output_dir)
    settings: dict[str, Any] = {"density": density, "rank": rank, "seed": seed, "base_model": base_model}
    with open_plan(adapters, method, **settings, token=token, allow_modified=allow_modified) as plan:
        weights = checked_weights(weights, len(plan.sources))
        base = _Base(_find_base(plan, base_model, token), plan)
        check_output(output_dir, [*map(str, adapters), base.folder], overwrite=overwrite)
        with _whole_folder(output_dir, overwrite=overwrite) as stage:
            _write_weights(base, plan, weights, getattr(torch, dtype) if dtype else None, stage)
            _copy_the_rest(base, plan, dtype, stage)
            (stage / CARD_NAME).write_text(_card(base, plan, weights, dtype), encoding="utf-8")
    return output_dir


def push_model(
    folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> CommitInfo:
    """
    Push a model that [`merge_into_base`] wrote, in one commit.

    Args:
        folder (`str` or `Path`): the model's folder.
        repo_id, private, token: as of [`push_lori_to_hub`].

    Raises: as [`push_lori_to_hub`].
    """
    names = [file.relative_to(folder).as_posix() for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    files = {name: Path(folder, name) for name in names if _is_models(name)}
    refuse_tokens({name: file for name, file in files.items() if not _is_weights(name)})
    return push_files(files, repo_id, private=private, commit_message="Merged model", token=token)


def _is_models(name: str) -> bool:
    known = {CONFIG, INDEX, "generation_config.json", CARD_NAME}
    return name in known or is_tokenizers(name) or _is_weights(name)


def _is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith(".safetensors")


def _find_base(plan: Plan, base_model: str | None, token: str | None) -> Path:
    """Return the folder of the base model's files, fetched where it is on the Hub."""
    places = [base_model] if base_model else [source.base_location for source in plan.sources]
    place = next((each for each in places if each), None)
    if place is None:
        raise ValueError(
            "`base_model` is missing, and the adapters name none. It is a folder or a name on the Hub. Pass e.g. "
            "`--base_model meta-llama/Meta-Llama-3-8B`."
        )
    if is_repo_id(place):
        return fetch_from_hub(place, lambda names: _wanted(place, names), max_bytes=_max_bytes, token=token)
    if not (Path(place) / CONFIG).is_file():
        raise FileNotFoundError(
            f"The base model `{place}` is not there: it has no {CONFIG}. A folder with a whole model, or a name on "
            "the Hub, is needed. Pass `--base_model` with where it is on this machine."
        )
    return Path(place)


def _wanted(repo_id: str, names: Sequence[str]) -> list[str]:
    chosen = [name for name in names if _is_models(name) and name != CARD_NAME]
    if CONFIG not in chosen or not any(map(_is_weights, chosen)):
        raise FileNotFoundError(
            f"`{repo_id}` has no {CONFIG} and {SINGLE}. A base model in safetensors is needed. Pass another as "
            "`--base_model`, or save this one with `save_pretrained` and pass the folder."
        )
    return chosen


def _max_bytes(name: str) -> int | None:
    return _MAX_TABLE_BYTES if name.endswith(".json") else None


class _Base:
    """
    The base model's files, and where in them each module lies that the adapters change.

    Args:
        folder (`Path`): where they are.
        plan ([`Plan`]): the adapters.

    Attributes:
        config (`dict[str, Any]`): `config.json`.
        shards (`dict[str, dict[str, tuple[str, tuple[int, ...]]]]`): file -> tensor -> its dtype, as safetensors
            names it, and shape.
        changed (`dict[str, str]`): tensor -> path of the module whose delta is added to it.
    """

    def __init__(self, folder: Path, plan: Plan):
        self.folder = folder
        self.config = read_json(folder / CONFIG, MAX_JSON_BYTES)
        if quantization := self.config.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise ValueError(
                f"The base model `{folder.name}` is quantized ({method}): adding to packed weights would round them a "
                "second time. A base in full precision is needed. Pass it as `--base_model`."
            )
        names = [file.name for file in sorted(folder.glob("model*.safetensors"))]
        if (folder / INDEX).is_file():
            names = sorted({*read_json(folder / INDEX, _MAX_TABLE_BYTES)["weight_map"].values()})
        if not names:
            raise FileNotFoundError(
                f"`{folder}` has no {SINGLE}. A base model in safetensors is needed: pickled weights can run code. "
                "Convert it once, `AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER)`, and pass that."
            )
        self.shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for name in names:
            with opened(folder / name) as tensors:
                slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
                self.shards[name] = {key: (each.get_dtype(), tuple(each.get_shape())) for key, each in slices.items()}
        self.changed = self._find_changed(plan)

    def _find_changed(self, plan: Plan) -> dict[str, str]:
        everything = {name: known for shard in self.shards.values() for name, known in shard.items()}
        changed: dict[str, str] = {}
        for path, (rows, columns) in plan.shapes.items():
            name = _tensor_of(path, everything)
            if name is None and self._is_tied(path):
                raise ValueError(
                    f"The adapters change {path}, and the base model ties it to its embeddings "
                    "(`tie_word_embeddings`): one matrix would have to be two. Allowed are adapters on other modules. "
                    "Keep this adapter beside its base, or train one without `lm_head`."
                )
            if name is None or name in changed:
                raise ValueError(
                    f"The base model `{self.folder.name}` has no weights of its own for {path}, which the adapters "
                    "change. It must be the model that they were trained on. Pass that one as `--base_model`."
                )
            dtype, shape = everything[name]
            if shape not in {(rows, columns), (columns, rows)} or dtype not in _FLOATS:
                raise ValueError(
                    f"{name} of the base model `{self.folder.name}` is {dtype} {shape}; the adapters change a matrix "
                    f"{(rows, columns)} in {', '.join(_FLOATS)}. It must be the model that they were trained on, in "
                    "full precision. Pass that one as `--base_model`."
                )
            changed[name] = path
        return changed

    def _is_tied(self, path: str) -> bool:
        return bool(self.config.get("tie_word_embeddings", True)) and path.rpartition(".")[2] == "lm_head"


def _tensor_of(path: str, names: Mapping[str, Any]) -> str | None:
    """
    Return the tensor that is a module's weight; files may leave out the first parts of a path, or have others there,
    as those of models for text and pictures do.
    """
    if (exact := f"{path}.weight") in names:
        return exact
    parts = path.split(".")
    for start in range(1, len(parts) - 1):
        ending = ".".join(parts[start:]) + ".weight"
        found = [name for name in names if name == ending or name.endswith(f".{ending}")]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _write_weights(base: _Base, plan: Plan, weights: Sequence[float], dtype: torch.dtype | None, stage: Path) -> None:
    """Write every shard, and the index where there is one."""
    anything, total = False, 0
    torch_dtypes = {name: known for known, name in DTYPES.items()}
    with Progress(transient=True) as progress:
        bar = progress.add_task("merging", total=len(plan.paths))
        for shard, tensors in base.shards.items():
            unknown = {known for known, _ in tensors.values()} - torch_dtypes.keys()
            if unknown:
                raise ValueError(
                    f"`{shard}` of the base model has tensors in {', '.join(sorted(unknown))}. Full precision is "
                    f"needed, {', '.join(_FLOATS)}. Pass such a base as `--base_model`."
                )
            dtypes = {name: torch_dtypes[known] for name, (known, _) in tensors.items()}
            if dtype is not None:
                dtypes |= {name: dtype for name, known in dtypes.items() if known.is_floating_point}
            shapes = {name: shape for name, (_, shape) in tensors.items()}
            with (
                opened(base.folder / shard) as read,
                SafetensorsWriter(stage / shard, shapes, read.metadata(), dtypes) as writer,
            ):
                for name, merged in _merged_tensors(base, plan, weights, tensors, read, dtypes):
                    anything = anything or merged is not None
                    writer.write(name, read.get_tensor(name) if merged is None else merged)
                    progress.advance(bar)
                for name in tensors.keys() - base.changed.keys():
                    writer.write(name, read.get_tensor(name))
            total += sum(dtypes[name].itemsize * torch.Size(shape).numel() for name, shape in shapes.items())
    if not anything:
        raise ValueError(
            f"{', '.join(f'`{source.title}`' for source in plan.sources)} would change no weight of the base: every "
            "entry of the merged B is 0. A trained adapter is needed. Check the adapters and the weights."
        )
    if (base.folder / INDEX).is_file():
        index = read_json(base.folder / INDEX, _MAX_TABLE_BYTES)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        _write_json(stage / INDEX, index)


def _merged_tensors(
    base: _Base,
    plan: Plan,
    weights: Sequence[float],
    tensors: Mapping[str, Any],
    read: safe_open,
    dtypes: Mapping[str, torch.dtype],
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each tensor of a shard that the adapters change, and its sum; `None` where their deltas are 0."""
    names = {base.changed[name]: name for name in sorted(tensors) if name in base.changed}
    for path, factors in read_modules(plan.sources, names, torch.float32):
        name = names[path]
        A, B = plan.merge(path, factors, weights)
        check_finite(path, A, B, weights)
        if not B.any():
            yield name, None  # a sparse mask may leave a matrix out
            continue
        delta = plan.scaling * (B @ A)  # (out_features, in_features), float32
        weight = read.get_tensor(name)
        if weight.shape != delta.shape or _is_transposed(plan, path):
            delta = delta.T  # GPT-2's Conv1D keeps its weight as (in_features, out_features)
        merged = (weight.float() + delta).to(dtypes[name])
        if torch.equal(merged, weight.to(dtypes[name])):
            raise ValueError(
                f"{name} would stay as it is: the delta is smaller than what {str(merged.dtype)[6:]} can tell apart. "
                "A merge must change what its adapters change. Pass `--dtype float32`, or a larger weight."
            )
        if not merged.isfinite().all():
            raise ValueError(
                f"{name} would have entries that are not finite in {str(merged.dtype)[6:]}, which ends at "
                f"{torch.finfo(merged.dtype).max:.3g}. All must be finite. Pass `--dtype float32` or `bfloat16`."
            )
        yield name, merged


def _is_transposed(plan: Plan, path: str) -> bool:
    return any(source.config.get("fan_in_fan_out") for source in plan.sources if path in source.shapes)


def _copy_the_rest(base: _Base, plan: Plan, dtype: str | None, stage: Path) -> None:
    """Copy the configuration and the tokenizer; the adapters' own tokenizer goes before the base's."""
    tokenizer = plan.tokenizer or {name: base.folder / name for name in os.listdir(base.folder) if is_tokenizers(name)}
    for name, file in tokenizer.items():
        (stage / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, stage / name)
    config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    _write_json(stage / CONFIG, config)
    if (base.folder / "generation_config.json").is_file():
        shutil.copyfile(base.folder / "generation_config.json", stage / "generation_config.json")
    if "auto_map" in config:
        logger.warning(
            "The base model brings Python files of its own (`auto_map` in its config.json). They are not copied: take "
            "over those that you trust by hand."
        )


def _card(base: _Base, plan: Plan, weights: Sequence[float], dtype: str | None) -> str:
    name = hub_id(plan.base)
    run = next((source.record.training for source in plan.sources if source.record is not None), None)
    data = ModelCardData(
        base_model=name,
        base_model_relation="merge" if name and len(plan.sources) > 1 else "finetune" if name else None,
        library_name="transformers",
        license=run.license if run is not None else None,
        pipeline_tag="text-generation",
        tags=["lori", "lora", "merged"],
    )
    card = ModelCard.from_template(
        data,
        template_path=shipped_folder("model_cards") / "merged_model.md.jinja",
        generated=GENERATED,
        base_model=name,
        base_name=plan.base or base.folder.name,
        method=plan.method,
        dtype=dtype,
        adapters=[(source.title, source.task, weight) for source, weight in zip(plan.sources, weights, strict=True)],
        matrices=len(base.changed),
        install=install_command(),
    )
    return f"{str(card).rstrip()}\n"


def _write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _whole_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """
    Yield a folder beside another whose place it takes at the end. An error before that changes nothing.

    No other process can write to `folder` meanwhile. What one has left that was killed goes; a model that was already
    moved away for another comes back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beginning = f".{folder.name}.merging-"
    with sole_writer(folder, beside=True) as first, room_for(folder):
        if first:
            for left in sorted(folder.parent.glob(f"{glob.escape(beginning)}*/before")):
                if not folder.exists():
                    left.rename(folder)
            remove_left_over(folder.parent, beginning, "[a-z0-9_]{8}")
        _check_place(folder, overwrite=overwrite)
        with tempfile.TemporaryDirectory(prefix=beginning, dir=folder.parent) as beside:
            stage, before = Path(beside, "new"), Path(beside, "before")
            stage.mkdir()
            yield stage
            _check_place(folder, overwrite=overwrite)  # a program that knows no lock may have been faster
            if folder.is_dir():
                folder.rename(before)
            try:
                stage.rename(folder)
            except OSError:
                if before.is_dir():
                    before.rename(folder)
                raise


def _check_place(folder: Path, *, overwrite: bool) -> None:
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(name for name in there if not _is_models(name) and name != "additional_chat_templates")
    if there and (foreign or not overwrite):
        raise FileExistsError(
            f"`output_dir={folder}` is not empty ({(foreign or sorted(there))[0]}). A model goes to a new folder. "
            "Pass another name, or `overwrite=True` (`--overwrite`) where it holds a model and nothing else."
        )
