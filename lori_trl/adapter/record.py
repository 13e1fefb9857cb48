"""The record: what is known of an adapter and its runs, kept as `lori_config.json`."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..inputs.files import describe_fault, read_json
from ..inputs.typed_values import left_out, plain, typed
from ..method.layers import GRANULARITIES
from ..method.lora_fields import DECIDE_THE_DELTA, UNSET
from ..method.projections import Projection
from .layout import FORMAT_VERSION, MAX_JSON_BYTES, RECORD_NAME, check_task_name, check_version
from .record_fields import OPTIMIZER_CLASS, Calibration, Counts, Merge, Scalar, TaskRecord, Training

# How far a run is: nothing is trained; all of B is being trained for the mask; the mask is selected and B is set back;
# B is being, or was, trained on the mask.
PHASES = ("new", "calibrating", "calibrated", "adapting")
# Hyperparameters that a run which is resumed in its adaptation need not have in common with the one that began: it may
# be made longer.
LENGTH = ("max_steps", "num_train_epochs")
# What changes no more than the last digits; and what is compared when the optimizer is there.
_NOT_COMPARED = ("activation_checkpointing", OPTIMIZER_CLASS)
VARIANTS = ("LoRI-D", "LoRI-S", "merged")


@dataclass(frozen=True, kw_only=True)
class LoriRecord:
    """
    What is known of an adapter: the contents of `lori_config.json`.

    The facts of the newest task's run stand at the top, those of earlier tasks in `tasks`.

    Args:
        format_version (`int`): of `lori_config.json`.
        task (`str`): the newest task.
        phase (`str`): how far the run is that the weights come from, one of `PHASES`.
        variant (`str`): `"LoRI-D"`, `"LoRI-S"` or `"merged"`.
        sparsity (`float` or `None`): of the newest task, a fraction in [0, 1).
        granularity (`str` or `None`): over what its entries competed.
        threshold (`float` or `None`): the smallest saliency that was selected.
        projection ([`Projection`]): A.
        calibration ([`Calibration`] or `None`): how the newest task's mask was found; `None` where it was given.
        counts ([`Counts`]): parameters.
        tasks (`tuple[TaskRecord, ...]`): those with masks, oldest first.
        training ([`Training`] or `None`): the newest task's run.
        versions (`dict[str, str]`): package -> version.
        merge ([`Merge`], *optional*): how the adapter was merged.
        adapter_config (`str`): SHA-256 of PEFT's settings, see [`hash_settings`]; empty until the adapter is written.
        tensors (`dict[str, str]`): name -> SHA-256 of every saved tensor; empty until the adapter is written.
    """

    format_version: int = FORMAT_VERSION
    task: str
    phase: str
    variant: str
    sparsity: float | None
    granularity: str | None
    threshold: float | None
    projection: Projection
    calibration: Calibration | None
    counts: Counts
    tasks: tuple[TaskRecord, ...]
    training: Training | None = None
    versions: dict[str, str]
    merge: Merge | None = left_out()
    adapter_config: str = ""
    tensors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_run(
        cls,
        *,
        task: str,
        phase: str,
        sparsity: float | None,
        granularity: str,
        threshold: float | None,
        projection: Projection,
        calibration: Calibration | None,
        counts: Counts,
        selected: Mapping[str, int],
        columns: tuple[int, ...] | None,
        earlier: Iterable[TaskRecord],
        training: Training,
    ) -> "LoriRecord":
        """
        Describe a run as it stands.

        Args:
            selected (`Mapping[str, int]`): task -> entries that its mask selects, oldest first.
            columns (`tuple[int, ...]` or `None`): of the run's task; see [`TaskRecord`].
            earlier (`Iterable[TaskRecord]`): what is on record of earlier tasks.
            task, phase, sparsity, granularity, threshold, projection, calibration, counts, training: as above.
        """
        on_record = {record.task: record for record in earlier}
        return cls(
            task=task,
            phase=phase,
            variant="LoRI-D" if sparsity == 0 else "LoRI-S",
            sparsity=sparsity,
            granularity=granularity,
            threshold=threshold,
            projection=projection,
            calibration=calibration,
            counts=counts,
            tasks=tuple(on_record.get(name, TaskRecord(name, count, columns)) for name, count in selected.items()),
            training=training,
            versions=versions_of("lori_trl", "trl", "peft", "transformers", "torch"),
        )

    @classmethod
    def merged(
        cls,
        *,
        projection: Projection,
        counts: Counts,
        tasks: Sequence[TaskRecord],
        sources: Sequence["LoriRecord | None"],
        merge: Merge,
    ) -> "LoriRecord":
        """
        Describe a merged adapter, of which much is unknown.

        Args:
            sources (`Sequence[LoriRecord | None]`): the inputs' records; plain LoRA has none.
            projection, counts, tasks, merge: as above.
        """
        training = [source.training if source is not None else None for source in sources]
        licenses = {run.license if run is not None else None for run in training}
        base_models = [run.base_model for run in training if run is not None and run.base_model is not None]
        return cls(
            task="-".join(dict.fromkeys(adapter.task for adapter in merge.adapters))[:96],
            phase="adapting",
            variant="merged",
            sparsity=None,
            granularity=None,
            threshold=None,
            projection=projection,
            calibration=None,
            counts=counts,
            tasks=tuple(tasks),
            training=Training(
                base_model=base_models[0] if base_models else None,
                license=licenses.pop() if len(licenses) == 1 else None,
            ),
            versions=versions_of("lori_trl", "peft", "torch", "safetensors"),
            merge=merge,
        )

    @property
    def history(self) -> list[TaskRecord]:
        """The tasks, oldest first, each with the facts of its own run."""
        if self.merge is not None or not self.tasks:
            return list(self.tasks)
        *earlier, newest = self.tasks
        return [*earlier, replace(newest, calibration=self.calibration, training=self.training)]

    def keeping(
        self,
        tasks: Collection[str],
        *,
        sparsity: float | None,
        granularity: str | None,
        threshold: float | None,
        selected: int,
    ) -> "LoriRecord":
        """
        Describe what is left where only some of the tasks are kept.

        Args:
            tasks (`Collection[str]`): their names; at least one.
            sparsity, granularity, threshold, selected: of the masks of the newest of them.
        """
        *earlier, newest = [record for record in self.history if record.task in tasks]
        return replace(
            self,
            task=newest.task,
            variant="LoRI-D" if sparsity == 0 else "LoRI-S",
            sparsity=sparsity,
            granularity=granularity,
            threshold=threshold,
            calibration=newest.calibration,
            counts=replace(self.counts, selected=selected),
            tasks=(*earlier, TaskRecord(newest.task, newest.selected, newest.columns)),
            training=newest.training,
        )

    def sealed(self, adapter_config: Mapping[str, Any], tensors: Mapping[str, str]) -> "LoriRecord":
        """Add what a reader checks: the SHA-256 of PEFT's settings and of every tensor."""
        return replace(
            self,
            adapter_config=hash_settings(adapter_config),
            tensors=dict(sorted(tensors.items())),
        )

    def check_same_run(self, earlier: "LoriRecord", folder: str | Path) -> None:
        """
        Raise `ValueError` unless a run may go on from what an earlier one saved.

        Args:
            earlier (`LoriRecord`): what that one saved.
            folder (`str` or `Path`): where, for the message.
        """
        ours, theirs = self.training or Training(base_model=None), earlier.training or Training(base_model=None)
        names = [name for name in (*_settings(theirs), *_settings(ours)) if name not in _NOT_COMPARED]
        if earlier.phase == "adapting":
            names = [name for name in names if name not in LENGTH]
        mine, other = self._identity(names), earlier._identity(names)
        for name in sorted(mine, key=lambda name: name in names):  # the settings last: they follow from others
            if (own := mine[name]) != other[name]:
                raise ValueError(
                    f"`{folder}` was trained with {name} {other[name]}, this run has {own}. A run resumes with the "
                    "base model, task, data, hyperparameters and number of processes that it began with. Correct "
                    "these, or start anew in another `output_dir`."
                )

    def _identity(self, settings: Iterable[str]) -> dict[str, Any]:
        run = self.training or Training(base_model=None)
        return {name: _settings(run).get(name, "its default") for name in settings} | {
            "base_model": None if run.base_model is None else run.base_model.name,
            "quantization": None if run.base_model is None else run.base_model.quantization,
            "task": self.task,
            "projection": self.projection,
            "sparsity": self.sparsity,
            "granularity": self.granularity,
            "data": None if run.dataset is None else run.dataset.fingerprint,
            "num_processes": run.world_size,
        }

    def check(self) -> None:
        """
        Check what types do not say.

        Raises:
            `ValueError`: a name cannot name a file, a number is outside its range, or two fields contradict.
        """
        for name in (self.task, *(record.task for record in self.tasks)):
            check_task_name(name)
        faults = {
            "phase": self.phase not in PHASES,
            "variant": self.variant not in VARIANTS or (self.variant == "merged") != (self.merge is not None),
            "sparsity": self.sparsity is not None and not 0 <= self.sparsity < 1,
            "granularity": self.granularity is not None and self.granularity not in GRANULARITIES,
            "projection": not self.projection.fingerprint.startswith("sha256:"),
            "counts": not 0 <= (self.counts.selected or 0) <= self.counts.lora_B <= self.counts.lora,
            "tasks": len({record.task for record in self.tasks}) < len(self.tasks)
            or any(not 0 <= record.selected <= self.counts.lora_B for record in self.tasks)
            or any(not _is_range(record.columns) for record in self.tasks),
            "adapter_config": not self.adapter_config,
            "tensors": not self.tensors,
        }
        wrong = [name for name, is_wrong in faults.items() if is_wrong]
        if wrong:
            raise ValueError(f"{wrong[0]}={getattr(self, wrong[0])!r}")

    @classmethod
    def from_dict(cls, values: Any, file: str | Path = RECORD_NAME, *, allow_modified: bool = False) -> "LoriRecord":
        """
        Make a record from plain values, as JSON gives them.

        Args:
            values (`Any`): the contents of a `lori_config.json`.
            file (`str` or `Path`, *optional*): where they come from, for the message.
            allow_modified (`bool`, *optional*, defaults to `False`): take a record that was changed.

        Raises:
            `ValueError`: they are no record, of a later format, or changed.
        """
        try:
            if not isinstance(values, Mapping):
                raise TypeError(f"{type(values).__name__} instead of an object")
            values = dict(values)
            checksum = values.pop("sha256", None)
            check_version(values.get("format_version"), file)
        except TypeError as error:
            raise _unreadable(file, error) from error
        if checksum != _checksum(values) and not allow_modified:
            raise ValueError(
                f"`{file}` was changed after it was saved: its contents do not match its own checksum. What it says "
                "of masks and A decides what an adapter is. Fetch or save it again; if you changed it on purpose, "
                "pass `allow_modified=True` (`--allow_modified`)."
            )
        try:
            record = typed(cls, values, "")
            record.check()
        except (TypeError, ValueError) as error:
            raise _unreadable(file, error) from error
        return record

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them, with a checksum over all of them."""
        values = plain(self)
        return {**values, "sha256": _checksum(values)}

    def to_json(self) -> str:
        """Return the contents of `lori_config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _settings(run: Training) -> dict[str, Scalar]:
    return {**(run.hyperparameters or {}), **(run.settings or {})}


def read_record(folder: str | Path, *, allow_modified: bool = False) -> LoriRecord:
    """
    Read a folder's `lori_config.json`.

    Raises:
        `FileNotFoundError`: there is none.
        `ValueError`: it is unreadable, changed, or of a later format.
    """
    file = Path(folder) / RECORD_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"`{folder}` holds no {RECORD_NAME}. A LoRI adapter's folder has one, beside PEFT's adapter_config.json. "
            "Pass the folder that `save_model()` wrote, or that `lori expand` makes of a compact file."
        )
    return LoriRecord.from_dict(read_json(file, MAX_JSON_BYTES), file, allow_modified=allow_modified)


def hash_settings(adapter_config: Mapping[str, Any]) -> str:
    """
    Hash what of PEFT's `adapter_config.json` decides what the adapter does to its modules: SHA-256.

    The same for any order of keys and names, whichever version of PEFT wrote the file, and wherever the base model
    lies. Which modules the adapter has, its tensors say, which have hashes of their own.
    """
    values = {
        name: sorted(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else value
        for name in DECIDE_THE_DELTA & adapter_config.keys()
        if (value := adapter_config[name]) not in UNSET
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of packages, of those that are installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a source tree that is not installed
            versions[name] = "unknown"
    return versions


def _is_range(columns: tuple[int, ...] | None) -> bool:
    return columns is None or (len(columns) == 2 and 0 <= columns[0] < columns[1])


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _unreadable(file: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"`{file}` is unreadable ({describe_fault(error)}). It must be the JSON that `save_model()` wrote. Fetch it "
        "again."
    )
