"""An adapter's matrices, read from its files module by module, without the base model."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adapter import CONFIG_NAME, PEFT_FILES, check_peft_files, plain_folder, read_lori_config
from .download import MAX_JSON_BYTES, is_repo_id
from .layers import module_path
from .masks import COMPACT_NAME, LoriMasks, choose_mask_files


@contextmanager
def open_adapter(name: str | Path, token: str | None = None) -> Iterator["AdapterFile"]:
    """
    Fetch or unpack an adapter where need be, and yield what its files say.

    Args:
        name (`str` or `Path`): a folder, a compact file or a repository on the Hub; of LoRI or plain LoRA.
        token (`str`, *optional*): a token that may read the repository; by default that of `hf auth login`.

    Raises:
        `FileNotFoundError`: the adapter does not exist or lacks a file.
        `ValueError`: a file is unreadable or no LoRA adapter's.
        `PermissionError`, `ConnectionError`: the repository cannot be fetched.
    """
    with plain_folder(name, token=token, choose=_choose_files) as folder:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"`{name}` does not exist. An adapter is a folder, a compact file, or a repository on the Hub, "
                "namespace/name. Correct the name."
            )
        yield AdapterFile(str(name), folder)


def _choose_files(names: list[str]) -> list[str]:
    """Choose what to fetch of a repository: the plain files, with masks where there are some; else the compact one."""
    if not {*PEFT_FILES} <= {*names}:
        return [name for name in names if name == COMPACT_NAME]
    return [*(choose_mask_files(names) or [name for name in names if name == CONFIG_NAME]), *PEFT_FILES]


class AdapterFile:
    """
    An adapter: what its files say, without its matrices, which [`read_modules`] reads.

    Args:
        name (`str`): as it was given.
        folder (`Path`): where its plain files are.

    Attributes:
        config (`dict[str, Any]`): PEFT's `adapter_config.json`.
        lori_config (`dict[str, Any]` or `None`): `lori_config.json`; plain LoRA has none.
        shapes (`dict[str, tuple[int, int, int]]`): module path -> `(out_features, rank, in_features)`, sorted.
        dtypes (`set[str]`): those of A and B, as safetensors names them.
        unpaired (`list[str]`): modules without both lora_A `(rank, in_features)` and lora_B `(out_features, rank)`.
        others (`list[str]`): names of tensors that are no lora_A or lora_B.
    """

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        check_peft_files(folder)
        self.config = _read_adapter_config(folder / PEFT_FILES[0])
        self.lori_config = read_lori_config(folder) if (folder / CONFIG_NAME).is_file() else None
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.dtypes: set[str] = set()
        self.unpaired: list[str] = []
        self.others: list[str] = []
        self._names: dict[tuple[str, str], str] = {}
        self._read_header(folder / PEFT_FILES[1])

    def _read_header(self, file: Path) -> None:
        found: dict[str, dict[str, list[int]]] = {}
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = re.search(r"\.(lora_[AB])(\.default)?\.weight$", name)
                    if part is None:
                        self.others.append(name)
                        continue
                    tensor = opened.get_slice(name)
                    self._names[module_path(name), part[1]] = name
                    found.setdefault(module_path(name), {})[part[1]] = tensor.get_shape()
                    self.dtypes.add(tensor.get_dtype())
        except SafetensorError as error:
            raise ValueError(
                f"`{file}` is unreadable ({error}). It must be a whole safetensors file. Fetch or save it again."
            ) from error
        for path, pair in sorted(found.items()):
            match pair.get("lora_A"), pair.get("lora_B"):
                case [rank, columns], [rows, rank_B] if rank == rank_B:
                    self.shapes[path] = rows, rank, columns
                case _:
                    self.unpaired.append(path)

    def setting(self, path: str, name: str, pattern: str) -> Any:
        """Return what the config says of a module: what its `pattern` has for it, else `name` of all modules."""
        patterns = self.config.get(pattern) or {}
        return patterns.get(get_pattern_key(patterns, path), self.config[name])

    @cached_property
    def scalings(self) -> dict[str, float]:
        """Module path -> alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        root = math.sqrt if self.config.get("use_rslora") else float
        return {
            path: self.setting(path, "lora_alpha", "alpha_pattern") / root(rank)
            for path, (_, rank, _) in self.shapes.items()
        }

    @cached_property
    def rank(self) -> int:
        """The highest rank of its modules."""
        return max(rank for _, rank, _ in self.shapes.values())

    @property
    def base(self) -> str | None:
        """The base model's name, on the Hub or of a local folder."""
        return base_name(self.config.get("base_model_name_or_path"))

    @property
    def title(self) -> str:
        """The Hub name, or the name of the local folder or file: never where that lies."""
        return self.name if is_repo_id(self.name) else Path(self.name).resolve().name

    @property
    def tasks(self) -> list[str]:
        """The tasks that have masks, oldest first."""
        return [record["task"] for record in self.lori_config["tasks"]] if self.lori_config is not None else []

    def masks(self, task: str) -> LoriMasks:
        """Load the masks of one of its tasks; raise `ValueError` if they do not fit B."""
        masks = LoriMasks.from_pretrained(self.folder, task=task)
        masks.check_shapes({path: (rows, rank) for path, (rows, rank, _) in self.shapes.items()})
        return masks

    def _read(self, opened: safe_open, path: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = (opened.get_tensor(self._names[path, part]).to(dtype) for part in ("lora_A", "lora_B"))
        for name, tensor in (("lora_A", A), ("lora_B", B)):
            if tensor.sum().isfinite():
                continue  # a sum of which one term is not finite is not either
            if count := tensor.numel() - int(tensor.isfinite().sum()):
                raise ValueError(
                    f"`{self.name}`: {name} of {path} has {count} entries that are NaN or infinite. All must be "
                    "finite: nothing follows from an adapter that holds NaN or infinity. Use a checkpoint from "
                    "before the run diverged, or train again with a lower learning rate."
                )
        return A, B


_MODULES_AT_ONCE = 7  # those of a layer


def read_modules(
    adapters: Sequence[AdapterFile], paths: Iterable[str], dtype: torch.dtype
) -> Iterator[tuple[str, dict[int, tuple[Tensor, Tensor]]]]:
    """
    Read module after module. Few are in memory at once: what was read of a mapped file stays there while it is mapped,
    so files are opened anew for every few modules.

    Args:
        adapters (`Sequence[AdapterFile]`): the adapters.
        paths (`Iterable[str]`): the modules' paths.
        dtype (`torch.dtype`): what A and B are converted to.

    Returns:
        `Iterator`: a module's path, and number of an adapter that has it -> A `(rank, in_features)` and B
            `(out_features, rank)`.

    Raises:
        `ValueError`: an entry is not finite.
    """
    paths = iter(paths)
    while some := list(islice(paths, _MODULES_AT_ONCE)):
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(each.folder / PEFT_FILES[1], framework="pt")) for each in adapters]
            for path in some:
                has_it = [number for number, adapter in enumerate(adapters) if path in adapter.shapes]
                yield path, {number: adapters[number]._read(opened[number], path, dtype) for number in has_it}


def base_name(name_or_path: str | None) -> str | None:
    """
    Reduce a base model's name to what two machines have in common: the Hub name, or the local folder's name.

    ```python
    >>> base_name("/models/hub/models--meta-llama--Meta-Llama-3-8B/snapshots/8cde5ca/")
    'meta-llama/Meta-Llama-3-8B'
    >>> base_name("/models/Meta-Llama-3-8B")
    'Meta-Llama-3-8B'

    ```
    """
    if not name_or_path:
        return None
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots", name_or_path)
    if cached:
        return cached[1].replace("--", "/")
    return name_or_path if is_repo_id(name_or_path) else re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1]


def _read_adapter_config(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{file.stat().st_size / 1e6:.0f} MB")
        config = json.loads(file.read_text(encoding="utf-8"))
        if (kind := config.get("peft_type", "LORA")) != "LORA":
            raise ValueError(f"peft_type={kind!r}")
        if not (config["r"] > 0 and math.isfinite(config["lora_alpha"])):
            raise ValueError(f"r={config['r']}, lora_alpha={config['lora_alpha']}")
        return config
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"`{file}` is no LoRA adapter's ({error!r}). It must be the JSON that PEFT wrote, with `r` and "
            "`lora_alpha`. Fetch or save the adapter again."
        ) from error
