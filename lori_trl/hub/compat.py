"""The Hub client's transport. It stands here, and not in `training/compat.py`, since arrows between rooms go down."""

try:
    from huggingface_hub.utils import httpx
except ImportError:  # huggingface-hub below 2.0 has no name of its own for it
    import httpx

__all__ = ["httpx"]
