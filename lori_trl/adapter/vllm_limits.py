"""vLLM, as far as an adapter must fit it."""

DEFAULT_MAX_RANK = 16
# Source: `MaxLoRARanks` of vllm/config/lora.py.
_MAX_RANKS = (8, DEFAULT_MAX_RANK, 32, 64, 128, 256, 320, 512)


def max_lora_rank(rank: int) -> int | None:
    """
    Return what `vllm serve --max-lora-rank` must be for an adapter of a rank; `None` where no value is high enough.

    ```python
    >>> max_lora_rank(24)
    32

    ```
    """
    return next((allowed for allowed in _MAX_RANKS if allowed >= rank), None)
