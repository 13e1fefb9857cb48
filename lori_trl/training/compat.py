"""
Every difference between the versions of TRL and transformers that are supported, each with the version that ends it.

The one other place is `hub/compat.py`. No other module asks for a version. When the lower bounds in `pyproject.toml`
rise to what stands beside a difference, it goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

from datasets import Dataset
from packaging.version import Version
from transformers import TrainingArguments

if "activation_checkpointing" in {each.name for each in fields(TrainingArguments)}:

    @dataclass
    class CheckpointingFields:
        """Nothing to add: transformers has the fields."""

else:  # transformers below 5.23 knows `activation_checkpointing` as `gradient_checkpointing`

    @dataclass
    class CheckpointingFields:  # type: ignore[no-redef]
        """The fields that transformers has from 5.23 on, so that recipes read the same with each version."""

        activation_checkpointing: bool | None = field(
            default=None,
            metadata={
                "help": "Enable activation checkpointing to trade compute for memory.",
                "nargs": "?",
                "const": True,
            },
        )
        activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
            default=None,
            metadata={"help": "Keyword arguments passed to `gradient_checkpointing_enable()`."},
        )

        def __post_init__(self) -> None:
            for new in ("activation_checkpointing", "activation_checkpointing_kwargs"):
                old = new.replace("activation", "gradient")
                if getattr(self, new) is not None:
                    setattr(self, old, getattr(self, new))
            super().__post_init__()  # type: ignore[misc]
            self.activation_checkpointing = self.gradient_checkpointing  # type: ignore[attr-defined]
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs  # type: ignore[attr-defined]


def check_versions(given: Mapping[str, Any]) -> None:
    """
    Refuse by name what an installed version can't do.

    Args:
        given (`Mapping[str, Any]`): a trainer's arguments, name -> value.

    Raises:
        `ValueError`: TRL 1.8 would look for the reference's log probabilities in a file that it has not written.
    """
    if not getattr(given["args"], "precompute_ref_log_probs", False) or Version(version("trl")) >= Version("1.9"):
        return
    rows = given["train_dataset"]
    if isinstance(rows, Dataset) and not rows.cache_files:
        raise ValueError(
            "`precompute_ref_log_probs=True` with rows in memory needs TRL 1.9. With TRL 1.8 rows from files are "
            "allowed. Save the rows and load them again, or run `pip install 'trl>=1.9'`."
        )
