"""Where a run can be resumed."""

from pathlib import Path

from accelerate.logging import get_logger
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from .adapter.layout import ADAPTER_WEIGHTS, masks_name
from .adapter.record import read_record
from .adapter.safetensors import opened

logger = get_logger(__name__)


def find_checkpoint(output_dir: Path, calibration_dir: Path, task: str) -> Path:
    """
    Find the last place where a run can be resumed.

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
    if checkpoint := _last_complete_checkpoint(output_dir):
        return checkpoint
    if (calibration_dir / masks_name(task)).is_file():
        return calibration_dir  # killed between the calibration's end and the first checkpoint
    if checkpoint := _last_complete_checkpoint(calibration_dir):
        return checkpoint
    raise ValueError(
        f"`resume_from_checkpoint=True`, but `output_dir={output_dir}` holds no complete checkpoint. Allowed is a "
        "folder that an earlier run saved to. Leave it unset to start anew."
    )


def _last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint of a folder that was written to its end; the Trainer's state is written last."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            read_record(checkpoint)
            with opened(checkpoint / ADAPTER_WEIGHTS):
                return checkpoint
        except (OSError, ValueError) as error:
            logger.warning(f"Passing over the half-written checkpoint {checkpoint}: {error}")
    return None
