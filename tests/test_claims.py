"""The study's bookkeeping: keys that last, results that outlive a kill, searches that widen, verdicts with data."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.claims.cells import UNTUNED, Base, Mask, Merge, Train  # noqa: E402
from benchmarks.claims.evidence import estimate, is_lower, is_no_worse  # noqa: E402
from benchmarks.claims.parts import plan  # noqa: E402
from benchmarks.claims.store import Store  # noqa: E402
from benchmarks.claims.tuning import RATES, Tuning  # noqa: E402


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "claims.jsonl")


def test_keys_last():
    """Committed results are found by these. A change of a cell's settings needs a new `PROTOCOL`."""
    single = Train("LoRI", "gsm8k", 0, 5e-3, Mask("train", 30, 5e-4))
    assert Base("gsm8k").key == "0920142473424734"
    assert single.key == "9781663f874a4737" and Merge((single, single), "concat", 0.5).key == "e6b04a27f73d0aad"


def test_results_outlive_a_kill(store):
    store.add(Base("gsm8k"), {"loss": 1.25})
    with open(store.file, "a") as file:
        file.write('{"key": "cut sho')
    again = Store(store.file)
    again.add(Base("code"), {"loss": 0.5})
    lasting = Store(store.file)
    assert lasting.figures(Base("gsm8k")) == {"loss": 1.25} and lasting.figures(Base("code")) == {"loss": 0.5}
    assert Base("nlu") not in lasting


@pytest.mark.parametrize(("best", "runs"), [(RATES[1], 6), (RATES[4], 3), (RATES[8], 7)])
def test_a_search_goes_on_until_the_best_is_not_at_the_edge(store, best, runs):
    tuning = Tuning(store)
    assert tuning.rate("LoRA", "gsm8k") == UNTUNED
    while tuning.rate("LoRA", "gsm8k") == UNTUNED:
        for cell in tuning.cells("LoRA", "gsm8k"):
            if cell not in store:
                store.add(cell, {"dev_loss": abs(RATES.index(cell.rate) - RATES.index(best)), "loss": 1.0})
    assert tuning.rate("LoRA", "gsm8k") == best and len(store.lines) == runs


def test_nothing_is_begun_that_waits_for_a_search(store):
    cells = plan(Tuning(store))
    assert len(cells) == len({cell.key for cell in cells})
    settled = [cell for cell in cells if cell.settled]
    assert {cell.method for cell in settled if isinstance(cell, Train)} == {"LoRA", "LoRI"}
    assert all(cell.seed == 0 for cell in settled if isinstance(cell, Train))
    order = [cell.key for cell in cells]
    assert all(order.index(need.key) < order.index(cell.key) for cell in cells for need in cell.needs)


def test_verdicts_need_three_seeds_and_more_than_noise():
    assert "not measured yet (2 of 3 seeds)" in is_no_worse(estimate([0.0, 0.0]))
    assert is_no_worse(estimate([0.001, -0.001, 0.002])) == "**holds here**"
    assert is_no_worse(estimate([0.1, -0.1, 0.05])) == "**can't be told at this size**"
    assert is_no_worse(estimate([0.05, 0.06, 0.05])) == "**does not hold here**"
    assert is_lower(estimate([-0.05, -0.06, -0.05])) == "**holds here**"
    assert is_lower(estimate([-0.05, 0.06, -0.05])) == "**can't be told at this size**"
