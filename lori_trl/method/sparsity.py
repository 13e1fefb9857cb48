"""A sparsity, and how many entries it leaves to train: exact, in decimal arithmetic."""

from decimal import Decimal


def check_sparsity(sparsity: float) -> None:
    """Raise `TypeError` or `ValueError` unless a sparsity is a number in [0, 1)."""
    if not isinstance(sparsity, (int, float)):
        raise TypeError(f"`sparsity={sparsity!r}` is no number. Pass a fraction in [0, 1), e.g. `sparsity=0.9`.")
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"`sparsity={sparsity}` is outside [0, 1). Pass a fraction, e.g. `sparsity=0.9` to train 10 % of B."
        )


def num_to_select(sparsity: float, numel: int) -> int:
    """
    Count the entries that stay trainable: K = floor((1 - sparsity) * numel), in decimal arithmetic.

    ```python
    >>> num_to_select(0.9, 1000)  # int((1 - 0.9) * 1000) is 99
    100

    ```
    """
    return int((1 - Decimal(str(sparsity))) * numel)
