"""A small part of `benchmarks/fuzz_recipes.py`: recipes and calls with faults end in success or in one error."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_recipes.py"


def test_mutated_recipes_and_calls_end_well():
    specification = importlib.util.spec_from_file_location("fuzz_recipes", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    counts, failures = script.fuzz(cases=30, seed=1)
    assert not failures
    assert sum(counts.values()) == 60
    assert any(ending == "success" for _, ending in counts)
