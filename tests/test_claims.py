"""The study's bookkeeping: keys that last, results that outlive a kill, searches that widen, verdicts with data."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.claims import report  # noqa: E402
from benchmarks.claims.cells import UNTUNED, Base, Cell, Held, Mask, Merge, Overlaps, Refusals, Rounded, Train  # noqa: E402
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


def made_up(cell: Cell) -> dict:
    """Figures as a cell has them: a rate of 1.5e-3 and a weight of 0.3 are the best, each seed has its own noise."""
    match cell:
        case Train():
            off = abs(RATES.index(cell.rate) - 4) / 10
            return {"loss": 1 + off + 0.01 * cell.seed, "dev_loss": off}
        case Merge():
            off = abs(cell.weight - 0.3)
            return {adapter.task: {"loss": 1.5 + off, "dev_loss": off} for adapter in cell.adapters}
        case Held():
            return {task: {"loss": 1.25} for task in cell.tasks}
        case Refusals():
            return {"harmful": 0.5, "harmless": 0.25, "of": 24}
        case Overlaps():
            return {f"{name}-{count}": 0.3 for name in ("train", "agreement", "adam", "gradient", "fisher")
                    for count in (3, 8, 15, 30)}  # fmt: skip
        case Rounded():
            return {"loss": 1.0, "bytes": 1_000_000}
    return {"loss": 2.0}


def test_the_report_says_all_that_was_measured(store, tmp_path, monkeypatch):
    while any(cell not in store for cell in plan(Tuning(store))):
        for cell in plan(Tuning(store)):
            if cell.settled and cell not in store:
                store.add(cell, made_up(cell))
    monkeypatch.setattr(report, "DOCS", tmp_path)
    report.write_report(store)
    text = (tmp_path / "results.md").read_text()
    assert "not measured" not in text.replace("– is not measured yet", "").lower() and "nan" not in text
    assert "| 1. LoRI-D is as good as LoRA | **holds here** | +0.000 ± 0.000 |" in text
    assert (
        "| 6. disjoint masks forget less than LoRI-S's own | **can't be told at this size** | +0.000 ± 0.000 |" in text
    )
    assert {file.name for file in tmp_path.glob("*.png")} == {"results_masks.png", "results_merging.png"}

    report.write_report(Store(tmp_path / "none.jsonl"))
    assert "holds" not in (tmp_path / "results.md").read_text().split("## In short")[1]


def test_verdicts_need_three_seeds_and_more_than_noise():
    assert "not measured yet (2 of 3 seeds)" in is_no_worse(estimate([0.0, 0.0]))
    assert is_no_worse(estimate([0.001, -0.001, 0.002])) == "**holds here**"
    assert is_no_worse(estimate([0.1, -0.1, 0.05])) == "**can't be told at this size**"
    assert is_no_worse(estimate([0.05, 0.06, 0.05])) == "**does not hold here**"
    assert is_lower(estimate([-0.05, -0.06, -0.05])) == "**holds here**"
    assert is_lower(estimate([-0.05, 0.06, -0.05])) == "**can't be told at this size**"
