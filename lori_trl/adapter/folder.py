"""The one reader: an adapter's folder, compact file or repository, without the base model, every byte checked."""

import logging
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..hub.download import is_repo_id
from ..inputs.files import describe_fault, read_json, room_for
from ..inputs.typed_values import typed
from ..method.layers import module_path
from ..method.lora_fields import KNOWN, UNSET
from .adapter_contents import Contents
from .compact_file import read_compact
from .fetch import fetch_adapter, refuse_other_weights
from .layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    COMPACT_NAME,
    MASKS_FOLDER,
    MAX_JSON_BYTES,
    PEFT_FILES,
    RECIPE_NAME,
    RECORD_NAME,
    is_authors_masks,
    masks_name,
    task_name_of,
    tokenizer_files,
)
from .masks import LoriMasks
from .record import LoriRecord, hash_settings, read_record
from .safetensors import hash_tensor, opened
from .write import write_contents

logger = logging.getLogger(__name__)


@contextmanager
def open_adapter(
    name: str | Path, *, revision: str | None = None, token: str | None = None, allow_modified: bool = False
) -> Iterator["AdapterFolder"]:
    """
    Fetch or unpack an adapter where need be, and yield what its files say.

    Args:
        name (`str` or `Path`): a folder, a compact file or a repository on the Hub; of LoRI or plain LoRA.
        revision (`str`, *optional*): a branch, tag or commit of the repository; by default the head of `main`.
        token (`str`, *optional*): a token that may read the repository; by default that of `hf auth login`.
        allow_modified (`bool`, *optional*, defaults to `False`):
            Take an adapter whose B, settings or record were changed after `lori_trl` saved it.

    Raises:
        `FileNotFoundError`: the adapter does not exist or lacks a file.
        `ValueError`: a file is unreadable, changed, or no LoRA adapter's.
        `PermissionError`, `ConnectionError`: the repository cannot be fetched.
    """
    path = Path(name)
    if is_repo_id(name):
        path = fetch_adapter(str(name), revision=revision, token=token)
    place = path
    if path.is_dir() and (path / COMPACT_NAME).is_file() and not (path / ADAPTER_WEIGHTS).is_file():
        path = path / COMPACT_NAME
    if path.is_file():
        with tempfile.TemporaryDirectory() as unpacked:
            with room_for(Path(unpacked)):
                write_contents(unpacked, read_compact(path))
            yield AdapterFolder(str(name), Path(unpacked), allow_modified, tokenizer_files(place))
    elif path.is_dir():
        yield AdapterFolder(str(name), path, allow_modified, tokenizer_files(place))
    else:
        raise FileNotFoundError(
            f"`{name}` does not exist. An adapter is a folder, a compact file, or a repository on the Hub, "
            "namespace/name. Correct the name."
        )


class AdapterFolder:
    """
    An adapter: what its files say, without its matrices, which [`read_modules`] reads.

    Args:
        name (`str`): as it was given.
        folder (`Path`): where its plain files are.
        allow_modified (`bool`): as of [`open_adapter`].
        tokenizer (`dict[str, Path]`, *optional*): the files of its own tokenizer; a compact file has none.

    Attributes:
        config (`dict[str, Any]`): PEFT's `adapter_config.json`.
        record ([`LoriRecord`] or `None`): `lori_config.json`; plain LoRA has none.
        shapes (`dict[str, tuple[int, int, int]]`): module path -> `(out_features, rank, in_features)`, sorted.
        dtypes (`set[str]`): those of A and B, as safetensors names them.
        unpaired (`list[str]`): modules without both lora_A `(rank, in_features)` and lora_B `(out_features, rank)`.
        others (`list[str]`): names of tensors that are no lora_A or lora_B.
    """

    def __init__(
        self, name: str, folder: Path, allow_modified: bool = False, tokenizer: Mapping[str, Path] | None = None
    ):
        self.name, self.folder, self.allow_modified = name, folder, allow_modified
        self.tokenizer = dict(tokenizer or {})
        for file in PEFT_FILES:
            if not (folder / file).is_file():
                refuse_other_weights(name, (other.name for other in folder.glob("adapter_model*")))
                raise FileNotFoundError(
                    f"`{name}` holds no {file}. An adapter has {' and '.join(PEFT_FILES)}. Fetch or save it again."
                )
        self.config = _read_adapter_config(folder / ADAPTER_CONFIG)
        is_lori = (folder / RECORD_NAME).is_file()
        self.record: LoriRecord | None = read_record(folder, allow_modified=allow_modified) if is_lori else None
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.dtypes: set[str] = set()
        self.unpaired: list[str] = []
        self.others: list[str] = []
        self._names: dict[tuple[str, str], str] = {}
        self._read_header()
        if self.record is not None:
            self._compare_with_record(self.record)

    @property
    def weights(self) -> Path:
        """The file with the matrices."""
        return self.folder / ADAPTER_WEIGHTS

    def _read_header(self) -> None:
        pairs: dict[str, dict[str, list[int]]] = {}
        with opened(self.weights) as tensors:
            self._metadata = tensors.metadata() or {}
            for name in tensors.keys():  # noqa: SIM118
                part = re.search(r"\.(lora_[AB])(\.default)?\.weight$", name)
                if part is None:
                    self.others.append(name)
                    continue
                tensor = tensors.get_slice(name)
                self._names[module_path(name), part[1]] = name
                pairs.setdefault(module_path(name), {})[part[1]] = tensor.get_shape()
                self.dtypes.add(tensor.get_dtype())
        for path, pair in sorted(pairs.items()):
            match pair.get("lora_A"), pair.get("lora_B"):
                case [rank, columns], [rows, rank_B] if rank == rank_B:
                    self.shapes[path] = rows, rank, columns
                case _:
                    self.unpaired.append(path)

    def _compare_with_record(self, record: LoriRecord) -> None:
        """Raise if the files are not those that the record was written for."""
        names = {*self._names.values(), *self.others}
        differing = sorted(names ^ record.tensors.keys())
        if differing:
            raise ValueError(
                f"`{self.weights}` and {RECORD_NAME} name different tensors: {differing[0]} is in one of them only"
                f"{f', as {len(differing) - 1} others are' if len(differing) > 1 else ''}. Each must have what the "
                "other names. Fetch or save the adapter again."
            )
        if self._metadata not in ({}, {"format": "pt"}):
            raise ValueError(
                f"`{self.weights}` has metadata {str(self._metadata)[:80]}. PEFT writes {{'format': 'pt'}}. Fetch or "
                "save the adapter again."
            )
        if hash_settings(self.config) != record.adapter_config:
            self._refuse_or_warn(f"{ADAPTER_CONFIG} has other settings than it was saved with")

    def _refuse_or_warn(self, change: str) -> None:
        if not self.allow_modified:
            raise ValueError(
                f"`{self.name}`: {change}. All must be as it was saved. If that was on purpose, e.g. because plain "
                "PEFT went on training this adapter, pass `allow_modified=True` (`--allow_modified`); else fetch or "
                "save the adapter again."
            )
        logger.warning(f"`{self.name}`: {change}. It is taken as it is.")

    def check(self, name: str, tensor: Tensor) -> Tensor:
        """
        Compare a tensor of the file with the record, and return it.

        Raises:
            `ValueError`: it is another one than was saved.
        """
        if self.record is None or hash_tensor(tensor) == self.record.tensors[name]:
            return tensor
        if ".lora_A." in name:
            raise ValueError(
                f"`{self.weights}`: {name} is not what was saved, its SHA-256 is another. B and the masks mean "
                "nothing on another A. Fetch or save the adapter again; if it was cast to a lower precision, use the "
                "original."
            )
        self._refuse_or_warn(f"{name} is not what was saved, its SHA-256 is another")
        return tensor

    def verify(self) -> None:
        """
        Read all tensors and masks once and compare them with what was saved.

        Raises:
            `ValueError`: one is another than was saved, or unreadable.
        """
        with opened(self.weights) as tensors:
            for name in [*self._names.values(), *self.others]:
                self.check(name, tensors.get_tensor(name))
        _ = self.masks

    def contents(self) -> Contents:
        """
        Read all of a LoRI adapter into memory.

        Raises:
            `FileNotFoundError`: it is none.
            `ValueError`: a file is unreadable or not what was saved.
        """
        record = self.record or read_record(self.folder)
        with opened(self.weights) as tensors:
            state = {name: self.check(name, tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118
        recipe = self.folder / RECIPE_NAME
        return Contents(
            self.config,
            record,
            recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
            {task: (dict(masks), masks.metadata) for task, masks in self.masks.items()},
            state,
        )

    def setting(self, path: str, name: str, pattern: str) -> Any:
        """Return what the config says of a module: what its `pattern` has for it, else `name` of all modules."""
        if not (patterns := self.config.get(pattern)):
            return self.config[name]
        from peft.utils.other import get_pattern_key  # PEFT's own way, for the few adapters that have patterns

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
        """The base model's name, on the Hub or of a local folder: the record knows which, wherever this is read."""
        run = self.record.training if self.record is not None else None
        is_local = run is not None and run.base_model is not None and run.base_model.id is None
        return base_name(self.config.get("base_model_name_or_path"), is_local=is_local)

    @property
    def base_location(self) -> str | None:
        """Where the base model can be loaded from: its folder if that is here, else its name; `None` if unknown."""
        path = self.config.get("base_model_name_or_path")
        return path if path and Path(path).exists() else self.base

    @property
    def title(self) -> str:
        """The Hub name, or the name of the local folder or file: never where that lies."""
        return self.name if is_repo_id(self.name) else Path(self.name).resolve().name

    @property
    def task(self) -> str:
        """The newest task; where there is no record, a name made of the folder's or repository's."""
        return self.record.task if self.record is not None else task_name_of(Path(self.title).name, "lora")

    @property
    def tasks(self) -> list[str]:
        """The tasks that have masks, oldest first; one of the authors' adapters has one."""
        if self.record is not None:
            return [task.task for task in self.record.tasks]
        names = [f"{MASKS_FOLDER}/{file.name}" for file in (self.folder / MASKS_FOLDER).glob("*")]
        return [self.task] if any(map(is_authors_masks, names)) else []

    @cached_property
    def masks(self) -> dict[str, LoriMasks]:
        """The masks of all tasks, oldest first. Raises as [`read_masks`]."""
        return {task: self.read_masks(task) for task in self.tasks}

    def read_masks(self, task: str) -> LoriMasks:
        """
        Read the masks of one of its tasks; of one of the authors' adapters, the mask that it was trained on.

        Raises:
            `FileNotFoundError`: they are missing.
            `ValueError`: they are unreadable, or do not fit B or the record.
        """
        if self.record is None:
            return self._authors_mask()
        file = self.folder / masks_name(task)
        masks = LoriMasks.from_pretrained(file)
        masks.check_shapes({path: (rows, rank) for path, (rows, rank, _) in self.shapes.items()})
        selected = next(each.selected for each in self.record.tasks if each.task == task)
        if (masks.task, masks.num_selected) != (task, selected):
            raise ValueError(
                f"`{file}` selects {masks.num_selected:,} entries for {masks.task!r}, {RECORD_NAME} says "
                f"{selected:,} for {task!r}. They must agree. Fetch or save the adapter again."
            )
        return masks

    def _authors_mask(self) -> LoriMasks:
        """The mask beside the adapter if it was trained on it; else what of B is not zero."""
        mask = LoriMasks.from_pretrained(self.folder, self.task)
        mask.check_shapes({path: (rows, rank) for path, (rows, rank, _) in self.shapes.items()})
        read = read_modules([self], self.shapes, torch.float32)
        moved = LoriMasks({path: factors[0][1] != 0 for path, factors in read}, task=self.task)
        return moved if (moved - mask).num_selected else mask

    def read(self, tensors: safe_open, path: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """
        Read a module's A `(rank, in_features)` and B `(out_features, rank)` from its opened file.

        Raises:
            `ValueError`: an entry is not finite, or a matrix is not what was saved.
        """
        names = [self._names[path, part] for part in ("lora_A", "lora_B")]
        A, B = (self.check(name, tensors.get_tensor(name)).to(dtype) for name in names)
        for part, tensor in (("lora_A", A), ("lora_B", B)):
            if tensor.sum().isfinite():
                continue  # a sum of which one term is not finite is not either
            if count := tensor.numel() - int(tensor.isfinite().sum()):
                raise ValueError(
                    f"`{self.name}`: {part} of {path} has {count} entries that are NaN or infinite. All must be "
                    "finite: nothing follows from an adapter that holds NaN or infinity. Use a checkpoint from "
                    "before the run diverged, or train again with a lower learning rate."
                )
        return A, B


_MODULES_AT_ONCE = 7  # those of a layer


def read_modules(
    adapters: Sequence[AdapterFolder], paths: Iterable[str], dtype: torch.dtype
) -> Iterator[tuple[str, dict[int, tuple[Tensor, Tensor]]]]:
    """
    Read module after module. Few are in memory at once: what was read of a mapped file stays there while it is mapped,
    so files are opened anew for every few modules.

    Args:
        adapters (`Sequence[AdapterFolder]`): the adapters.
        paths (`Iterable[str]`): the modules' paths.
        dtype (`torch.dtype`): what A and B are converted to.

    Returns:
        `Iterator`: a module's path, and number of an adapter that has it -> A `(rank, in_features)` and B
            `(out_features, rank)`.

    Raises:
        `ValueError`: an entry is not finite, or a matrix is not what was saved.
    """
    paths = iter(paths)
    while some := list(islice(paths, _MODULES_AT_ONCE)):
        with ExitStack() as stack:
            files = [stack.enter_context(opened(each.weights)) for each in adapters]
            for path in some:
                has_it = [number for number, adapter in enumerate(adapters) if path in adapter.shapes]
                yield path, {number: adapters[number].read(files[number], path, dtype) for number in has_it}


def base_name(name_or_path: str | None, *, is_local: bool = False) -> str | None:
    """
    Reduce a base model's name to what two machines have in common: the Hub name, or the local folder's name.

    Args:
        name_or_path (`str`, *optional*): the name.
        is_local (`bool`, *optional*, defaults to `False`): whether it is known to be no Hub name, whatever its form.

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
    return (
        name_or_path
        if is_repo_id(name_or_path) and not is_local
        else re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1]
    )


def may_be_one_base(names: Iterable[str | None]) -> bool:
    """
    Say whether base models' names, as [`base_name`] reduces them, may all mean one model: a local folder may hold what
    the Hub has under the same last name.
    """
    known = {name for name in names if name is not None}
    on_hub = {name for name in known if "/" in name}
    return len(on_hub) <= 1 and len({name.rpartition("/")[2].lower() for name in known}) <= 1


@dataclass(frozen=True)
class _Settings:
    """What is read here of PEFT's `adapter_config.json`."""

    r: int
    lora_alpha: float
    use_rslora: bool | None
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    base_model_name_or_path: str | None


def _read_adapter_config(file: Path) -> dict[str, Any]:
    try:
        config = read_json(file, MAX_JSON_BYTES)
        if not isinstance(config, dict):
            raise TypeError(f"{type(config).__name__} instead of an object")
        if (kind := config.get("peft_type", "LORA")) != "LORA":
            raise ValueError(f"peft_type={kind!r}")
        known = typed(_Settings, {each.name: config.get(each.name) for each in fields(_Settings)}, "")
        ranks = [known.r, *(known.rank_pattern or {}).values()]
        if min(ranks) < 1:
            raise ValueError(f"ranks {ranks}")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{file}` is no LoRA adapter's ({describe_fault(error)}). It must be the JSON that PEFT wrote, with `r` "
            "and `lora_alpha`. Fetch or save the adapter again."
        ) from error
    if unknown := _unknown_settings(config):
        raise ValueError(
            f"`{file}` sets {', '.join(f'{name}={value!r:.80}' for name, value in unknown.items())}, which PEFT "
            f"{version('peft')} does not know: what the adapter computes with it cannot be known either. Allowed are "
            "the fields of PEFT's `LoraConfig`. Upgrade lori_trl and peft; or take out what you know changes nothing."
        )
    return config


def _unknown_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config sets beyond the fields of LoRA; what a later PEFT writes by default is none of it."""
    unknown = {name: value for name, value in config.items() if name not in KNOWN and value not in UNSET}
    if unknown:
        from peft import LoraConfig  # not before: it takes seconds

        defaults = LoraConfig().to_dict()
        unknown = {name: value for name, value in unknown.items() if name not in defaults or defaults[name] != value}
    return unknown
