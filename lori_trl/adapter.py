"""The adapter's folder: a plain PEFT adapter and, beside it, what makes it a LoRI adapter.

adapter_config.json  adapter_model.safetensors      PEFT's, untouched
lori_config.json                                    task, projection, calibration, counts, history, versions
masks/<task>.safetensors                            the masks of every task, oldest first in lori_config.json
README.md  recipe.yaml                              the card; the recipe as it was run, where there is one
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .masks import LoriMasks
from .model_card import render_model_card
from .projections import fingerprint, freeze_projections, projections

CONFIG_NAME = "lori_config.json"
RECIPE_NAME = "recipe.yaml"
FORMAT_VERSION = 1


@contextmanager
def staged(folder: str | Path):
    """
    Yield an empty folder whose files replace those of `folder` one by one at the end, `lori_config.json` last.

    If anything fails before that, `folder` stays as it was.
    """
    folder = Path(folder)
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
    """
    with staged(folder) as stage:
        model.save_pretrained(stage, selected_adapters=[adapter_name], state_dict=state_dict)
        if adapter_name != "default":  # PEFT puts any other name into a folder of its own
            for file in (stage / adapter_name).iterdir():
                file.rename(stage / file.name)
            (stage / adapter_name).rmdir()
        for task_masks in masks.values():
            task_masks.save_pretrained(stage)
        if processing_class is not None:
            processing_class.save_pretrained(stage)
        if recipe is not None:
            (stage / RECIPE_NAME).write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
        (stage / CONFIG_NAME).write_text(json.dumps(lori_config, indent=2) + "\n", encoding="utf-8")
        card = render_model_card(lori_config, model.peft_config[adapter_name].base_model_name_or_path)
        (stage / "README.md").write_text(card, encoding="utf-8")


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
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        version = config["format_version"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{file}` is unreadable ({error!r}). It must be the JSON that `save_model()` wrote. Fetch it again."
        ) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`{file}` has format_version {version}. This lori_trl reads versions up to {FORMAT_VERSION}. Upgrade it."
        )
    return config


def load_lori_adapter(
    model: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False, adapter_name: str = "default"
) -> PeftModel:
    """
    Load a LoRI adapter onto its base model: A frozen again and checked, masks and task history restored.

    Args:
        model (`PreTrainedModel`): the base model.
        folder (`str` or `Path`): the adapter's folder.
        is_trainable (`bool`, *optional*, defaults to `False`): whether to go on training B.
        adapter_name (`str`, *optional*, defaults to `"default"`): the adapter's name on the model.

    Returns:
        `PeftModel`: its attribute `lori_masks` maps every trained task, oldest first, to its [`LoriMasks`].

    Raises:
        `FileNotFoundError`: the folder holds no LoRI adapter.
        `ValueError`: A is not the one that the adapter was trained with, or a file is unreadable.
    """
    config = read_lori_config(folder)
    masks = {record["task"]: LoriMasks.from_pretrained(folder, task=record["task"]) for record in config["tasks"]}
    model = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable)
    found = fingerprint(projections(model, adapter_name))
    if found != config["projection"]["fingerprint"]:
        raise ValueError(
            f"The projections A in `{folder}` have fingerprint {found[:19]}..., {CONFIG_NAME} says "
            f"{config['projection']['fingerprint'][:19]}.... B and the masks mean nothing on another A. Fetch the "
            "whole folder again; if the adapter was cast to a lower precision, use the original."
        )
    freeze_projections(model, adapter_name)
    model.lori_masks = masks
    return model
