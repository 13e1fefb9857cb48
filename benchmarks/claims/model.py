"""The model: the quickstart's, and how that asks it."""

import sys

from .setting import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from quickstart import answer, smollm2  # noqa: E402

model_name, generate = smollm2, answer
