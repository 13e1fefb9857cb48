"""Errors about the input: one message, and the exit code of a wrong call."""

from contextlib import contextmanager

from .terminal import show


@contextmanager
def bad_input(program: str, errors: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, ImportError)):
    """Turn an error about the input into one message and exit code 2."""
    try:
        yield
    except errors as error:
        show(f"{program}: {_message(error)}", error=True)
        raise SystemExit(2) from None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:  # the system's own, and no sentence
        return (
            f"`{error.filename}`: {error.strerror}. A name that the system can open is needed. Correct it, or the "
            "rights to it."
        )
    return str(error)
