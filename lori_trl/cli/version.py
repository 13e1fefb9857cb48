"""`--version`: of lori_trl and of what it stands on, for bug reports."""

from importlib.metadata import version

_BELOW = ("torch", "transformers", "trl", "peft")


def version_line() -> str:
    """Return the versions that are installed, in one line, without importing anything."""
    return f"lori_trl {version('lori-trl')} ({', '.join(f'{name} {version(name)}' for name in _BELOW)})"
