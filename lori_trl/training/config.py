"""LoriSFTConfig: every LoRI field, documented."""

import copy
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from trl import SFTConfig

from ..adapter.layout import check_task_name
from ..inputs.help_texts import help_from_docstring
from ..inputs.intervals import INTERVALS, range_fault
from ..method.layers import GRANULARITIES
from ..method.projections import CONTRASTIVE, PROJECTION_INITS
from ..method.saliency import CALIBRATION_METHODS, GRADIENT_BATCHES
from ..method.sparse import SPARSE_BACKENDS
from .compat import CheckpointingFields

# The schedules that need no arguments and no evaluations.
CALIBRATION_SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
CHOICES_OF_BACKEND = ("auto", *SPARSE_BACKENDS)

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import TrainingArguments as Arguments
else:
    Arguments = object


@help_from_docstring
@dataclass
class LoriArguments(CheckpointingFields, Arguments):
    r"""
    The LoRI fields, to be mixed into any TRL config: `class LoriDPOConfig(LoriArguments, DPOConfig)`.

    Parameters:
        > Parameters that control the task and its mask

        task_name (`str`, *optional*):
            Name of the task: names the mask file, and with `seed` decides A. Defaults to the data set's name.

            Where the data set has none, the name is made from its rows. Two tasks need two names, else they share A
            and can't be merged without interference.
        sparsity (`float`, *optional*, defaults to `0.9`):
            Share of B's entries that stay untouched, a fraction in [0, 1). `0` is LoRI-D: no calibration, all of B is
            trained.

            The default is the paper's LoRI-S. Higher: fewer trained parameters, less interference with other tasks,
            and a higher learning rate needed.
        mask_granularity (`str`, *optional*, defaults to `"model"`):
            Over what the entries of B compete for the mask. The paper finds the whole model best.

            Or over every `"module"` (attention, MLP), `"projection"`, `"layer"` or `"matrix"` by itself.
        mask_name_or_path (`str`, *optional*):
            Masks to use instead of calibrating: a folder, a file or a repository on the Hub.

            A fresh adapter then draws the A that these masks were calibrated on.
        mask_revision (`str`, *optional*):
            Branch, tag or commit of the masks' repository on the Hub; by default the head of `main`.
        disjoint_masks (`bool`, *optional*, defaults to `False`):
            Whether the entries of earlier tasks are out of the race when an adapter is continued (LoRAF).

            No task then ever changes another's entries, and each can be extracted or removed later.

        > Parameters that control the calibration

        calibration_method (`str`, *optional*, defaults to `"train"`):
            How the mask is found: `"train"` selects what moved most in a dense run, `"gradient"` where the gradients
            of a few batches agree in sign, `"random"` draws it.

            `"train"` is the paper's way. It costs a dense run of its own. `"gradient"` moves nothing: the gradients of
            a few batches at B0 are summed up, and the entries on whose sign they agree most are selected, by |sum g| /
            sqrt(sum g^2). It costs those batches, two float32 numbers an entry of B, and no learning rate. `"random"`
            draws the mask from `seed` and `task_name`. It costs nothing, works in one phase, and needs no data. What
            is measured of their losses is in `docs/results.md`.
        calibration_learning_rate (`float`, *optional*, defaults to `5e-5`):
            Learning rate while calibrating, when all of B is trained.

            Only `calibration_method="train"` has one. The default is the paper's LoRI-D rate (Tables 4 to 7,
            Llama-3-8B, r = 32).
        calibration_num_train_epochs (`float`, *optional*):
            Epochs to calibrate. Defaults to `num_train_epochs`, as in the paper.

            Fewer: a quicker and noisier mask.
        calibration_max_steps (`int`, *optional*, defaults to `-1`):
            Optimizer steps to calibrate, if positive; takes precedence over the epochs.

            `-1` falls back on `max_steps` where `calibration_num_train_epochs` is unset; with
            `calibration_method="gradient"` on 8.
        calibration_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the training rows to calibrate on, a fraction in (0, 1], drawn with `seed`.

            Streamed data have no number of rows: with them it must be 1.
        calibration_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Schedule of the calibration.

            One of `"constant"`, as in the paper, `"constant_with_warmup"`, `"linear"`, `"cosine"`,
            `"cosine_with_restarts"`, `"polynomial"` and `"inverse_sqrt"`. `lr_scheduler_type`, `lr_scheduler_kwargs`
            and `warmup_steps` are the adaptation's alone.
        calibration_warmup_steps (`float`, *optional*, defaults to `0`):
            Steps over which the calibration's rate rises, or their share of its steps if below 1.
        calibration_sparsities (`list[float]`, *optional*):
            More sparsities to select masks for, from the same calibration.

            They are saved in `calibration/masks/<task>-<sparsity>.safetensors`, for `mask_name_or_path` of later runs.

        > Parameters that control the projection A

        projection_init (`str`, *optional*, defaults to `"gaussian"`):
            Distribution of A.

            `"gaussian"` is N(0, 1/(3 d_in)); `"kaiming_uniform"` is U(-1/sqrt(d_in), 1/sqrt(d_in)), the authors' and
            PEFT's. Both have the same variance. `"contrastive"` takes the directions that the task's own rows use and
            those in `protect` do not, from the base model's activations.
        projection_seed (`int`, *optional*):
            Seed of A. Defaults to one derived from `seed` and `task_name` by SHA-256.
        protect (`list[str]`, *optional*):
            What a contrastive A leaves alone: data sets on the Hub, .jsonl or .json files, folders.

            Rows of earlier tasks, or general text; or folders of adapters that were trained with `save_moments`.
            Without it, A follows the task's own rows alone.
        protect_rows (`int`, *optional*, defaults to `48`):
            Rows of every data set, and of the task's own, that a contrastive A is made from.

            They are evenly spread.
        protect_epsilon (`float`, *optional*, defaults to `0.1`):
            How much use of a protected direction counts as none, in units of the mean.

            Higher: more of A is what the task uses most, less of it is what the protected data do not use.
        save_moments (`bool`, *optional*, defaults to `False`):
            Whether the adapter carries what a later task's `protect` needs in place of its rows.

            That is the 64 leading directions of each layer's input over `protect_rows` of its rows, in bfloat16, 2
            bytes an entry. They are means over thousands of tokens; still, they tell what the rows are about.

        grow (`int`, *optional*):
            Rows of A, and columns of B, that an earlier adapter gets for the new task. Its own stay as they are.

            So a further task has an A of its own, by `projection_init`, and trains `1 - sparsity` of the new columns
            alone. What is saved is plain LoRA of the summed rank. Without it, a further task shares the adapter's A.

        > Parameters that control the training

        sparse_backend (`str`, *optional*, defaults to `"auto"`):
            How B is trained on the mask: `"packed"` has gradients and optimizer state for the trained entries alone,
            `"hook"` for all of B. `"auto"` is packed where that is possible and saves memory.

            `"packed"` keeps the trained entries of a matrix in one 1-D parameter. `"hook"` keeps B dense and zeroes
            its gradient outside the mask, as the paper does. Both train the same entries to the same values, unless an
            optimizer's update depends on the shape of a parameter (Adafactor's does). For such optimizers `"auto"` is
            hook, and so it is under ZeRO-3, under FSDP2 with a calibration, and with vLLM's rollouts. The log and the
            record tell which one it was.

    Source: paper section 2.1 and Algorithm 1; defaults from Tables 4 to 7. Disjoint masks: LoRAF, section 2.2.
    """

    task_name: str | None = None
    sparsity: float = 0.9
    mask_granularity: str = field(default="model", metadata={"choices": list(GRANULARITIES)})
    mask_name_or_path: str | None = None
    mask_revision: str | None = None
    disjoint_masks: bool = False
    calibration_method: str = field(default="train", metadata={"choices": list(CALIBRATION_METHODS)})
    calibration_learning_rate: float = 5e-5
    calibration_num_train_epochs: float | None = None
    calibration_max_steps: int = -1
    calibration_fraction: float = 1.0
    calibration_lr_scheduler_type: str = field(default="constant", metadata={"choices": list(CALIBRATION_SCHEDULES)})
    calibration_warmup_steps: float = 0
    calibration_sparsities: list[float] | None = None
    projection_init: str = field(default="gaussian", metadata={"choices": list(PROJECTION_INITS)})
    projection_seed: int | None = None
    protect: list[str] | None = None
    protect_rows: int = 48
    protect_epsilon: float = 0.1
    save_moments: bool = False
    grow: int | None = None
    sparse_backend: str = field(default="auto", metadata={"choices": list(CHOICES_OF_BACKEND)})

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.number):  # exactly as it is written: float32's 0.9 is 0.9, and JSON can hold it
                setattr(self, name, (int if isinstance(value, np.integer) else float)(str(value)))
        if self.bf16 is None and not torch.accelerator.is_available():  # type: ignore[has-type]
            self.bf16 = False
        self._check_intervals()
        super().__post_init__()
        if self.task_name is not None:
            check_task_name(self.task_name)
        self._check_calibration()
        self._check_projection()
        for name, allowed in (
            ("mask_granularity", list(GRANULARITIES)),
            ("calibration_method", CALIBRATION_METHODS),
            ("calibration_lr_scheduler_type", CALIBRATION_SCHEDULES),
            ("projection_init", PROJECTION_INITS),
            ("sparse_backend", CHOICES_OF_BACKEND),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is not known. Allowed are {', '.join(allowed)}. Leave it unset "
                    f"for {allowed[0]!r}."
                )

    def _check_calibration(self) -> None:
        if self.calibration_warmup_steps > 0 and self.calibration_lr_scheduler_type == "constant":
            raise ValueError(
                f"`calibration_warmup_steps={self.calibration_warmup_steps}` has no effect with "
                "`calibration_lr_scheduler_type='constant'`, which has no warm-up. Pass 'constant_with_warmup', or "
                "leave `calibration_warmup_steps` unset."
            )
        if self.calibration_method == "random" and self.calibration_sparsities:
            raise ValueError(
                f"`calibration_sparsities={self.calibration_sparsities}`, `calibration_method='random'`: there is no "
                "calibration to select from. Allowed is `sparsity` alone: the same seed draws the mask of another "
                "sparsity in a run of its own."
            )
        if self.calibration_method == "gradient" and self.calibration_max_steps == 1:
            raise ValueError(
                "`calibration_max_steps=1` with `calibration_method='gradient'`: one gradient agrees with itself "
                "everywhere. Allowed are two batches or more. Leave it unset for 8."
            )

    def _check_projection(self) -> None:
        if self.protect and self.projection_init != CONTRASTIVE:
            raise ValueError(
                f"`protect={self.protect}` has no effect with `projection_init={self.projection_init!r}`, which is "
                "drawn from a seed. Allowed is 'contrastive'. Pass that, or leave `protect` unset."
            )
        if self.projection_seed is not None and self.projection_init == CONTRASTIVE:
            raise ValueError(
                f"`projection_seed={self.projection_seed}` has no effect with `projection_init='contrastive'`, whose "
                "A comes from activations. Allowed is none. Leave `projection_seed` unset."
            )

    def _check_intervals(self) -> None:
        """Refuse numbers out of range, before TRL and transformers calculate with them."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in defaults.keys() & INTERVALS.keys():
            if fault := range_fault(getattr(self, name), INTERVALS[name]):
                raise ValueError(
                    f"`{name}={getattr(self, name)}` is {fault}. Pass a number from there, or leave it unset for "
                    f"{defaults[name]}."
                )

    def check_streaming(self) -> None:
        """
        Refuse what needs the number of rows, which streamed data do not tell.

        Raises:
            `ValueError`: the calibration is to have a share of the rows, or a number of epochs.
        """
        if self.calibration_fraction < 1:
            raise ValueError(
                f"`calibration_fraction={self.calibration_fraction}` with streamed data, whose number of rows is not "
                "known. Allowed is 1. Set `calibration_max_steps` to calibrate for fewer steps."
            )
        if self.for_calibration().max_steps <= 0:
            raise ValueError(
                f"`calibration_num_train_epochs={self.calibration_num_train_epochs}` with streamed data, whose number "
                "of rows is not known. Allowed is a number of steps. Set `calibration_max_steps` or `max_steps`."
            )

    def for_calibration(self):
        """Return a copy for the calibration phase: its own rate, length and folder; no evaluation, no push."""
        args = copy.copy(self)
        args.output_dir = os.path.join(self.output_dir, "calibration")
        args.learning_rate = self.calibration_learning_rate
        args.lr_scheduler_type, args.lr_scheduler_kwargs = self.calibration_lr_scheduler_type, None
        args.warmup_steps = self.calibration_warmup_steps
        if self.calibration_num_train_epochs is not None:
            args.num_train_epochs = self.calibration_num_train_epochs
        if self.calibration_max_steps > 0 or self.calibration_num_train_epochs is not None:
            args.max_steps = self.calibration_max_steps
        elif self.calibration_method == "gradient":
            args.max_steps = GRADIENT_BATCHES
        if self.calibration_method == "gradient":  # every batch counts as it is, and no B moves
            args.learning_rate, args.max_grad_norm, args.sparse_backend = 0.0, 0.0, "hook"
        args.eval_strategy, args.eval_on_start, args.load_best_model_at_end = "no", False, False
        args.save_strategy = "no" if self.save_strategy == "best" else self.save_strategy
        args.push_to_hub = False
        return args


@help_from_docstring
@dataclass
class LoriSFTConfig(LoriArguments, SFTConfig):
    """
    Configuration of the [`LoriSFTTrainer`]: the fields of [`LoriArguments`] and of [`~trl.SFTConfig`].

    > [!NOTE]
    > These parameters have default values different from `SFTConfig`:
    > - `learning_rate`: Learning rate of the adaptation, on the mask. Defaults to `5e-4` instead of `2e-5` (the
    >   paper's LoRI-S, r = 32).
    > - `lr_scheduler_type`: Schedule of the adaptation's learning rate. Defaults to `"constant"` instead of `"linear"`
    >   (the paper's: no decay).
    > - `truncation_mode`: What is kept of rows longer than `max_length`; `"keep_prompt_end"` keeps the end of the
    >   prompt and the EOS of prompt-completion rows. Defaults to it instead of `"keep_start"`: such a row loses the
    >   beginning of its prompt, then the end of its completion before the EOS. Other rows are cut as with
    >   `"keep_start"`.
    > - `bf16`: Whether to compute in bfloat16. Defaults to `False` instead of `True` where there is no accelerator:
    >   CPUs are slow at it or refuse.
    """

    learning_rate: float = 5e-4
    lr_scheduler_type: str = "constant"
    truncation_mode: str = field(
        default="keep_prompt_end", metadata={"choices": ["keep_prompt_end", "keep_start", "keep_end"]}
    )
