"""Where a run can be resumed, and which run a folder holds."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import patch_environment
from peft import LoraConfig
from torch.serialization import safe_globals
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ..adapter.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MAX_JSON_BYTES, RECORD_NAME, RUN_NAME, masks_name
from ..adapter.record import LENGTH, LoriRecord, read_record
from ..adapter.record_fields import OPTIMIZER_CLASS
from ..adapter.safetensors import opened
from ..inputs.files import read_json, replacing
from .card_facts import CardFacts
from .config import LoriArguments
from .optimizers import optimizer_name

logger = get_logger(__name__)

# Settings of the adapter that decide what is trained, beside its matrices' shapes.
_OF_THE_ADAPTER = (
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
)


@dataclass(frozen=True)
class Found:
    """What an earlier run has left for one that resumes."""

    # How far that run was, one of `lori_trl.adapter.record.PHASES`: `"new"` where nothing is to be resumed;
    # `"calibrated"` where the calibration is done and the adaptation has no checkpoint yet
    phase: str = "new"
    folder: Path | None = None  # the checkpoint, or the folder of the finished calibration
    record: LoriRecord | None = None  # the record in it

    def checkpoint(self, phase: str) -> str | None:
        """Return the checkpoint to resume a phase from; None where that phase begins anew."""
        return str(self.folder) if self.phase == phase else None


def find_run(resume_from_checkpoint: str | bool | None, args: LoriArguments, task: str) -> Found:
    """
    Find what a run is to resume.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint, or `True` for the last complete one.
        args ([`LoriArguments`]): the run's.
        task (`str`): its task.

    Raises:
        `ValueError`: with `True`, there is none; or the folder is no checkpoint.
    """
    if not resume_from_checkpoint:
        return Found()
    if resume_from_checkpoint is True:
        folder = _last_place(Path(args.output_dir), Path(args.for_calibration().output_dir), task)
    else:
        folder = Path(resume_from_checkpoint)
    is_checkpoint = (folder / TRAINER_STATE_NAME).is_file()
    record = read_record(folder) if is_checkpoint or (folder / RECORD_NAME).is_file() else None
    if record is None or (record.phase != "calibrated" and not is_checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint={str(folder)!r}` is no checkpoint: it has no {TRAINER_STATE_NAME}. Allowed is a "
            "folder `checkpoint-N` of either phase, or that of a finished calibration. Pass one, or `True` for the "
            "last complete one in `output_dir`."
        )
    if record.phase != "calibrated" and not any((*folder.glob("optimizer*"), *folder.glob("global_step*"))):
        logger.warning(
            f"`{folder}` has no optimizer state, as `save_only_model` leaves it. The run goes on from its weights "
            "with a new optimizer: the adapter will not be that of an undisturbed run."
        )
    return Found(record.phase, folder, record)


def check_same_run(
    folder: Path,
    earlier: LoriRecord,
    record: LoriRecord,
    args: LoriArguments,
    card_facts: CardFacts,
    adapter_config: LoraConfig,
) -> None:
    """
    Check that a checkpoint is of a run like this one. Warn where the run goes on in another way than undisturbed.

    Args:
        folder (`Path`): the checkpoint.
        earlier ([`LoriRecord`]): its record.
        record ([`LoriRecord`]): this run's.
        args ([`LoriArguments`]): this run's.
        card_facts ([`CardFacts`]): this run's.
        adapter_config (`LoraConfig`): this run's.

    Raises:
        `ValueError`: it is of another one.
    """
    phase_args = args if earlier.phase == "adapting" else args.for_calibration()
    training = card_facts.of_phase(phase_args)
    replace(record, training=training).check_same_run(earlier, folder)
    saved, own = read_json(folder / ADAPTER_CONFIG, MAX_JSON_BYTES), adapter_config.to_dict()
    for name in _OF_THE_ADAPTER:
        if _plain(saved.get(name)) != _plain(own[name]):
            raise ValueError(
                f"`{folder}` was trained with {name} {saved.get(name)}, this run has {own[name]}. A run resumes with "
                "the adapter's settings that it began with. Correct them, or start anew in another `output_dir`."
            )
    if earlier.phase == "calibrated":
        return
    if args.ignore_data_skip:
        logger.warning(
            "`ignore_data_skip=True`: the run goes on with the first rows again. The adapter will not be that of an "
            "undisturbed run. Leave it unset to go on with the rows that come next."
        )
    before = earlier.training.hyperparameters if earlier.training is not None else None
    longer = [name for name in LENGTH if (before or {}).get(name) != (training.hyperparameters or {}).get(name)]
    if longer and phase_args.lr_scheduler_type not in ("constant", "constant_with_warmup"):
        logger.warning(
            f"`{longer[0]}` is another than the run began with, and `lr_scheduler_type="
            f"{phase_args.lr_scheduler_type.value}` follows from it: the rates go on as those of a run of the new "
            "length. The adapter will not be that of an undisturbed run."
        )


def check_same_optimizer(folder: Path, optimizer: Any) -> None:
    """
    Check, before its state is loaded, that the checkpoint of a phase had an optimizer like this one.

    Raises:
        `ValueError`: it had one of another class.
    """
    training = read_record(folder).training
    settings = (training.settings if training is not None else None) or {}
    before, now = settings.get(OPTIMIZER_CLASS), optimizer_name(optimizer)
    if before not in (None, now):
        raise ValueError(
            f"`{folder}` has the state of an {before}, and this run's optimizer is an {now}. A run resumes with the "
            "optimizer that it began with. Make that one, or start anew in another `output_dir`."
        )


def _plain(value: Any) -> Any:
    """Return a setting of PEFT's as JSON has it: what is empty is unset, and names have no order."""
    return sorted(value) if isinstance(value, (list, set, tuple)) and value else value or None


def logged_before(folder: Path) -> list[dict[str, Any]]:
    """Return what a phase logged, from the Trainer's state in its folder; nothing where there is none."""
    state = folder / TRAINER_STATE_NAME
    return TrainerState.load_from_json(str(state)).log_history if state.is_file() else []


def begin_run(args: LoriArguments) -> str:
    """
    Note in a run's folder that a new one begins there. If an earlier one's checkpoints are there, this is told.

    Returns:
        `str`: the run's identity, 16 hexadecimal digits.
    """
    folders = Path(args.output_dir), Path(args.for_calibration().output_dir)
    if any(checkpoint for folder in folders for checkpoint in folder.glob("checkpoint-*")):
        logger.warning(
            f"`output_dir={args.output_dir}` holds checkpoints of another run. This one begins anew, and will replace "
            "those of the same step. To go on with the other, pass `resume_from_checkpoint=True`; to keep it, pass "
            "another `output_dir`."
        )
    run = secrets.token_hex(8)
    note_run(args, run)
    return run


def note_run(args: LoriArguments, run: str) -> None:
    """Note in a run's folder which run goes on there."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RUN_NAME) as file:
        file.write_text(f"{run}\n", encoding="utf-8")


def _last_place(output_dir: Path, calibration_dir: Path, task: str) -> Path:
    """
    Find the last place where the run that began last can be resumed: a complete checkpoint of the adaptation; else the
    folder of a calibration that is done; else a complete checkpoint of the calibration.
    """
    run = (output_dir / RUN_NAME).read_text(encoding="utf-8").strip() if (output_dir / RUN_NAME).is_file() else None
    if checkpoint := _last_complete_checkpoint(output_dir, run):
        return checkpoint
    if (calibration_dir / masks_name(task)).is_file() and run in (None, _run_of(calibration_dir)):
        return calibration_dir  # killed between the calibration's end and the first checkpoint
    if checkpoint := _last_complete_checkpoint(calibration_dir, run):
        return checkpoint
    if other := _last_complete_checkpoint(output_dir, None) or _last_complete_checkpoint(calibration_dir, None):
        raise ValueError(
            f"`resume_from_checkpoint=True`, but the run that began last in `output_dir={output_dir}` left no "
            f"complete checkpoint; `{other}` is of an earlier one. Allowed is a checkpoint of one's choice. Pass that "
            "path to go on with the earlier run, or leave `resume_from_checkpoint` unset to start anew."
        )
    raise ValueError(
        f"`resume_from_checkpoint=True`, but `output_dir={output_dir}` holds no complete checkpoint. Allowed is a "
        "folder that an earlier run saved to. Leave it unset to start anew."
    )


def _last_complete_checkpoint(folder: Path, run: str | None) -> Path | None:
    """
    Return the last checkpoint of a run, or of any, that was written to its end; the Trainer's state is written last.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if run not in (None, _run_of(checkpoint)):
                continue
            with opened(checkpoint / ADAPTER_WEIGHTS):
                return checkpoint
        except (OSError, ValueError) as error:
            logger.warning(f"Passing over the half-written checkpoint {checkpoint}: {error}")
    return None


def _run_of(folder: Path) -> str | None:
    training = read_record(folder).training
    return training.run if training is not None else None


@contextmanager
def deepspeed_checkpoints_as_data() -> Iterator[None]:
    """
    Let DeepSpeed's checkpoints be read as tensors and plain data.

    DeepSpeed 0.19 calls `torch.load(..., weights_only=False)`, which runs what is pickled in a file. A variable of
    torch's in the environment overrules it. The classes named here are those that DeepSpeed leaves: they hold data.

    Raises:
        `ValueError`: a checkpoint names anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"), safe_globals(classes):
            yield
    except UnpicklingError as error:
        raise ValueError(
            "DeepSpeed's part of the checkpoint names code that reading it would run. Allowed are tensors, numbers "
            "and text, as DeepSpeed leaves them. Resume from a checkpoint of a run of your own."
        ) from error
