"""The mask: which entries of B a task may train. Its algebra, its statistics, its files."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .projections import module_path
from .selection import num_to_select, select_largest

FORMAT = "lori_masks"
FORMAT_VERSION = 1
MASKS_FOLDER = "masks"


def _layer(path: str) -> str:
    number = re.search(r"\.(\d+)\.", f".{path}.")
    return number.group(1) if number else "-1"


def _module(path: str) -> str:
    name = re.search(r"\.\d+\.(\w+)", f".{path}")
    return name.group(1) if name else path


def _projection(path: str) -> str:
    return path.rpartition(".")[2]


# What makes a pool of entries that compete with each other: module path -> the pool's name (paper section 3.5).
GRANULARITIES: dict[str, Callable[[str], str]] = {
    "model": lambda path: "model",
    "module": _module,
    "projection": _projection,
    "layer": _layer,
    "matrix": lambda path: path,
}


class LoriMasks(Mapping):
    """
    The masks of one task: module path in the base model -> bool tensor `(out_features, rank)`.

    True marks an entry of B that the task trains. Iteration is in sorted order of the paths.

    Args:
        masks (`Mapping[str, Tensor]`):
            Module path -> bool tensor `(out_features, rank)`. PEFT, DDP, FSDP and compile prefixes are stripped.
        task (`str`, *optional*):
            The task that the masks were calibrated for.
        sparsity (`float`, *optional*):
            The sparsity asked for, a fraction in [0, 1).
        granularity (`str`, *optional*, defaults to `"model"`):
            Over what the entries competed.
        threshold (`float`, *optional*):
            The smallest selected saliency (over all pools).
        projection (`dict[str, Any]`, *optional*):
            `init`, `seed` and `fingerprint` of the A that the masks were calibrated on. A mask's second index counts
            A's random directions, so a mask means nothing for another A.

    Raises:
        `TypeError`: a tensor is not boolean.
        `ValueError`: a tensor is not two-dimensional.

    ```python
    >>> import torch
    >>> from lori_trl import LoriMasks
    >>> masks = LoriMasks.select({"layers.0.q_proj": torch.tensor([[0.1, -3.0], [2.0, 0.0]])}, sparsity=0.5)
    >>> masks["layers.0.q_proj"].tolist(), masks.density
    ([[False, True], [True, False]], 0.5)

    ```
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        *,
        task: str | None = None,
        sparsity: float | None = None,
        granularity: str = "model",
        threshold: float | None = None,
        projection: dict[str, Any] | None = None,
    ):
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(
                    f"The mask of `{name}` has dtype {mask.dtype}. Masks are torch.bool: pass `tensor != 0`."
                )
            if mask.dim() != 2:
                raise ValueError(
                    f"The mask of `{name}` has shape {tuple(mask.shape)}. A mask has lora_B's shape, "
                    "(out_features, rank). Pass one two-dimensional tensor a module."
                )
        self._masks = dict(sorted((module_path(name), mask.detach()) for name, mask in masks.items()))
        self.task = task
        self.sparsity = sparsity
        self.granularity = granularity
        self.threshold = threshold
        self.projection = projection

    @classmethod
    def select(
        cls,
        saliency: Mapping[str, Tensor],
        sparsity: float,
        granularity: str = "model",
        exclude: Mapping[str, Tensor] | None = None,
        **metadata: Any,
    ) -> "LoriMasks":
        """
        Select the entries of largest saliency: exactly K = floor((1 - sparsity) * N) of every pool of N entries, or
        all nonzero ones if these are fewer.

        Args:
            saliency (`Mapping[str, Tensor]`):
                Module path -> tensor `(out_features, rank)`; its magnitude counts.
            sparsity (`float`):
                The share of B that stays untouched, a fraction in [0, 1).
            granularity (`str`, *optional*, defaults to `"model"`):
                Over what the entries compete, each a pool of its own: the whole `"model"`; every kind of `"module"`
                (attention, MLP) or of `"projection"` (`q_proj`, ...), every `"layer"`, or every `"matrix"`.
            exclude (`Mapping[str, Tensor]`, *optional*):
                Module path -> bool tensor of entries that are out of the race.
            **metadata:
                `task` and `projection` of [`LoriMasks`].

        Raises:
            `ValueError`: the sparsity is outside [0, 1), nothing is selected, or the saliency is not finite.

        Source: paper eq. 2; granularities: section 3.5.
        """
        check_sparsity(sparsity)
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"`granularity={granularity!r}` is not known. Allowed are {', '.join(GRANULARITIES)}. Leave it unset "
                "for 'model'."
            )
        saliency = {module_path(name): tensor for name, tensor in saliency.items()}
        pools: dict[str, list[str]] = {}
        for path in saliency:
            pools.setdefault(GRANULARITIES[granularity](path), []).append(path)
        masks, thresholds = {}, []
        for paths in pools.values():
            pool = {path: saliency[path] for path in paths}
            k = num_to_select(sparsity, sum(tensor.numel() for tensor in pool.values()))
            outside = {path: exclude[path] for path in paths if path in exclude} if exclude is not None else None
            chosen, threshold = select_largest(pool, k, outside)
            masks |= chosen
            thresholds += [threshold] if threshold > 0 else []
        threshold = min(thresholds, default=0.0)
        selected = cls(masks, sparsity=sparsity, granularity=granularity, threshold=threshold, **metadata)
        if selected.num_selected == 0:
            raise ValueError(
                f"Nothing was selected: of {selected.numel} entries at `sparsity={sparsity}`, none has a saliency "
                "above 0. At least one entry must stay trainable: lower `sparsity`, or calibrate longer or with a "
                "higher `calibration_learning_rate`."
            )
        return selected

    # ---- mapping -----------------------------------------------------------------------------------------------

    def __getitem__(self, path: str) -> Tensor:
        return self._masks[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return (
            f"LoriMasks(task={self.task!r}, modules={len(self)}, selected={self.num_selected}/{self.numel}, "
            f"density={self.density:.6f})"
        )

    # ---- algebra -----------------------------------------------------------------------------------------------

    def __and__(self, other: "LoriMasks") -> "LoriMasks":
        return self._combine(other, torch.logical_and)

    def __or__(self, other: "LoriMasks") -> "LoriMasks":
        return self._combine(other, torch.logical_or)

    def __sub__(self, other: "LoriMasks") -> "LoriMasks":
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    def __invert__(self) -> "LoriMasks":
        return LoriMasks({path: ~mask for path, mask in self.items()}, projection=self.projection)

    def __eq__(self, other: object) -> bool:
        """Compare modules and entries, wherever the tensors lie; task names and other metadata do not count."""
        if not isinstance(other, LoriMasks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            self[path].shape == other[path].shape and torch.equal(self[path], other[path].to(self[path].device))
            for path in self
        )

    __hash__ = None

    def overlap(self, other: "LoriMasks") -> float:
        """
        Return the share of this task's entries that the other task selects too, a fraction in [0, 1].

        Two independent masks of density 0.1 overlap by 0.1.
        """
        return (self & other).num_selected / max(self.num_selected, 1)

    def _combine(self, other: "LoriMasks", operation: Callable[[Tensor, Tensor], Tensor]) -> "LoriMasks":
        other.check_shapes({path: mask.shape for path, mask in self.items()})
        projection = self.projection if self.projection == other.projection else None
        masks = {path: operation(mask, other[path].to(mask.device)) for path, mask in self.items()}
        return LoriMasks(masks, projection=projection)

    # ---- statistics --------------------------------------------------------------------------------------------

    @property
    def num_selected(self) -> int:
        """Entries that the task trains."""
        return sum(int(mask.count_nonzero()) for mask in self.values())

    @property
    def numel(self) -> int:
        """All entries of B."""
        return sum(mask.numel() for mask in self.values())

    @property
    def density(self) -> float:
        """`num_selected / numel`, a fraction in [0, 1]."""
        return self.num_selected / max(self.numel, 1)

    def by_layer(self) -> dict[int, float]:
        """Return the density of every layer (the first number in a module path; -1 where there is none)."""
        return self._density_by(lambda path: int(_layer(path)))

    def by_projection(self) -> dict[str, float]:
        """Return the density of every projection type (the last part of a module path), e.g. `q_proj`."""
        return self._density_by(_projection)

    def _density_by(self, key: Callable[[str], Any]) -> dict[Any, float]:
        groups: dict[Any, list[Tensor]] = {}
        for path, mask in self.items():
            groups.setdefault(key(path), []).append(mask)
        return {
            group: sum(int(mask.count_nonzero()) for mask in masks) / sum(mask.numel() for mask in masks)
            for group, masks in sorted(groups.items())
        }

    # ---- checks ------------------------------------------------------------------------------------------------

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """
        Raise if these masks do not fit a set of lora_B matrices.

        Args:
            shapes (`Mapping[str, tuple[int, ...]]`): module path -> `(out_features, rank)`.

        Raises:
            `ValueError`: modules are missing, left over or of another shape; the first few are named.
        """
        faults = [f"{path} has no mask" for path in shapes if path not in self]
        faults += [f"{path} has a mask but no adapter" for path in self if path not in shapes]
        faults += [
            f"{path} has a mask {tuple(self[path].shape)} for lora_B {tuple(shape)}"
            for path, shape in shapes.items()
            if path in self and tuple(self[path].shape) != tuple(shape)
        ]
        if faults:
            raise ValueError(
                f"The masks{f' of task {self.task!r}' if self.task else ''} do not fit the adapter in {len(faults)} "
                f"modules: {'; '.join(faults[:3])}{'; ...' if len(faults) > 3 else ''}. Masks fit an adapter of the "
                "same base model, target modules and rank. Use the masks of such an adapter, or calibrate anew by "
                "leaving `mask_name_or_path` unset."
            )

    # ---- files -------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """
        Write `masks/<task>.safetensors` into a folder: one bit an entry, metadata as JSON.

        Args:
            folder (`str` or `Path`): the adapter's folder; made if missing.

        Returns:
            `Path`: the file. It replaces an older one in one step.

        Raises:
            `ValueError`: `task` is unset or no valid name.
        """
        check_task_name(self.task)
        file = Path(folder) / MASKS_FOLDER / f"{self.task}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        packed = {
            path: torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=None, bitorder="little"))
            for path, mask in self.items()
        }
        metadata = {
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "sparsity": self.sparsity,
            "granularity": self.granularity,
            "threshold": self.threshold,
            "projection": self.projection,
            "shapes": {path: list(mask.shape) for path, mask in self.items()},
        }
        metadata["sha256"] = _checksum(metadata, packed)
        partial = file.with_name(f".{file.name}.partial")
        save_file(packed, partial, metadata={FORMAT: json.dumps(metadata)})
        partial.replace(file)
        return file

    @classmethod
    def from_pretrained(cls, folder_or_file: str | Path, task: str | None = None) -> "LoriMasks":
        """
        Load the masks of a task.

        Args:
            folder_or_file (`str` or `Path`):
                An adapter's folder, its `masks/` folder, or a mask file.
            task (`str`, *optional*):
                Which task's masks, where a folder holds several; by default the newest.

        Raises:
            `FileNotFoundError`: there is no such folder, file or task.
            `ValueError`: the file is truncated, altered, of a later format or no mask file.
        """
        return cls._read(_find_mask_file(Path(folder_or_file), task))

    @classmethod
    def _read(cls, file: Path) -> "LoriMasks":
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = json.loads((opened.metadata() or {})[FORMAT])
                packed = {path: opened.get_tensor(path) for path in opened.keys()}  # noqa: SIM118
            version = metadata["format_version"]
            if version > FORMAT_VERSION:
                raise ValueError(
                    f"`{file}` has format_version {version}. This lori_trl reads versions up to {FORMAT_VERSION}. "
                    "Upgrade lori_trl."
                )
            if metadata.pop("sha256") != _checksum(metadata, packed):
                raise SafetensorError("the contents do not match their checksum")
            masks = {path: _unpack(packed[path], shape) for path, shape in metadata["shapes"].items()}
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"`{file}` is not a readable mask file: {error}. A mask file is what `LoriMasks.save_pretrained` "
                "writes. Fetch or save it again."
            ) from error
        return cls(
            masks,
            task=metadata["task"],
            sparsity=metadata["sparsity"],
            granularity=metadata["granularity"],
            threshold=metadata["threshold"],
            projection=metadata["projection"],
        )


def check_sparsity(sparsity: float) -> None:
    """Raise `TypeError` or `ValueError` unless a sparsity is a number in [0, 1)."""
    if not isinstance(sparsity, (int, float)):
        raise TypeError(f"`sparsity={sparsity!r}` is no number. Pass a fraction in [0, 1), e.g. `sparsity=0.9`.")
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"`sparsity={sparsity}` is outside [0, 1). Pass a fraction, e.g. `sparsity=0.9` to train 10 % of B."
        )


def check_task_name(task: str | None) -> None:
    """Raise `ValueError` unless a task's name can be a file's name everywhere."""
    if task is None or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", task):
        raise ValueError(
            f"`task_name={task!r}` cannot name a file. Up to 96 letters, digits, '.', '_' and '-' are allowed, the "
            "first a letter or digit. Pass e.g. `task_name='code'`."
        )


def _find_mask_file(path: Path, task: str | None) -> Path:
    if path.is_file():
        return path
    folder = path / MASKS_FOLDER if (path / MASKS_FOLDER).is_dir() else path
    files = {file.stem: file for file in sorted(folder.glob("*.safetensors")) if not file.stem.startswith("adapter_")}
    if not files:
        raise FileNotFoundError(
            f"`{path}` holds no masks. Masks are a .safetensors file or a folder with `{MASKS_FOLDER}/<task>"
            ".safetensors` in it. Pass the folder that `save_model()` wrote."
        )
    if task is not None and task not in files:
        raise FileNotFoundError(
            f"`{path}` has no masks of task {task!r}. It has those of {', '.join(files)}. Pass one of these as `task`."
        )
    if task is None and len(files) > 1 and (path / "lori_config.json").is_file():
        task = json.loads((path / "lori_config.json").read_text(encoding="utf-8"))["task"]
    return files[task] if task in files else max(files.values(), key=lambda file: file.stat().st_mtime)


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=shape[0] * shape[1], bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(shape)


def _checksum(metadata: Mapping[str, Any], packed: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for path in sorted(packed):
        digest.update(path.encode())
        digest.update(packed[path].numpy().tobytes())
    return digest.hexdigest()
