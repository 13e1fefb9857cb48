"""Where the study stands: the repository, the model, the results."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from quickstart import answer, smollm2  # noqa: E402

QUICKSTART = ROOT / "recipes" / "quickstart"
RESULTS = ROOT / "benchmarks" / "results" / "claims.jsonl"
model_name, generate = smollm2, answer
