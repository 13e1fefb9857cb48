"""`--version`: of lori_trl and of what it stands on, for bug reports."""

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_BELOW = ("torch", "transformers", "trl", "peft")


class ShowVersion(argparse.Action):
    """Print the versions, and stop."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version_line())
        parser.exit()


def version_line() -> str:
    """Return the versions that are installed, in one line, without importing anything."""
    return f"lori_trl {_installed('lori-trl')} ({', '.join(f'{name} {_installed(name)}' for name in _BELOW)})"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout on the path
        return "(not installed)"
