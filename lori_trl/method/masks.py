"""The mask: which entries of B a task may train. Its selection, its algebra, its statistics."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from .layers import GRANULARITIES, layer_of, module_path, pools, projection_of
from .projections import Projection
from .sparsity import check_sparsity, num_to_select


class Masks(Mapping):
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
        projection ([`Projection`], *optional*):
            The A that the masks were calibrated on. A mask's second index counts A's random directions, so a mask
            means nothing for another A.

    Raises:
        `TypeError`: a tensor is not boolean.
        `ValueError`: a tensor is not two-dimensional.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        *,
        task: str | None = None,
        sparsity: float | None = None,
        granularity: str = "model",
        threshold: float | None = None,
        projection: Projection | None = None,
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
    ) -> Self:
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
                `task` and `projection` of the masks.

        Raises:
            `ValueError`: the sparsity is outside [0, 1), nothing is selected, or the saliency is not finite.

        Source: paper eq. 2; granularities: section 3.5.
        """
        from ..method.selection import select_largest  # not before: PyTorch's sharded tensors take half its own time

        check_sparsity(sparsity)
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"`granularity={granularity!r}` is not known. Allowed are {', '.join(GRANULARITIES)}. Leave it unset "
                "for 'model'."
            )
        saliency = {module_path(name): tensor for name, tensor in saliency.items()}
        masks: dict[str, Tensor] = {}
        thresholds = []
        for paths in pools(saliency, granularity).values():
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
            f"{type(self).__name__}(task={self.task!r}, modules={len(self)}, "
            f"selected={self.num_selected}/{self.numel}, density={self.density:.6f})"
        )

    # ---- algebra -----------------------------------------------------------------------------------------------

    def __and__(self, other: "Masks") -> Self:
        return self._combine(other, torch.logical_and)

    def __or__(self, other: "Masks") -> Self:
        return self._combine(other, torch.logical_or)

    def __sub__(self, other: "Masks") -> Self:
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    def __invert__(self) -> Self:
        return type(self)({path: ~mask for path, mask in self.items()}, projection=self.projection)

    def __eq__(self, other: object) -> bool:
        """Compare modules and entries, wherever the tensors lie; task names and other metadata do not count."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            self[path].shape == other[path].shape and torch.equal(self[path], other[path].to(self[path].device))
            for path in self
        )

    __hash__ = None  # type: ignore[assignment]

    def overlap(self, other: "Masks") -> float:
        """
        Return the share of this task's entries that the other task selects too, a fraction in [0, 1].

        Two independent masks of density 0.1 overlap by 0.1.
        """
        return (self & other).num_selected / max(self.num_selected, 1)

    def _combine(self, other: "Masks", operation: Callable[[Tensor, Tensor], Tensor]) -> Self:
        other.check_shapes({path: mask.shape for path, mask in self.items()})
        projection = self.projection if self.projection == other.projection else None
        masks = {path: operation(mask, other[path].to(mask.device)) for path, mask in self.items()}
        return type(self)(masks, projection=projection)

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
        return self._density_by(lambda path: int(layer_of(path)))

    def by_layer_and_projection(self) -> dict[tuple[int, str], float]:
        """Return the density of every cell of the paper's Figure 6: (layer, projection type)."""
        return self._density_by(lambda path: (int(layer_of(path)), projection_of(path)))

    def by_projection(self) -> dict[str, float]:
        """Return the density of every projection type (the last part of a module path), e.g. `q_proj`."""
        return self._density_by(projection_of)

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
