"""The models to compare: a base model, adapters on it one after another, whole models besides."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..adapter.folder import AdapterFolder, base_name, may_be_one_base, open_adapter
from ..adapter.layout import ADAPTER_CONFIG
from ..adapter.load import load_tokenizer, load_with_peft
from ..adapter.vocabulary import room
from ..training.base_model import load_base_model, quantization
from .processes import device_map

logger = logging.getLogger(__name__)


def is_whole_model(name: str) -> bool:
    """Say whether a name is a folder with a whole model, as full fine-tuning saves it."""
    return (Path(name) / "config.json").is_file() and not (Path(name) / ADAPTER_CONFIG).is_file()


def find_base_model(base_model: str | None, models: Sequence[str], *, allow_modified: bool = False) -> str | None:
    """
    Find the base model of adapters.

    Args:
        base_model (`str`, *optional*): the one that was asked for; it is returned.
        models (`Sequence[str]`): folders of adapters or whole models, compact files, repositories on the Hub.
        allow_modified (`bool`, *optional*, defaults to `False`): as of [`load_lori_adapter`].

    Returns:
        `str` or `None`: a folder or a name on the Hub; `None` if there are only whole models.

    Raises:
        `ValueError`: no base is named, or several are.
        `FileNotFoundError`: one of `models` is neither an adapter nor a model.
    """
    bases = {}
    for name in models:
        if not is_whole_model(name):
            with open_adapter(name, allow_modified=allow_modified) as adapter:
                bases[name] = adapter.base_location
    names = {name: base_name(base) for name, base in bases.items()}
    if base_model is not None:
        for name, base in names.items():
            if not may_be_one_base([base, base_name(base_model)]):
                logger.warning(
                    f"`{name}` was trained on `{base}` and is evaluated on `{base_model}`. If these are two names of "
                    "one model, all is well; else leave `--base_model` out."
                )
        return base_model
    unknown = [name for name, base in bases.items() if base is None]
    if unknown or not models:
        why = f"`{unknown[0]}` does not name one" if unknown else "no adapter is given that names one"
        raise ValueError(
            f"`--base_model` is missing, and {why}. It is a folder or a name on the Hub. Pass e.g. `--base_model "
            "meta-llama/Meta-Llama-3-8B`."
        )
    if not may_be_one_base(names.values()):
        listed = ", ".join(f"{name}: {base}" for name, base in names.items())
        raise ValueError(
            f"The adapters have different base models ({listed}). One call compares adapters of one base. Call "
            "`lori eval` once for each base."
        )
    return next(iter(bases.values()), None)


def load_model(
    name: str, dtype: str = "float32", *, load_in_4bit: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a whole model and its tokenizer, on the accelerator if there is one; of several processes, each on its own.

    Args:
        name (`str`): a folder, or a name on the Hub.
        dtype (`str`, *optional*, defaults to `"float32"`): of the weights, and of the arithmetic with packed ones.
        load_in_4bit (`bool`, *optional*, defaults to `False`): pack the linear layers as QLoRA trains on them (NF4).

    Raises:
        `FileNotFoundError`: there is no such model.
        `ImportError`: bitsandbytes is not installed.
    """
    arguments = {"dtype": getattr(torch, dtype), "device_map": device_map()}
    if load_in_4bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=arguments["dtype"]
        )
    try:
        model = load_base_model(name, architecture=AutoModelForCausalLM, **arguments)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    return model, load_tokenizer_of(name)


def load_tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a whole model, which costs nothing beside the model.

    Raises:
        `FileNotFoundError`: there is no such model.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error


def adapter_tokenizer(name: str, *, allow_modified: bool = False) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that an adapter brings, without the adapter; `None` where it brings none."""
    with open_adapter(name, allow_modified=allow_modified) as adapter:
        return load_tokenizer(adapter.tokenizer)


def _no_model(name: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"`{name}` cannot be loaded as a model ({str(error).strip().splitlines()[0]}). A folder with a model and "
        "its tokenizer, or a name on the Hub, is needed. Correct the name."
    )


@contextmanager
def with_adapter(
    base: PreTrainedModel, name: str, *, allow_modified: bool = False
) -> Iterator[tuple[PeftModel, PreTrainedTokenizerBase | None]]:
    """
    Put an adapter onto a base model for a while; afterwards the base is what it was.

    Yields the model and the adapter's own tokenizer, which may have another chat template than the base's and end its
    answers differently; `None` where it brings none.

    Args:
        base (`PreTrainedModel`): the base model.
        name (`str`): a LoRI adapter, merged or not, or a plain PEFT one: folder, compact file or repository.
        allow_modified (`bool`, *optional*, defaults to `False`): as of [`load_lori_adapter`].

    Raises:
        `ValueError`: the adapter is of another base.
        `FileNotFoundError`: there is no such adapter, or not in safetensors.
    """
    with open_adapter(name, allow_modified=allow_modified) as adapter:
        adapter.verify()
        tokenizer = load_tokenizer(adapter.tokenizer)
        _compare_precision(adapter, base)
        with room(base, adapter):
            model = load_with_peft(base, adapter)
            try:
                yield model.eval(), tokenizer
            finally:
                model.unload()
                if hasattr(base, "peft_config"):
                    del base.peft_config


def _compare_precision(adapter: AdapterFolder, base: PreTrainedModel) -> None:
    """Warn if the base was packed when the adapter was trained and is not now, or the other way round."""
    run = adapter.record.training if adapter.record is not None else None
    if run is None or run.base_model is None:
        return
    trained, now = run.base_model.quantization, quantization(base)
    if trained != now:
        logger.warning(
            f"`{adapter.name}` was trained on a base in {trained or 'full precision'}, and this one is in "
            f"{now or f'{base.dtype}'.removeprefix('torch.')}: its figures are not those that it was trained to. "
            + ("Pass `--load_in_4bit`." if trained == "4-bit" else "Leave `--load_in_4bit` out." if now else "")
        )
