"""`--version`: of lori_trl and of what it stands on, for bug reports."""

import argparse
from typing import Any

from ..inputs.stack import NEEDED, installed, too_old, untried


class ShowVersion(argparse.Action):
    """Print the versions, and stop."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version_lines())
        parser.exit()


def version_lines() -> str:
    """Return the installed versions in one line, and one for each that won't do. Imports none of the packages."""
    versions = ", ".join(f"{name} {installed(name)}" for name in NEEDED)
    return "\n".join([f"lori_trl {installed('lori-trl')} ({versions})", *too_old(), *untried()])
