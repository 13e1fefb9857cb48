"""The one writer: an adapter's folder, all of it or nothing, and never over another adapter."""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from ..inputs.files import read_json, remove_left_over, room_for, sole_writer
from ..method.layers import lora_layers, tensor_name
from ..method.moments import LowRank
from .adapter_contents import Contents
from .card import read_or_render_card
from .heatmaps import draw_density
from .layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD_NAME,
    COMPACT_NAME,
    EVAL_RESULTS_NAME,
    MAX_JSON_BYTES,
    PICTURE_NAME,
    RECIPE_NAME,
    RECORD_NAME,
    left_over,
    obstacles,
    tokenizer_files,
)
from .mask_files import write_masks
from .masks import LoriMasks
from .moments_file import write_moments
from .record import LoriRecord
from .safetensors import hash_tensors, opened

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LOCAL_PATH = re.compile(r"~?/|\.\.?/|[A-Za-z]:[\\/]")  # what no name on the Hub begins with
# Keys of a recipe whose values are secret; the tokens that a tokenizer has are not.
_SECRET = re.compile(
    r"(?<!eos_)(?<!pad_)(?<!bos_)(?<!unk_)(?<!cls_)(?<!sep_)(?<!mask_)token$|secret|passw|api_?key|access_?key|private_?key"
    r"|credential|authori[sz]ation",
    re.IGNORECASE,
)


def check_output(output_dir: str | Path, inputs: Iterable[str | Path] = (), *, overwrite: bool = False) -> None:
    """
    Check, before the first costly step, that writing an adapter to a folder destroys nothing.

    Args:
        output_dir (`str` or `Path`): the folder; it may be missing, then it is made.
        inputs (`Iterable[str | Path]`, *optional*): what is read: folders, files, names on the Hub.
        overwrite (`bool`, *optional*, defaults to `False`): whether what is there may be replaced.

    Raises:
        `ValueError`: the folder is an input, lies in one, or holds one.
        `FileExistsError`: it holds files that an adapter would replace.
        `NotADirectoryError`, `PermissionError`: it cannot be made or written.
    """
    target = Path(output_dir).resolve()
    for each in inputs:
        source = Path(each).resolve()
        if source.exists() and (target == source or source in target.parents or target in source.parents):
            raise ValueError(
                f"`output_dir={output_dir}` and `{each}`, which is read, lie in each other. An output never replaces "
                "an input. Pass a folder beside it."
            )
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(
            f"`output_dir={output_dir}` is a file. An adapter is written to a folder. Pass another name."
        )
    above = next(folder for folder in (target, *target.parents) if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(
            f"`output_dir={output_dir}` cannot be written: `{above}` is no writable folder. Pass another."
        )
    there = obstacles(_names_in(target))
    if there and not overwrite:
        adapters = [name for name in (RECORD_NAME, ADAPTER_WEIGHTS, COMPACT_NAME) if name in there]
        held = f"an adapter already ({adapters[0]})" if adapters else f"{there[0]} already"
        raise FileExistsError(
            f"`output_dir={output_dir}` holds {held}. An output goes to a new folder. Pass another name, or "
            "`overwrite=True` (`--overwrite`) to replace what is there."
        )


def check_output_file(file: str | Path, adapter: str | Path, *, overwrite: bool = False) -> None:
    """
    Check that an adapter written as one file destroys nothing.

    Args:
        file (`str` or `Path`): the file.
        adapter (`str` or `Path`): what is read: a folder, a file or a name on the Hub.
        overwrite (`bool`, *optional*, defaults to `False`): whether a file that is there may be replaced.

    Raises:
        `ValueError`: it is a folder, or lies in the adapter's.
        `FileExistsError`: it exists.
    """
    file, source = Path(file), Path(adapter).resolve()
    if source in (file.resolve(), *file.resolve().parents) or file.is_dir():
        raise ValueError(
            f"`{file}` is a folder or lies in `{adapter}`, which is read. An output never replaces an input. Pass a "
            "file outside of it."
        )
    if file.exists() and not overwrite:
        raise FileExistsError(
            f"`{file}` exists. An adapter goes to a new file. Pass another name, or `overwrite=True` (`--overwrite`) "
            "to replace it."
        )


@contextmanager
def staged(folder: str | Path, *, seconds: float = 0) -> Iterator[Path]:
    """
    Yield an empty folder whose files replace those of `folder` one by one at the end, the record last.

    Files of an adapter that was there before and that the new one does not have are removed then, but for evaluation
    results; others are left alone. If anything fails before that, `folder` stays as it was. No other process can write
    to `folder` meanwhile.

    Args:
        folder (`str` or `Path`): where to.
        seconds (`float`, *optional*, defaults to 0): how long to wait for another process that writes there.

    Raises:
        `ValueError`: a link in `folder` leads out of it.
        `FileExistsError`: another process writes to `folder`.
        `OSError`: there is no room for the files.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with sole_writer(folder, seconds=seconds), room_for(folder):
            remove_left_over(folder, ".saving-", r"\w+")
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder, ignore_cleanup_errors=True) as stage:
                yield Path(stage)
                _replace(folder, Path(stage))
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _replace(folder: Path, stage: Path) -> None:
    """Move the files of a stage into a folder, and remove what is left over of an adapter there."""
    there = _names_in(folder)
    new = {str(file.relative_to(stage)): file for file in sorted(stage.rglob("*")) if file.is_file()}
    for name in new:
        refuse_link_out(folder, name)
    for name in sorted(new, key=lambda name: (name == RECORD_NAME, name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new[name], folder / name)
    for name in left_over(there, new) if RECORD_NAME in new else ():
        if name != EVAL_RESULTS_NAME:
            (folder / name).unlink()


def _names_in(folder: Path) -> list[str]:
    """List the files of a folder and of the folders in it, named from it; those of a stage are not among them."""
    files = (file for file in (*folder.glob("*"), *folder.glob("[!.]*/*")) if file.is_file())
    return [file.relative_to(folder).as_posix() for file in files]


def refuse_link_out(folder: Path, name: str) -> None:
    """Raise `ValueError` if a file, named from a folder, lies elsewhere because of a link."""
    target = folder / name
    if target.exists() and folder.resolve() not in target.resolve().parents:
        raise ValueError(
            f"`{target}` leads out of its folder, to `{target.resolve()}`. An adapter's files lie in its folder. "
            "Remove the link."
        )


def save_lori_adapter(
    folder: str | Path,
    model: "PeftModel",
    adapter_name: str,
    *,
    record: LoriRecord,
    masks: Mapping[str, LoriMasks],
    state_dict: Mapping[str, Tensor] | None = None,
    processing_class: "PreTrainedTokenizerBase | None" = None,
    recipe: Mapping[str, Any] | None = None,
    moments: Mapping[str, LowRank] | None = None,
) -> None:
    """
    Write the folder of a model's adapter, all of it or nothing.

    Args:
        folder (`str` or `Path`): where to; files that are already there are replaced at the end, others left alone.
        model (`PeftModel`): the model that carries the adapter.
        adapter_name (`str`): which of its adapters. It is written as PEFT's default adapter, whatever its name.
        record ([`LoriRecord`]): what is known of it.
        masks (`Mapping[str, LoriMasks]`): task -> its masks, of every task whose entries are in B.
        state_dict (`Mapping[str, Tensor]`, *optional*): the gathered weights, where the model is sharded.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the tokenizer to put beside.
        recipe (`Mapping[str, Any]`, *optional*): the recipe as it was run.
        moments (`Mapping[str, LowRank]`, *optional*): module path -> those of the newest task's inputs.

    Raises:
        `RuntimeError`: a tensor of the adapter is missing or incomplete. Nothing is replaced then.
    """
    with staged(folder, seconds=600) as stage:  # rather late than lost
        model.save_pretrained(stage, selected_adapters=[adapter_name], state_dict=state_dict)
        if adapter_name != "default":  # PEFT puts any other name into a folder of its own
            for file in (stage / adapter_name).iterdir():
                file.rename(stage / file.name)
            (stage / adapter_name).rmdir()
        _check_complete(stage / ADAPTER_WEIGHTS, model, adapter_name)
        if processing_class is not None:
            processing_class.save_pretrained(stage)
        (stage / CARD_NAME).unlink(missing_ok=True)  # PEFT's, which names local paths
        for task_masks in masks.values():
            task_masks.save_pretrained(stage)
        if moments is not None:
            write_moments(stage, record.task, moments)
        newest = [*masks.values()][-1] if masks else None
        complete(stage, record, newest, recipe=recipe, beside=folder)


def complete(
    stage: Path,
    record: LoriRecord,
    masks: LoriMasks | None,
    *,
    recipe: Mapping[str, Any] | None = None,
    tensors: Mapping[str, str] | None = None,
    beside: str | Path | None = None,
) -> None:
    """
    Put beside PEFT's two files and the masks all that makes them a LoRI adapter: record, recipe, picture and card.

    Args:
        stage (`Path`): the folder that has PEFT's files and the masks.
        record ([`LoriRecord`]): what is known; the checksums are added here.
        masks ([`LoriMasks`] or `None`): those of the newest task, for picture and card.
        recipe (`Mapping[str, Any]`, *optional*): the recipe as it was run; tokens in it are left out.
        tensors (`Mapping[str, str]`, *optional*): the tensors' hashes, where they are known; else the file is read.
        beside (`str` or `Path`, *optional*): where evaluation results and a card that was edited by hand are.
    """
    if recipe is not None:
        (stage / RECIPE_NAME).write_text(recipe_text(recipe), encoding="utf-8")
    record = _write_record(stage, record, tensors)
    try:  # the weights are worth more than their card
        draw_density(masks, stage / PICTURE_NAME)
        write_card(stage, record, masks, beside=beside or stage)
    except Exception as error:
        logger.warning(f"The card of {beside or stage} was not written: {error}")


def write_contents(folder: str | Path, contents: Contents) -> None:
    """Write an adapter that is in memory into an empty folder: PEFT's files, masks, record and recipe, no card."""
    folder = Path(folder)
    save_file(contents.tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = json.dumps(contents.adapter_config, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(config, encoding="utf-8")
    for entries, metadata in contents.masks.values():
        write_masks(folder, entries, metadata)
    if contents.recipe is not None:
        (folder / RECIPE_NAME).write_text(contents.recipe, encoding="utf-8")
    _write_record(folder, contents.record)


def write_card(
    folder: Path,
    record: LoriRecord,
    masks: LoriMasks | None,
    *,
    beside: str | Path,
    target: str | Path | None = None,
    **place: Any,
) -> Path:
    """
    Write the card of an adapter's folder. One that was edited by hand is kept.

    Args:
        folder (`Path`): the adapter's folder.
        record ([`LoriRecord`]): its record.
        masks ([`LoriMasks`] or `None`): those of the newest task.
        beside (`str` or `Path`): where evaluation results and an edited card are.
        target (`str` or `Path`, *optional*): the folder to write the card into; by default `folder`.
        **place: `repo_id` and `forms` of [`render_model_card`].

    Returns:
        `Path`: the card's file.

    Raises:
        `ValueError`: the evaluation results are not of their form.
    """
    results = Path(beside, EVAL_RESULTS_NAME)
    file = Path(target or folder, CARD_NAME)
    card = read_or_render_card(
        Path(beside, CARD_NAME),
        record,
        read_json(folder / ADAPTER_CONFIG, MAX_JSON_BYTES),
        masks,
        eval_results=read_json(results, MAX_JSON_BYTES) if results.is_file() else None,
        recipe=(folder / RECIPE_NAME).is_file(),
        picture=(folder / PICTURE_NAME).is_file(),
        tokenizer=bool(tokenizer_files(folder)),
        **place,
    )
    file.write_text(card, encoding="utf-8")
    return file


def _write_record(folder: Path, record: LoriRecord, tensors: Mapping[str, str] | None = None) -> LoriRecord:
    config = read_json(folder / ADAPTER_CONFIG, MAX_JSON_BYTES)
    record = record.sealed(config, hash_tensors(folder / ADAPTER_WEIGHTS) if tensors is None else tensors)
    (folder / RECORD_NAME).write_text(record.to_json(), encoding="utf-8")
    return record


def _check_complete(file: Path, model: "PeftModel", adapter_name: str) -> None:
    """Raise `RuntimeError` unless a file has every A and B of an adapter, whole: gathering shards can go wrong."""
    from ..method.sharding import full_shape  # not before: it takes a second, and only a model's save needs it

    expected = {}
    for path, layer in lora_layers(model, adapter_name).items():
        for part, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            expected[tensor_name(path, part)] = list(full_shape(matrices[adapter_name].weight))
    with opened(file) as tensors:
        saved = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    wrong = [name for name, shape in expected.items() if saved.get(name) != shape]
    if wrong:
        raise RuntimeError(
            f"Of the adapter's {len(expected)} tensors, {len(wrong)} are missing or incomplete: "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}. A save needs all of them, whole; nothing was "
            "replaced. With FSDP, set `fsdp_state_dict_type: FULL_STATE_DICT` in the launch file."
        )


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """
    Return the text of a `recipe.yaml`: as it was run, without what may be secret.

    Files and folders of this machine begin with `./` or `/`, so that they are not taken for names on the Hub later,
    when they are no longer there.
    """
    return yaml.safe_dump(_public(recipe), sort_keys=False)


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public(each) for key, each in value.items() if not _SECRET.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [_public(each) for each in value]
    is_local = isinstance(value, str) and "/" in value and not LOCAL_PATH.match(value) and os.path.exists(value)
    return f"./{value}" if is_local else value
