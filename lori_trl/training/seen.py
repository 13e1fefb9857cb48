"""How much a calibration has seen: steps whose gradients counted, and rows of the data."""

from typing import Any

from datasets import Dataset

from .config import LoriArguments


def steps_seen(args: LoriArguments, optimizer: Any, steps: int) -> int:
    """
    Count the steps whose gradients a calibration has seen: float16's scaler leaves some out.

    Args:
        args ([`LoriArguments`]): the calibration's.
        optimizer (`Optimizer`): the calibration's.
        steps (`int`): the Trainer's count.

    Raises:
        `ValueError`: `calibration_method="gradient"` saw fewer than the two that it compares.
    """
    if args.calibration_method != "gradient":
        return steps
    seen = optimizer.param_groups[0]["steps"]
    if seen < 2:
        raise ValueError(
            f"`calibration_method='gradient'` saw the gradients of {seen} batches in {steps} steps; the others "
            "were not finite in float16. Two are needed, to agree or not. Raise `calibration_max_steps`, or train "
            "in bfloat16."
        )
    return seen


def rows_seen(args: LoriArguments, rows: Any, taken: int, num_given: int | None) -> int | None:
    """
    Count the rows of the data that a calibration has seen, each once; None where that is not known.

    Args:
        args ([`LoriArguments`]): the calibration's.
        rows (`Dataset` or `IterableDataset`): what it trains on, as TRL has prepared them.
        taken (`int`): how many of these its steps took, over all devices.
        num_given (`int`, *optional*): how many rows the trainer was given.
    """
    if not isinstance(rows, Dataset):
        return None
    fields = vars(args)
    if fields.get("packing"):  # TRL has put several rows, and parts of rows, into each
        return num_given if taken >= len(rows) and args.calibration_fraction == 1 else None
    uses = fields.get("num_generations", 1) * fields.get("num_iterations", 1)  # GRPO's batches are of completions
    return min(len(rows), -(-taken // uses))
