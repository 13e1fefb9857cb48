"""Train, share, merge and grow LoRI adapters with TRL and PEFT."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter.load import load_lori_adapter
    from .adapter.masks import LoriMasks
    from .adapter.push import push_lori_to_hub
    from .merging import merge_lori_adapters
    from .training.config import LoriArguments, LoriSFTConfig
    from .training.sft_trainer import LoriSFTTrainer
    from .training.trainer import LoriTrainerMixin
    from .training.trainers import (
        LoriDPOConfig,
        LoriDPOTrainer,
        LoriGRPOConfig,
        LoriGRPOTrainer,
        LoriKTOConfig,
        LoriKTOTrainer,
        LoriRewardConfig,
        LoriRewardTrainer,
        LoriRLOOConfig,
        LoriRLOOTrainer,
    )

_MODULES = {
    "LoriArguments": "training.config",
    "LoriDPOConfig": "training.trainers",
    "LoriDPOTrainer": "training.trainers",
    "LoriGRPOConfig": "training.trainers",
    "LoriGRPOTrainer": "training.trainers",
    "LoriKTOConfig": "training.trainers",
    "LoriKTOTrainer": "training.trainers",
    "LoriMasks": "adapter.masks",
    "LoriRLOOConfig": "training.trainers",
    "LoriRLOOTrainer": "training.trainers",
    "LoriRewardConfig": "training.trainers",
    "LoriRewardTrainer": "training.trainers",
    "LoriSFTConfig": "training.config",
    "LoriSFTTrainer": "training.sft_trainer",
    "LoriTrainerMixin": "training.trainer",
    "load_lori_adapter": "adapter.load",
    "merge_lori_adapters": "merging",
    "push_lori_to_hub": "adapter.push",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
