"""The models to compare: a base model, adapters on it one after another, whole models besides."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..adapter import CONFIG_NAME, PEFT_FILES, load_lori_adapter
from ..download import fetch_from_hub, is_repo_id
from ..masks import check_header

logger = logging.getLogger(__name__)


def is_whole_model(name: str) -> bool:
    """Say whether a name is a folder with a whole model, as full fine-tuning saves it."""
    return (Path(name) / "config.json").is_file() and not (Path(name) / PEFT_FILES[0]).is_file()


def find_base_model(base_model: str | None, models: Sequence[str]) -> str | None:
    """
    Find the base model of adapters.

    Args:
        base_model (`str`, *optional*): the one that was asked for; it is returned.
        models (`Sequence[str]`): folders of adapters or whole models, compact files, repositories on the Hub.

    Returns:
        `str` or `None`: a folder or a name on the Hub; `None` if there are only whole models.

    Raises:
        `ValueError`: no base is named, or several are.
        `FileNotFoundError`: one of `models` is neither an adapter nor a model.
    """
    bases = {name: _base_on_record(name) for name in models if not is_whole_model(name)}
    if base_model is not None:
        for name, base in bases.items():
            if base is not None and Path(base).name != Path(base_model).name:
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
    if len({Path(base).name for base in bases.values()}) > 1:
        listed = ", ".join(f"{name}: {base}" for name, base in bases.items())
        raise ValueError(
            f"The adapters have different base models ({listed}). One call compares adapters of one base. Call "
            "`lori eval` once for each base."
        )
    return next(iter(bases.values()), None)


def load_model(name: str, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a whole model and its tokenizer, on the GPU if there is one.

    Raises:
        `FileNotFoundError`: there is no such model.
    """
    try:
        device_map = "auto" if torch.cuda.is_available() else None
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), device_map=device_map)
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"`{name}` cannot be loaded as a model ({str(error).strip().splitlines()[0]}). A folder with a model and "
            "its tokenizer, or a name on the Hub, is needed. Correct the name."
        ) from error


@contextmanager
def with_adapter(base: PreTrainedModel, name: str) -> Iterator[PeftModel]:
    """
    Put an adapter onto a base model for a while; afterwards the base is what it was.

    Args:
        base (`PreTrainedModel`): the base model.
        name (`str`): a LoRI adapter, merged or not, or a plain PEFT one: folder, compact file or repository.

    Raises:
        `ValueError`: the adapter is of another base.
        `FileNotFoundError`: there is no such adapter, or not in safetensors.
    """
    folder = Path(name)
    is_lori = folder.is_file() or (folder.is_dir() and not (folder / PEFT_FILES[1]).is_file())
    if is_repo_id(name):
        try:
            folder = fetch_from_hub(name, lambda names: [file for file in names if file in PEFT_FILES])
        except FileNotFoundError:
            is_lori = True  # the compact form alone
    if not is_lori:
        names = _check_fit(base, folder, name)
    if is_lori or (folder / CONFIG_NAME).is_file():
        model = load_lori_adapter(base, name)
    else:
        model = PeftModel.from_pretrained(base, str(folder))
    try:
        if not is_lori:
            untouched = [key for key in get_peft_model_state_dict(model) if ".lora_" in key and key not in names]
            if untouched:
                raise _misfit(name, base, f"it has nothing for {len(untouched)} matrices, such as {untouched[0]}")
        yield model.eval()
    finally:
        model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config


def _base_on_record(name: str) -> str | None:
    """Read which base an adapter was trained on; None for the compact form, which does not say."""
    folder = Path(name)
    if is_repo_id(name):
        try:
            folder = fetch_from_hub(name, lambda names: [file for file in names if file == PEFT_FILES[0]])
        except FileNotFoundError:
            return None
    elif not folder.exists():
        raise FileNotFoundError(
            f"`{name}` does not exist. An adapter's folder, a model's folder or a repository on the Hub, "
            "`namespace/name`, is needed. Correct the name."
        )
    if not (folder / PEFT_FILES[0]).is_file():
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(
                f"`{name}` holds neither an adapter ({PEFT_FILES[0]}) nor a model (config.json). Pass the folder that "
                "`save_model()` wrote."
            )
        return None
    return json.loads((folder / PEFT_FILES[0]).read_text(encoding="utf-8")).get("base_model_name_or_path")


def _check_fit(base: PreTrainedModel, folder: Path, name: str) -> set[str]:
    """Compare an adapter's matrices with the base's modules; return their names."""
    check_header(folder / PEFT_FILES[1])
    modules = dict(base.named_modules())
    with safe_open(folder / PEFT_FILES[1], framework="pt") as file:
        names = set(file.keys())
        for key in names:
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
            if match is None:
                continue
            module = modules.get(match[1])
            if module is None:
                raise _misfit(name, base, f"it has no module {match[1]}")
            size = file.get_slice(key).get_shape()[1 if match[2] == "A" else 0]
            expected = getattr(module, "in_features" if match[2] == "A" else "out_features", size)
            if size != expected:
                raise _misfit(name, base, f"{match[1]} has {expected} features where the adapter has {size}")
    return names


def _misfit(name: str, base: PreTrainedModel, why: str) -> ValueError:
    return ValueError(
        f"`{name}` does not fit the base model `{base.name_or_path}`: {why}. An adapter works on the base that it was "
        "trained on. Pass that one as `--base_model`."
    )
