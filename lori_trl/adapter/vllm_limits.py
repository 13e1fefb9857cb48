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


def describe_rank(rank: int) -> str:
    """
    Say what an adapter's rank means for vLLM, and how to come down from it.

    ```python
    >>> describe_rank(64)
    'rank 64: `vllm serve --max-lora-rank 64`, or less after `lori merge ADAPTER --method svd --rank R`'

    ```
    """
    needed = max_lora_rank(rank)
    limit = f"`vllm serve --max-lora-rank {needed}`" if needed else f"more than the {_MAX_RANKS[-1]} that vLLM takes"
    return f"rank {rank}: {limit}, or less after `lori merge ADAPTER --method svd --rank R`"
