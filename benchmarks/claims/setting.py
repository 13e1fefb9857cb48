"""Where the study stands: the repository, its own rows, the results."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart"
RESULTS = ROOT / "benchmarks" / "results" / "claims.jsonl"
