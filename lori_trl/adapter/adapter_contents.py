"""An adapter as a whole, in memory, whichever form it has on disk."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .mask_files import MasksMetadata
from .record import LoriRecord


@dataclass(frozen=True)
class Contents:
    """All that makes an adapter."""

    adapter_config: dict[str, Any]  # PEFT's `adapter_config.json`
    record: LoriRecord  # `lori_config.json`
    recipe: str | None  # `recipe.yaml`
    masks: dict[str, tuple[dict[str, Tensor], MasksMetadata]]  # task -> its masks and what is known of them
    tensors: dict[str, Tensor]  # those of `adapter_model.safetensors`
