"""The libraries that this one stands on: which versions it needs, and what to say where there are others."""

import logging
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.specifiers import SpecifierSet
from packaging.version import Version

logger = logging.getLogger(__name__)

# As in pyproject.toml: a checkout on the path has no metadata to ask.
NEEDED = {
    "torch": ">=2.11,<3",
    "transformers": ">=5.10.1,<6",
    "trl": ">=1.8,<2",
    "peft": ">=0.20,<1",
    "accelerate": ">=1.10,<2",
    "datasets": ">=4.7,<6",
    "huggingface-hub": ">=1.16,<3",
}


def installed(name: str) -> str:
    """Return a package's version; `(not installed)` where there is none, as of a checkout on the path."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def too_old() -> list[str]:
    """Say in one line each which packages can't be used. Imports none of them."""
    lines = []
    for name, needed in NEEDED.items():
        there = installed(name)
        if there == "(not installed)" or Version(there) < _lowest(needed):
            lines.append(f"{name} {there}: lori_trl needs {name}{needed}. Run `pip install '{name}{needed}'`.")
    # Its fused loss is written in triton, and DPO, KTO and GRPO have no other. Ended by TRL 1.16.
    if installed("trl").startswith("1.15.") and find_spec("triton") is None:
        lines.append("trl 1.15 needs triton, which is not installed: take another. Run `pip install 'trl>=1.16,<2'`.")
    return lines


def untried() -> list[str]:
    """Say in one line each which packages are of a later major version than was tried."""
    return [
        f"{name} {installed(name)} was never tried with this version of lori_trl, which was with {name}{needed}."
        for name, needed in NEEDED.items()
        if installed(name) != "(not installed)"
        and not SpecifierSet(needed).contains(installed(name), prereleases=True)
        and Version(installed(name)) >= _lowest(needed)
    ]


def check_stack() -> None:
    """
    Warn of packages that are newer than what was tried.

    Raises:
        `ImportError`: some are too old, or missing.
    """
    if lines := too_old():
        raise ImportError("The installed packages are too old for lori_trl. " + " ".join(lines))
    for line in untried():
        logger.warning(line)


def _lowest(needed: str) -> Version:
    return next(Version(each.version) for each in SpecifierSet(needed) if each.operator == ">=")
