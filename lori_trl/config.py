"""LoriSFTConfig: every LoRI field, documented."""

import copy
import os
from dataclasses import dataclass, field

from trl import SFTConfig

from .masks import check_sparsity, check_task_name
from .projections import PROJECTION_INITS


@dataclass
class LoriArguments:
    r"""
    The LoRI fields, to be mixed into any TRL config: `class LoriDPOConfig(LoriArguments, DPOConfig)`.

    Parameters:
        > Parameters that control the task and its mask

        task_name (`str`, *optional*):
            Name of the task: names the mask file, and with `seed` decides A. Defaults to the data set's name, or to a
            name made from its rows where it has none. Two tasks need two names, else they share A and can't be merged
            without interference.
        sparsity (`float`, *optional*, defaults to `0.9`):
            Share of B's entries that stay untouched, a fraction in [0, 1). The default is the paper's LoRI-S; `0` is
            LoRI-D: no calibration, all of B is trained. Higher: fewer trained parameters, less interference with other
            tasks, and a higher learning rate needed.
        mask_name_or_path (`str`, *optional*):
            Masks to use instead of calibrating: a folder, a file or a repository on the Hub. A fresh adapter then
            draws the A that these masks were calibrated on.
        mask_revision (`str`, *optional*):
            Branch, tag or commit of the masks' repository on the Hub; by default the head of `main`.

        > Parameters that control the calibration

        calibration_learning_rate (`float`, *optional*, defaults to `5e-5`):
            Learning rate while calibrating, when all of B is trained. The default is the paper's LoRI-D rate (Table
            4 to 7, Llama-3-8B, r = 32).
        calibration_num_train_epochs (`float`, *optional*):
            Epochs to calibrate. Defaults to `num_train_epochs`, as in the paper. Fewer: a quicker and noisier mask.
        calibration_max_steps (`int`, *optional*, defaults to `-1`):
            Optimizer steps to calibrate, if positive; takes precedence over the epochs. `-1` falls back on
            `max_steps` where `calibration_num_train_epochs` is unset.
        calibration_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the training rows to calibrate on, a fraction in (0, 1], drawn with `seed`.

        > Parameters that control the projection A

        projection_init (`str`, *optional*, defaults to `"gaussian"`):
            Distribution of A: `"gaussian"` N(0, 1/(3 d_in)) or `"kaiming_uniform"` U(-1/sqrt(d_in), 1/sqrt(d_in)), the
            authors' and PEFT's. Both have the same variance.
        projection_seed (`int`, *optional*):
            Seed of A. Defaults to one derived from `seed` and `task_name` by SHA-256.

    Source: paper section 2.1 and Algorithm 1; defaults from Tables 4 to 7.
    """

    task_name: str | None = field(
        default=None,
        metadata={
            "help": "Name of the task: names the mask file, and with `seed` decides A. Defaults to the name of the "
            "data set."
        },
    )
    sparsity: float = field(
        default=0.9,
        metadata={
            "help": "Share of B's entries that stay untouched, a fraction in [0, 1). 0 is LoRI-D: no calibration, all "
            "of B is trained."
        },
    )
    mask_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Masks to use instead of calibrating: a folder, a file or a repository on the Hub."},
    )
    mask_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the masks' repository on the Hub."}
    )
    calibration_learning_rate: float = field(
        default=5e-5, metadata={"help": "Learning rate while calibrating, when all of B is trained."}
    )
    calibration_num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs to calibrate. Defaults to `num_train_epochs`, as in the paper."}
    )
    calibration_max_steps: int = field(
        default=-1,
        metadata={"help": "Optimizer steps to calibrate, if positive; takes precedence over the epochs."},
    )
    calibration_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of the training rows to calibrate on, a fraction in (0, 1], drawn with `seed`."},
    )
    projection_init: str = field(
        default="gaussian",
        metadata={"help": "Distribution of A.", "choices": list(PROJECTION_INITS)},
    )
    projection_seed: int | None = field(
        default=None, metadata={"help": "Seed of A. Defaults to one derived from `seed` and `task_name`."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_sparsity(self.sparsity)
        if self.task_name is not None:
            check_task_name(self.task_name)
        if not 0 < self.calibration_fraction <= 1:
            raise ValueError(
                f"`calibration_fraction={self.calibration_fraction}` is outside (0, 1]. Pass a fraction, e.g. "
                "`calibration_fraction=0.1` to calibrate on a tenth of the rows."
            )
        if self.projection_init not in PROJECTION_INITS:
            raise ValueError(
                f"`projection_init={self.projection_init!r}` is not known. Allowed are {', '.join(PROJECTION_INITS)}. "
                "Leave it unset for 'gaussian'."
            )

    def for_calibration(self):
        """Return a copy for the calibration phase: its own rate, length and folder; no evaluation, no push."""
        args = copy.copy(self)
        args.output_dir = os.path.join(self.output_dir, "calibration")
        args.learning_rate = self.calibration_learning_rate
        if self.calibration_num_train_epochs is not None:
            args.num_train_epochs = self.calibration_num_train_epochs
        if self.calibration_max_steps > 0 or self.calibration_num_train_epochs is not None:
            args.max_steps = self.calibration_max_steps
        args.eval_strategy, args.eval_on_start, args.load_best_model_at_end = "no", False, False
        args.save_strategy = "no" if self.save_strategy == "best" else self.save_strategy
        args.push_to_hub = False
        return args


@dataclass
class LoriSFTConfig(LoriArguments, SFTConfig):
    """
    Configuration of the [`LoriSFTTrainer`]: the fields of [`LoriArguments`] and of [`~trl.SFTConfig`].

    > [!NOTE]
    > These parameters have default values different from `SFTConfig`:
    > - `learning_rate`: Defaults to `5e-4` instead of `2e-5` (the paper's LoRI-S, r = 32).
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"` (the paper's: no decay).
    """

    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the adaptation, on the mask."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The scheduler type to use, in both phases."})
