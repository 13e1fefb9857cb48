"""The intervals that numbers must lie in, on the command line, in recipes and in Python: one table."""

from typing import Any

# What TRL and transformers leave unchecked, or check one by one.
INTERVALS = {
    "sparsity": "[0, 1)",
    "calibration_sparsities": "[0, 1)",
    "calibration_fraction": "(0, 1]",
    "density": "(0, 1]",
    "lora_dropout": "[0, 1)",
    "lora_r": "[1, inf)",
    "lora_alpha": "(0, inf)",
    "learning_rate": "(0, inf)",
    "calibration_learning_rate": "(0, inf)",
    "num_train_epochs": "(0, inf)",
    "calibration_num_train_epochs": "(0, inf)",
    "max_steps": "-1 or [1, inf)",
    "calibration_max_steps": "-1 or [1, inf)",
    "per_device_train_batch_size": "[1, inf)",
    "per_device_eval_batch_size": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "max_length": "[2, inf)",
    "preview": "[1, inf)",
    "grow": "[1, inf)",
    "protect_rows": "[1, inf)",
    "protect_epsilon": "(0, inf)",
    "warmup_steps": "[0, inf)",
    "calibration_warmup_steps": "[0, inf)",
    "weight_decay": "[0, inf)",
    "max_grad_norm": "[0, inf)",
    "seed": "[0, 4294967295]",  # NumPy's
}


def range_fault(value: Any, interval: str | None) -> str | None:
    """
    Say that a number, or one of a list, is outside its interval.

    Args:
        value (`float`, `list[float]` or `None`): `None` is inside.
        interval (`str` or `None`): e.g. `"[0, 1)"` or `"-1 or [1, inf)"`; everything is inside `None`.

    Returns:
        `str` or `None`: `"outside [0, 1)"`; `None` if it is inside.

    ```python
    >>> range_fault(1.0, "[0, 1)")
    'outside [0, 1)'

    ```
    """
    if value is None or interval is None:
        return None
    exception, _, bounds = interval.rpartition(" or ")
    low, high = (float(bound) for bound in bounds[1:-1].split(","))
    for number in map(float, value if isinstance(value, (list, tuple)) else [value]):
        above = number >= low if bounds[0] == "[" else number > low
        below = number <= high if bounds[-1] == "]" else number < high
        if not (above and below) and not (exception and number == float(exception)):
            return f"outside {interval}"
    return None


def check_range(name: str, value: Any, interval: str | None) -> None:
    """Raise `ValueError` if a number, or one of a list, is outside its interval."""
    if fault := range_fault(value, interval):
        raise ValueError(f"`{name}={value}` is {fault}. Any number from there is allowed. Pass one.")
