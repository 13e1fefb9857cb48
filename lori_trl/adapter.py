"""The adapter's folder: a plain PEFT adapter and, beside it, what makes it a LoRI adapter.

adapter_config.json  adapter_model.safetensors      PEFT's, untouched
lori_config.json                                    task, projection, calibration, counts, history, versions
masks/<task>.safetensors                            the masks of every task, oldest first in lori_config.json
README.md  recipe.yaml                              the card; the recipe as it was run, where there is one
"""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .download import MAX_JSON_BYTES, fetch_from_hub, is_repo_id
from .heatmaps import draw_density
from .layers import lora_layers
from .masks import COMPACT_NAME, LoriMasks, check_header, check_task_name, choose_mask_files
from .model_card import (
    CARD_NAME,
    EVAL_RESULTS_NAME,
    GENERATED,
    PICTURE_NAME,
    render_model_card,
)
from .projections import fingerprint, freeze_projections, projections
from .sharding import full_shape

logger = logging.getLogger(__name__)

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG_NAME = "lori_config.json"
RECIPE_NAME = "recipe.yaml"
FORMAT_VERSION = 1
RUN_FACTS = ("calibration", "training")  # of lori_config.json: what concerns one task's run


@contextmanager
def staged(folder: str | Path):
    """
    Yield an empty folder whose files replace those of `folder` one by one at the end, `lori_config.json` last.

    If anything fails before that, `folder` stays as it was.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for left_by_a_killed_save in folder.glob(".saving-*"):
        shutil.rmtree(left_by_a_killed_save, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield stage
        files = sorted(file for file in stage.rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: file.name == CONFIG_NAME):
            target = folder / file.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def save_lori_adapter(
    folder: str | Path,
    model: PeftModel,
    adapter_name: str,
    *,
    lori_config: Mapping[str, Any],
    masks: Mapping[str, LoriMasks],
    state_dict: Mapping[str, Tensor] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """
    Write an adapter's folder, all of it or nothing.

    Args:
        folder (`str` or `Path`): where to; files that are already there are replaced at the end, others left alone.
        model (`PeftModel`): the model that carries the adapter.
        adapter_name (`str`): which of its adapters. It is written as PEFT's default adapter, whatever its name.
        lori_config (`Mapping[str, Any]`): what goes into `lori_config.json`.
        masks (`Mapping[str, LoriMasks]`): task -> its masks, of every task whose entries are in B.
        state_dict (`Mapping[str, Tensor]`, *optional*): the gathered weights, where the model is sharded.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the tokenizer to put beside.
        recipe (`Mapping[str, Any]`, *optional*): the recipe as it was run.

    Raises:
        `RuntimeError`: a tensor of the adapter is missing or incomplete. Nothing is replaced then.
    """
    with staged(folder) as stage:
        model.save_pretrained(stage, selected_adapters=[adapter_name], state_dict=state_dict)
        if adapter_name != "default":  # PEFT puts any other name into a folder of its own
            for file in (stage / adapter_name).iterdir():
                file.rename(stage / file.name)
            (stage / adapter_name).rmdir()
        _check_complete(stage / PEFT_FILES[1], model, adapter_name)
        for task_masks in masks.values():
            task_masks.save_pretrained(stage)
        if processing_class is not None:
            processing_class.save_pretrained(stage)
        if recipe is not None:
            recipe = _without_secrets(recipe)
            (stage / RECIPE_NAME).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        (stage / CONFIG_NAME).write_text(json.dumps(lori_config, indent=2) + "\n", encoding="utf-8")
        (stage / CARD_NAME).unlink(missing_ok=True)  # PEFT's, which names local paths
        try:
            draw_density(masks, stage / PICTURE_NAME)
            write_card(stage, stage, beside=folder)
        except Exception as error:  # the weights are worth more than their card
            logger.warning(f"The card of {folder} was not written: {error}")
        drawn = (stage / PICTURE_NAME).is_file()
    if not drawn:
        (Path(folder) / PICTURE_NAME).unlink(missing_ok=True)  # that of masks before these


def _check_complete(file: Path, model: PeftModel, adapter_name: str) -> None:
    """Raise `RuntimeError` unless a file has every A and B of an adapter, whole: gathering shards can go wrong."""
    expected = {}
    for path, layer in lora_layers(model, adapter_name).items():
        for name, part in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            expected[f"base_model.model.{path}.{name}.weight"] = list(full_shape(part[adapter_name].weight))
    with safe_open(file, framework="pt") as opened:
        found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    wrong = [name for name, shape in expected.items() if found.get(name) != shape]
    if wrong:
        raise RuntimeError(
            f"Of the adapter's {len(expected)} tensors, {len(wrong)} are missing or incomplete: "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}. A save needs all of them, whole; nothing was "
            "replaced. With FSDP, set `fsdp_state_dict_type: FULL_STATE_DICT` in the launch file."
        )


def read_lori_config(folder: str | Path) -> dict[str, Any]:
    """
    Read a folder's `lori_config.json`.

    Raises:
        `FileNotFoundError`: there is none.
        `ValueError`: it is unreadable or of a later format.
    """
    file = Path(folder) / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"`{folder}` holds no {CONFIG_NAME}. A LoRI adapter's folder has one, beside PEFT's adapter_config.json. "
            "Pass the folder that `save_model()` wrote."
        )
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"`{file}` has {file.stat().st_size / 1e6:.0f} MB. An adapter's has at most {MAX_JSON_BYTES / 1e6:.0f} "
            "MB. Do not use it; fetch it again."
        )
    try:
        return checked_lori_config(json.loads(file.read_text(encoding="utf-8")), file)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(file, error) from error


def checked_lori_config(config: Any, file: str | Path) -> dict[str, Any]:
    """
    Check the contents of a `lori_config.json`, wherever they come from.

    Raises:
        `ValueError`: they are of a later format, lack what every adapter has, or name a task that cannot name a file.
    """
    try:
        version = config["format_version"]
        if version <= FORMAT_VERSION:
            names = [config["task"], *(record["task"] for record in config["tasks"])]
            numbers = [config["counts"]["lora"], config["counts"]["lora_B"], *(r["selected"] for r in config["tasks"])]
            if not all(isinstance(number, int) for number in numbers):
                raise TypeError(f"counts {numbers}")
            config["projection"]["fingerprint"].removeprefix("sha256:")
    except (KeyError, TypeError, AttributeError) as error:
        raise _unreadable(file, error) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`{file}` has format_version {version}. This lori_trl reads versions up to {FORMAT_VERSION}. Upgrade it."
        )
    for name in names:
        check_task_name(name)
    return config


def task_records(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    Return the history of an adapter, oldest task first, every record with the facts of its own run.

    In the file, those of the newest task stand at the top of `lori_config.json`, not in its record.
    """
    facts = {name: config.get(name) for name in RUN_FACTS}
    return [*config["tasks"][:-1], *({**newest, **facts} for newest in config["tasks"][-1:])]


def read_masks(folder: str | Path, config: Mapping[str, Any]) -> dict[str, LoriMasks]:
    """Load the masks of all tasks that a folder's `lori_config.json` names: task -> its masks, oldest first."""
    return {record["task"]: LoriMasks.from_pretrained(folder, task=record["task"]) for record in config["tasks"]}


def write_card(
    folder: str | Path,
    target: str | Path,
    *,
    beside: str | Path | None = None,
    repo_id: str | None = None,
    forms: Sequence[str] = ("peft",),
) -> Path:
    """
    Write the card of an adapter's folder. One that was edited by hand is kept.

    Args:
        folder (`str` or `Path`): the adapter's folder.
        target (`str` or `Path`): the folder to write the card into.
        beside (`str` or `Path`, *optional*): where evaluation results and an edited card are; by default `folder`.
        repo_id (`str`, *optional*): where the adapter is on the Hub.
        forms (`Sequence[str]`, *optional*, defaults to `("peft",)`): what is there: `"peft"`, `"compact"` or both.

    Returns:
        `Path`: the card's file.

    Raises:
        `ValueError`: a file of the folder or the evaluation results are not of their form.
    """
    folder, beside = Path(folder), Path(beside or folder)
    existing, results = beside / CARD_NAME, beside / EVAL_RESULTS_NAME
    if existing.is_file() and GENERATED not in existing.read_text(encoding="utf-8"):
        card = existing.read_text(encoding="utf-8")
    else:
        config = read_lori_config(folder)
        newest = [record["task"] for record in config["tasks"][-1:]]
        card = render_model_card(
            config,
            json.loads((folder / PEFT_FILES[0]).read_text(encoding="utf-8")),
            {task: LoriMasks.from_pretrained(folder, task=task) for task in newest},
            eval_results=json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None,
            repo_id=repo_id,
            forms=forms,
            recipe=(folder / RECIPE_NAME).is_file(),
            picture=(folder / PICTURE_NAME).is_file(),
        )
    file = Path(target, CARD_NAME)
    file.write_text(card, encoding="utf-8")
    return file


def load_lori_adapter(
    model: PreTrainedModel,
    folder_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    is_trainable: bool = False,
    adapter_name: str = "default",
) -> PeftModel:
    """
    Load a LoRI adapter onto its base model: A frozen again and checked, masks and task history restored.

    Args:
        model (`PreTrainedModel`): the base model.
        folder_or_repo (`str` or `Path`):
            The adapter's folder, its compact file, or a repository on the Hub. The authors' own repositories load too:
            their adapter comes with the mask it was trained on, under the repository's name.
        revision (`str`, *optional*): a branch, tag or commit of the repository; by default the head of `main`.
        token (`str`, *optional*): a token that may read the repository; by default that of `hf auth login`.
        is_trainable (`bool`, *optional*, defaults to `False`): whether to go on training B.
        adapter_name (`str`, *optional*, defaults to `"default"`): the adapter's name on the model.

    Returns:
        `PeftModel`: its attribute `lori_masks` maps every trained task, oldest first, to its [`LoriMasks`], and
        `lori_tasks` has what is on record of their runs.

    Raises:
        `FileNotFoundError`: the folder or repository holds no LoRI adapter.
        `PermissionError`: the repository may not be read.
        `ConnectionError`: the Hub cannot be reached, and the cache does not have the files.
        `ValueError`: A is not the one that the adapter was trained with, or a file is unreadable.
    """
    with plain_folder(folder_or_repo, revision, token) as folder:
        theirs = sorted((folder / "masks").glob("*_mask.pt"))
        if theirs and not (folder / CONFIG_NAME).is_file():
            model = _load_peft(model, folder, adapter_name, is_trainable)
            task = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(folder_or_repo).name).lstrip("._-")[:96]
            layers = lora_layers(model, adapter_name)
            moved = {path: (layer.lora_B[adapter_name].weight != 0).cpu() for path, layer in layers.items()}
            model.lori_masks = {task: trained_mask(LoriMasks(moved), LoriMasks.from_pretrained(folder, task))}
            return model
        config = read_lori_config(folder)
        masks = read_masks(folder, config)
        model = _load_peft(model, folder, adapter_name, is_trainable)
    found = fingerprint(projections(model, adapter_name))
    if found != config["projection"]["fingerprint"]:
        raise ValueError(
            f"The projections A in `{folder_or_repo}` have fingerprint {found[:19]}..., {CONFIG_NAME} says "
            f"{config['projection']['fingerprint'][:19]}.... B and the masks mean nothing on another A. Fetch the "
            "whole folder again; if the adapter was cast to a lower precision, use the original."
        )
    model.lori_masks, model.lori_tasks = masks, task_records(config)
    return model


@contextmanager
def plain_folder(
    folder_or_repo: str | Path,
    revision: str | None = None,
    token: str | None = None,
    choose: Callable[[list[str]], list[str]] | None = None,
) -> Iterator[Path]:
    """
    Yield a folder with the plain PEFT files: the given one, the Hub's in the cache, or an unpacked compact one.

    Args:
        folder_or_repo, revision, token: as in [`load_lori_adapter`].
        choose (`Callable`, *optional*): which files of a repository to fetch; by default those of a LoRI adapter.
    """
    from .compact import expand  # the compact form is built on this module

    path = Path(folder_or_repo)
    if is_repo_id(folder_or_repo):
        path = fetch_from_hub(str(folder_or_repo), choose or _choose_adapter_files, revision=revision, token=token)
    if path.is_dir() and (path / COMPACT_NAME).is_file() and not (path / PEFT_FILES[1]).is_file():
        path = path / COMPACT_NAME
    if path.is_file():
        with tempfile.TemporaryDirectory() as unpacked:
            expand(path, unpacked)
            yield Path(unpacked)
    else:
        yield path


def _choose_adapter_files(names: list[str]) -> list[str]:
    """Choose what to fetch of a repository: the plain files if they are there, else the compact one."""
    if not {*PEFT_FILES} <= {*names}:
        return [name for name in names if name == COMPACT_NAME]
    masks = choose_mask_files(names)
    return [*masks, *PEFT_FILES] if masks else []


def check_peft_files(folder: Path) -> None:
    """
    Check that a folder holds PEFT's two files, before PEFT would take a pickled adapter_model.bin.

    Raises:
        `FileNotFoundError`: one is missing.
        `ValueError`: the weights announce more metadata than any adapter has.
    """
    for name in PEFT_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"`{folder}` holds no {name}. An adapter has {' and '.join(PEFT_FILES)}. Fetch or save it again."
            )
    check_header(folder / PEFT_FILES[1])


def _load_peft(model: PreTrainedModel, folder: Path, adapter_name: str, is_trainable: bool) -> PeftModel:
    check_peft_files(folder)
    model = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable)
    freeze_projections(model, adapter_name)
    return model


def trained_mask(moved: LoriMasks, mask: LoriMasks) -> LoriMasks:
    """
    Return the mask beside one of the authors' adapters if that was trained on it; else what of B is not zero.

    Args:
        moved ([`LoriMasks`]): the entries of B that are not zero.
        mask ([`LoriMasks`]): the mask.

    Raises:
        `ValueError`: the mask does not fit.
    """
    mask.check_shapes({path: entries.shape for path, entries in moved.items()})
    moved.task = mask.task
    return moved if (moved - mask).num_selected else mask


def _without_secrets(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out every key that may hold a token, at any depth."""
    return {
        key: _without_secrets(value) if isinstance(value, Mapping) else value
        for key, value in recipe.items()
        if not re.search(r"token$|secret|password|api_key", str(key))
    }


def _unreadable(file: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"`{file}` is unreadable ({error!r}). It must be the JSON that `save_model()` wrote. Fetch it again."
    )
