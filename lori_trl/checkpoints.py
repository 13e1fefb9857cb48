"""Where a run can be resumed."""

from pathlib import Path

from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from .adapter import read_lori_config

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
    if (calibration_dir / "masks" / f"{task}.safetensors").is_file():
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
            read_lori_config(checkpoint)
            with safe_open(checkpoint / "adapter_model.safetensors", framework="pt"):
                return checkpoint
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning(f"Passing over the half-written checkpoint {checkpoint}: {error}")
    return None
