"""An adapter as a GGUF file, which llama.cpp and Ollama put onto a GGUF of its base model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import mode

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import is_gguf_available

from ..inputs.files import replacing
from ..method.layers import projection_of
from ..recipes.base_configs import KNOWN_CONFIGS
from .folder import AdapterFolder, base_name, may_be_one_base, open_adapter, read_modules
from .layout import task_name_of
from .plain_lora import check_plain
from .write import check_output_file

logger = logging.getLogger(__name__)

# transformers' `model_type` -> llama.cpp's architecture, as far as its answers were compared with PEFT's.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ROTATE_NEIGHBOURS = {"llama"}  # the others rotate the halves of a head, as transformers does


def export_gguf(
    adapter: str | Path,
    file: str | Path,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
    allow_modified: bool = False,
) -> Path:
    """
    Write an adapter as llama.cpp's LoRA file, in float32, and beside it a `.Modelfile` for Ollama.

    Args:
        adapter (`str` or `Path`): a folder, a compact file or a repository on the Hub; of LoRI or plain LoRA.
        file (`str` or `Path`): where to.
        base_model (`str`, *optional*):
            The base model, of which only the config is read: a folder or a name on the Hub. By default the one that
            the adapter names.
        overwrite (`bool`, *optional*, defaults to `False`): whether files that are there may be replaced.
        allow_modified (`bool`, *optional*, defaults to `False`):
            Take an adapter whose B was changed after `lori_trl` saved it.

    Returns:
        `Path`: the file, written in one step.

    Raises:
        `ImportError`: the package `gguf` is not installed.
        `FileNotFoundError`: the adapter or the base's config does not exist.
        `FileExistsError`: a file exists, or is being written.
        `ValueError`: the file lies in the adapter's folder, a file of the adapter is unreadable or changed, or
            llama.cpp has no place for what it holds.
    """
    if not is_gguf_available():
        raise ImportError(
            "`gguf` is not installed, and `lori export --gguf` writes with it. It comes with the extra `gguf`. Run "
            "`pip install gguf`."
        )
    file = Path(file)
    modelfile = file.with_name(f"{file.name}.Modelfile")
    for output in (file, modelfile):
        check_output_file(output, adapter, overwrite=overwrite)
    with open_adapter(adapter, allow_modified=allow_modified) as source:
        check_plain(source, "exported to GGUF")
        config = _base_config(source, base_model)
        names = _tensor_names(source, config)
        with replacing(file, seconds=0) as partial, replacing(modelfile, seconds=0) as text:
            text.write_text(_modelfile(file, source.base or base_name(base_model)), encoding="utf-8")
            _write(partial, source, config, names)
            for output in (file, modelfile):
                check_output_file(output, adapter, overwrite=overwrite)  # another process may have been faster
    return file


def interleave_halves(B: Tensor, heads: int) -> Tensor:
    """
    Reorder the rows of q's or k's B to llama.cpp's rotary convention.

    transformers rotates a head's output i together with i + head_dim / 2, llama.cpp's llama 2 i together with 2 i + 1.

    Args:
        B (`Tensor`): lora_B `(heads * head_dim, rank)`.
        heads (`int`): how many heads its rows make up.

    ```python
    >>> interleave_halves(torch.arange(8)[:, None], heads=2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]

    ```
    """
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _base_config(adapter: AdapterFolder, base_model: str | None) -> PreTrainedConfig:
    """Return the config of the base model, of an architecture that llama.cpp's answers were compared for."""
    if base_model is not None and not may_be_one_base([adapter.base, base_name(base_model)]):
        logger.warning(
            f"`{adapter.name}` was trained on `{adapter.base}`, and is exported for `{base_model}`. If these are two "
            "names of one model, all is well; else leave `--base_model` out."
        )
    name = base_model or adapter.base_location
    if name is None:
        raise ValueError(
            f"`base_model` is missing, and `{adapter.name}` names none. It is a folder or a name on the Hub; only its "
            "config is read. Pass e.g. `--base_model meta-llama/Meta-Llama-3-8B`."
        )
    try:
        config = KNOWN_CONFIGS.get(name) or AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The config of the base model `{name}` cannot be read ({str(error).strip().splitlines()[0]}). A folder "
            "with its config.json, or a name on the Hub, is needed. Pass it as `--base_model`."
        ) from error
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"The base model `{name}` has model_type={config.model_type!r}, for which no file of ours was compared in "
            f"llama.cpp. Compared are {', '.join(ARCHITECTURES)}. Convert the adapter with llama.cpp's own "
            "convert_lora_to_gguf.py."
        )
    return config


def _tensor_names(adapter: AdapterFolder, config: PreTrainedConfig) -> dict[str, str]:
    """Return module path -> llama.cpp's name of its weight."""
    import gguf

    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type].upper()]
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {path: known.get_name(path) for path in adapter.shapes}
    of_embeddings = {"lm_head"} if config.tie_word_embeddings else set()
    nameless = [path for path, name in names.items() if name is None or path in of_embeddings]
    if nameless:
        raise ValueError(
            f"`{adapter.name}` adapts {', '.join(nameless[:3])}{', ...' if len(nameless) > 3 else ''}, and llama.cpp's"
            f" {ARCHITECTURES[config.model_type]} of {config.num_hidden_layers} layers has no such weight of its own. "
            "Linear layers within its blocks can be exported. Train on those, or name the right `--base_model`."
        )
    return {path: f"{name}.weight" for path, name in names.items()}


def _alphas(adapter: AdapterFolder) -> dict[str, float]:
    """Return module path -> the alpha that gives its scaling in llama.cpp, alpha / rank; in float32, as it is kept."""
    alphas = {path: float(np.float32(adapter.scalings[path] * rank)) for path, (_, rank, _) in adapter.shapes.items()}
    if 0 in alphas.values():
        raise ValueError(
            f"`{adapter.name}` has a scaling of 0, which llama.cpp takes for 1. Any other is allowed. Set "
            "`lora_alpha` in adapter_config.json as it was trained."
        )
    return alphas


def _write(file: Path, adapter: AdapterFolder, config: PreTrainedConfig, names: Mapping[str, str]) -> None:
    import gguf

    alphas = _alphas(adapter)
    alpha = mode(alphas.values())  # llama.cpp has one for all: where a module has another, its B makes up for it
    writer = gguf.GGUFWriter(file, ARCHITECTURES[config.model_type], use_temp_file=True)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(adapter.title)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_string(gguf.Keys.Adapter.LORA_TASK_NAME, adapter.task)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if adapter.base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, adapter.base.rpartition("/")[2])
        if "/" in adapter.base:
            writer.add_base_model_organization(0, adapter.base.partition("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{adapter.base}")
    for path, factors in read_modules([adapter], names, torch.float32):
        A, B = factors[0]
        writer.add_tensor(f"{names[path]}.lora_a", A.numpy())
        writer.add_tensor(f"{names[path]}.lora_b", _rows_in_order(B, path, config).mul(alphas[path] / alpha).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rows_in_order(B: Tensor, path: str, config: PreTrainedConfig) -> Tensor:
    """Return a module's B with its rows as llama.cpp has the outputs of that module."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(projection_of(path))
    if heads is None or ARCHITECTURES[config.model_type] not in _ROTATE_NEIGHBOURS:
        return B
    if len(B) != heads * config.head_dim:
        raise ValueError(
            f"{path} has {len(B)} outputs, and {heads} heads of {config.head_dim} in the base model's config. They "
            "must agree. Pass the base that the adapter was trained on as `--base_model`."
        )
    return interleave_halves(B, heads)


def _modelfile(file: Path, base: str | None) -> str:
    base_file = task_name_of((base or "").rpartition("/")[2], "base-model")
    return (
        f"# ollama create NAME -f {file.name}.Modelfile\n"
        f"# FROM: the base model as GGUF, in float32, float16 or quantized.\n"
        f"FROM ./{base_file}.gguf\n"
        f"ADAPTER ./{file.name}\n"
    )
