"""An adapter of two tasks."""

from pathlib import Path

import pytest
from inspection.adapters import matrices, random_masks, write

from lori_trl import LoriMasks


@pytest.fixture(scope="session")
def two_tasks(tmp_path_factory) -> tuple[Path, dict, list[LoriMasks]]:
    """One adapter of two tasks whose masks overlap."""
    weights = matrices(1)
    masks = [random_masks("safety", weights, 0.3, 5), random_masks("math", weights, 0.4, 6)]
    return write(tmp_path_factory.mktemp("two") / "both", weights, masks), weights, masks
