"""Where a run can be resumed, and which run a folder holds."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from accelerate.logging import get_logger
from accelerate.utils import patch_environment
from torch.serialization import safe_globals
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ..adapter.layout import ADAPTER_WEIGHTS, RUN_NAME, masks_name
from ..adapter.record import read_record
from ..adapter.safetensors import opened
from ..inputs.files import replacing

logger = get_logger(__name__)


def begin_run(output_dir: Path, calibration_dir: Path) -> str:
    """
    Note in a run's folder that a new one begins there. If an earlier one's checkpoints are there, this is told.

    Returns:
        `str`: the run's identity, 16 hexadecimal digits.
    """
    if any(output_dir.glob("checkpoint-*")) or any(calibration_dir.glob("checkpoint-*")):
        logger.warning(
            f"`output_dir={output_dir}` holds checkpoints of another run. This one begins anew, and will replace "
            "those of the same step. To go on with the other, pass `resume_from_checkpoint=True`; to keep it, pass "
            "another `output_dir`."
        )
    run = secrets.token_hex(8)
    output_dir.mkdir(parents=True, exist_ok=True)
    note_run(output_dir, run)
    return run


def note_run(output_dir: Path, run: str) -> None:
    """Note which run goes on in a folder."""
    with replacing(output_dir / RUN_NAME) as file:
        file.write_text(f"{run}\n", encoding="utf-8")


def find_checkpoint(output_dir: Path, calibration_dir: Path, task: str) -> Path:
    """
    Find the last place where the run that began last can be resumed.

    Args:
        output_dir (`Path`): the run's folder.
        calibration_dir (`Path`): the folder of its calibration.
        task (`str`): its task.

    Returns:
        `Path`: a complete checkpoint of the adaptation; else the folder of a calibration that is done; else a complete
        checkpoint of the calibration.

    Raises:
        `ValueError`: there is none.
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
