"""LoRI for TRL's other trainers, in pairs as TRL has them: a config and a trainer."""

from dataclasses import dataclass

from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from ..inputs.help_texts import help_from_docstring
from .config import LoriArguments
from .rollouts import RolloutTrainerMixin
from .trainer import LoriTrainerMixin


@help_from_docstring
@dataclass
class LoriPolicyArguments(LoriArguments):
    """
    [`LoriArguments`] for the trainers that move a policy away from a reference in small steps.

    The paper trains on completions alone, so these rates follow from TRL's; nobody has tuned them.

    > [!NOTE]
    > These parameters have default values different from TRL's:
    > - `calibration_learning_rate`: Learning rate while calibrating, when all of B is trained. Defaults to `1e-5`, ten
    >   times TRL's rate for all weights, as TRL advises for LoRA.
    > - `learning_rate`: Learning rate of the adaptation, on the mask. Defaults to `1e-4`, ten times the calibration's,
    >   as in the paper (Tables 4 to 7).
    > - `lr_scheduler_type`: Schedule of the adaptation's learning rate. Defaults to `"constant"` instead of `"linear"`
    >   (the paper's: no decay).
    > - `bf16`: Defaults to `False` instead of `True` where there is no accelerator: CPUs are slow at it or refuse.
    """

    calibration_learning_rate: float = 1e-5
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "constant"


@dataclass
class LoriDPOConfig(LoriPolicyArguments, DPOConfig):
    """Configuration of the [`LoriDPOTrainer`]: [`LoriPolicyArguments`] and the fields of [`~trl.DPOConfig`]."""


class LoriDPOTrainer(LoriTrainerMixin, DPOTrainer):
    """
    Direct preference optimization of LoRI adapters: [`LoriTrainerMixin`] on TRL's [`~trl.DPOTrainer`].

    The reference is the base model, or a frozen copy of the adapter that is continued.
    """

    _tag_names = ["trl", "dpo", "lori"]
    config_class = LoriDPOConfig


@dataclass
class LoriKTOConfig(LoriPolicyArguments, KTOConfig):
    """Configuration of the [`LoriKTOTrainer`]: [`LoriPolicyArguments`] and the fields of [`~trl.KTOConfig`]."""


class LoriKTOTrainer(LoriTrainerMixin, KTOTrainer):
    """Kahneman-Tversky optimization of LoRI adapters: [`LoriTrainerMixin`] on TRL's [`~trl.KTOTrainer`]."""

    _tag_names = ["trl", "kto", "lori"]
    config_class = LoriKTOConfig


@dataclass
class LoriGRPOConfig(LoriPolicyArguments, GRPOConfig):
    """Configuration of the [`LoriGRPOTrainer`]: [`LoriPolicyArguments`] and the fields of [`~trl.GRPOConfig`]."""


class LoriGRPOTrainer(RolloutTrainerMixin, GRPOTrainer):
    """
    Group relative policy optimization of LoRI adapters: [`LoriTrainerMixin`] on TRL's [`~trl.GRPOTrainer`].

    Each phase generates its own completions: none of the calibrated policy's are learnt from after B was set back.
    """

    _tag_names = ["trl", "grpo", "lori"]
    config_class = LoriGRPOConfig


@dataclass
class LoriRLOOConfig(LoriPolicyArguments, RLOOConfig):
    """Configuration of the [`LoriRLOOTrainer`]: [`LoriPolicyArguments`] and the fields of [`~trl.RLOOConfig`]."""


class LoriRLOOTrainer(RolloutTrainerMixin, RLOOTrainer):
    """
    REINFORCE leave-one-out of LoRI adapters: [`LoriTrainerMixin`] on TRL's [`~trl.RLOOTrainer`].

    Each phase generates its own completions: none of the calibrated policy's are learnt from after B was set back.
    """

    _tag_names = ["trl", "rloo", "lori"]
    config_class = LoriRLOOConfig


@help_from_docstring
@dataclass
class LoriRewardConfig(LoriArguments, RewardConfig):
    """
    Configuration of the [`LoriRewardTrainer`]: the fields of [`LoriArguments`] and of [`~trl.RewardConfig`].

    > [!NOTE]
    > These parameters have default values different from `RewardConfig`:
    > - `learning_rate`: Learning rate of the adaptation, on the mask, and of the head. Defaults to `5e-4` instead of
    >   `1e-4` (the paper's LoRI-S, r = 32).
    > - `lr_scheduler_type`: Schedule of the adaptation's learning rate. Defaults to `"constant"` instead of `"linear"`
    >   (the paper's: no decay).
    > - `bf16`: Defaults to `False` instead of `True` where there is no accelerator: CPUs are slow at it or refuse.
    """

    learning_rate: float = 5e-4
    lr_scheduler_type: str = "constant"


class LoriRewardTrainer(LoriTrainerMixin, RewardTrainer):
    """
    Reward models as LoRI adapters: [`LoriTrainerMixin`] on TRL's [`~trl.RewardTrainer`].

    With `task_type="SEQ_CLS"` in the `LoraConfig`, PEFT trains and saves the model's head besides: densely, and set
    back after the calibration.
    """

    _tag_names = ["trl", "reward-trainer", "lori"]
    config_class = LoriRewardConfig
