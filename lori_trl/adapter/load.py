"""An adapter from disk onto its base model, through PEFT."""

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..inputs.files import describe_fault
from ..method.layers import lora_layers
from ..method.projections import fingerprint, freeze_projections, projections
from .folder import AdapterFolder, open_adapter
from .layout import ADAPTER_CONFIG, RECORD_NAME, TOKENIZER_CONFIG
from .memory import remember
from .record import read_record
from .vocabulary import check_rows


def load_lori_adapter(
    model: PreTrainedModel,
    folder_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    is_trainable: bool = False,
    adapter_name: str = "default",
    allow_modified: bool = False,
) -> PeftModel:
    """
    Load a LoRI adapter onto its base model: A frozen again, every tensor checked, masks and task history restored.

    Args:
        model (`PreTrainedModel`): the base model.
        folder_or_repo (`str` or `Path`):
            The adapter's folder, its compact file, or a repository on the Hub. The authors' own repositories load too:
            their adapter comes with the mask it was trained on, under the repository's name.
        revision (`str`, *optional*): a branch, tag or commit of the repository; by default the head of `main`.
        token (`str`, *optional*): a token that may read the repository; by default that of `hf auth login`.
        is_trainable (`bool`, *optional*, defaults to `False`): whether to go on training B.
        adapter_name (`str`, *optional*, defaults to `"default"`): the adapter's name on the model.
        allow_modified (`bool`, *optional*, defaults to `False`):
            Take an adapter whose B was changed after `lori_trl` saved it, e.g. by training it on with plain PEFT.

    Returns:
        `PeftModel`: its attribute `lori_masks` maps every trained task, oldest first, to its [`LoriMasks`], and
        `lori_tasks` has what is on record of their runs: of the adapter that was loaded or trained last. A trainer
        knows each adapter's own.

    Raises:
        `FileNotFoundError`: the folder or repository holds no LoRI adapter.
        `PermissionError`: the repository may not be read.
        `ConnectionError`: the Hub cannot be reached, and the cache does not have the files.
        `ValueError`: a tensor is not what was saved, A is not the one that the adapter was trained with, the adapter
            does not fit the model, or a file is unreadable.
    """
    with open_adapter(folder_or_repo, revision=revision, token=token, allow_modified=allow_modified) as adapter:
        if adapter.record is None and not adapter.masks:
            read_record(adapter.folder)  # says that there is none
        adapter.verify()
        model = load_with_peft(model, adapter, adapter_name=adapter_name, is_trainable=is_trainable)
        masks, record = adapter.masks, adapter.record
    freeze_projections(model, adapter_name)
    drawn = fingerprint(projections(model, adapter_name))
    if record is not None and drawn != record.projection.fingerprint:
        raise ValueError(
            f"The projections A in `{folder_or_repo}` have fingerprint {drawn[:19]}..., {RECORD_NAME} says "
            f"{record.projection.fingerprint[:19]}.... B and the masks mean nothing on another A. Fetch the whole "
            "folder again; if the adapter was cast to a lower precision, use the original."
        )
    tasks = [] if record is None else [task.to_dict() for task in record.history]
    remember(model, adapter_name, masks, tasks, drawn)
    return model


def load_tokenizer(files: Mapping[str, Path]) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of an adapter from its files, name -> file; `None` if there are none."""
    return AutoTokenizer.from_pretrained(files[TOKENIZER_CONFIG].parent) if files else None


def load_with_peft(
    model: PreTrainedModel, adapter: AdapterFolder, *, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """
    Load an adapter with PEFT, and make sure that all of it arrived.

    PEFT leaves out modules that the config does not name, and leaves B at zero where the file has none.

    Args:
        model (`PreTrainedModel`): the base model.
        adapter ([`AdapterFolder`]): the adapter, LoRI or plain LoRA.
        adapter_name, is_trainable: as of [`load_lori_adapter`].

    Raises:
        `ValueError`: the adapter does not fit the model, or lacks a matrix.
    """
    modules = dict(model.named_modules())
    for path, (rows, _, columns) in adapter.shapes.items():
        if path not in modules:
            raise _misfit(adapter, model, f"it has no module {path}")
        sizes = getattr(modules[path], "in_features", columns), getattr(modules[path], "out_features", rows)
        if sizes != (columns, rows):
            raise _misfit(adapter, model, f"{path} has {sizes} features where the adapter has {(columns, rows)}")
    check_rows(adapter, model)
    try:
        loaded = PeftModel.from_pretrained(
            model, str(adapter.folder), adapter_name=adapter_name, is_trainable=is_trainable
        )
    except Exception as error:  # whatever PEFT makes of settings that it does not know
        raise ValueError(
            f"`{adapter.name}` cannot be loaded by PEFT ({describe_fault(error)}). Its {ADAPTER_CONFIG} must be one "
            "that PEFT wrote, and the base model the one that it was trained on. Fetch or save the adapter again."
        ) from error
    layers = lora_layers(loaded, adapter_name)
    missing = [path for path in layers if path not in adapter.shapes]
    left_out = [path for path in adapter.shapes if path not in layers]
    if missing or left_out or adapter.unpaired:
        loaded.unload()
        lacks = f"it has no lora_A and lora_B for {[*missing, *adapter.unpaired, None][0]}"
        fault = f"its {ADAPTER_CONFIG} leaves out {left_out[0]}, which its weights have" if left_out else lacks
        raise _misfit(adapter, model, fault)
    return loaded


def _misfit(adapter: AdapterFolder, model: PreTrainedModel, fault: str) -> ValueError:
    return ValueError(
        f"`{adapter.name}` does not fit the base model `{model.name_or_path}`: {fault}. An adapter works on the base "
        "that it was trained on, and has both matrices for each of its modules. Load that base, or fetch or save the "
        "adapter again."
    )
