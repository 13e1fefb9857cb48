"""The study's bookkeeping: keys that last, results that outlive a kill, searches that widen, verdicts with data."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.claims import report  # noqa: E402
from benchmarks.claims.cells import UNTUNED, Base, Cell, Held, Mask, Merge, Overlaps, Refusals, Rounded, Train  # noqa: E402
from benchmarks.claims.evidence import Claim, estimate, t_quantile, t_tails, verdicts  # noqa: E402
from benchmarks.claims.parts import plan  # noqa: E402
from benchmarks.claims.store import Store  # noqa: E402
from benchmarks.claims.tuning import RATES, Tuning  # noqa: E402
from benchmarks.forgetting import cells as forgetting  # noqa: E402


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
            return {"loss": 1 + off + 0.01 * cell.seed, "dev_loss": off, "loss_stderr": 0.05}
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


def made_up_curve(cell: Cell) -> dict:
    """GSM8K falls with the steps; safety rises two thirds of that, with contrastive A by nothing."""

    def losses(step: int, forgets: bool) -> dict:
        values = {"gsm8k": 1 - step / 100, "safety": 2 + step / 150 * forgets, "text": 3.0}
        return {name: {"loss": value, "nats": [value, 2.0], "tokens": [1, 1]} for name, value in values.items()}

    if isinstance(cell, forgetting.First):
        return {"losses": losses(0, True)}
    forgets = not cell.arm.startswith("contrastive")
    return {"curve": {str(step): losses(step, forgets) for step in forgetting.POINTS}, "norm": 1.0}


def test_the_report_says_all_that_was_measured(store, tmp_path, monkeypatch):
    while any(cell not in store for cell in plan(Tuning(store))):
        for cell in plan(Tuning(store)):
            if cell.settled and cell not in store:
                store.add(cell, made_up(cell))
    monkeypatch.setattr(report, "DOCS", tmp_path)
    second = Store(tmp_path / "second.jsonl")
    for cell in forgetting.plan():
        second.add(cell, made_up_curve(cell))
    report.write_report(store, second)
    text = (tmp_path / "results.md").read_text()
    assert "not measured" not in text.replace("– is not measured yet", "").lower() and "nan" not in text
    assert "| 1. LoRI-D is as good as LoRA | **holds here** | +0.000 ± 0.000 | 0 |" in text
    assert "| 3. LoRI-S loses less by merging (`concat`) than LoRA | can't be told | +0.000 ± 0.000 | 1 |" in text
    assert "| LoRI-D with contrastive A loses less of safety than LoRA | **holds here** | -0.200 ± 0.000 | 0 |" in text
    assert [file.name for file in tmp_path.glob("*.png")] == ["results_masks.png"]

    none = Store(tmp_path / "none.jsonl")
    report.write_report(none, none)
    assert "holds" not in (tmp_path / "results.md").read_text().split("## In short")[1]


def test_intervals_are_students():
    """From the tables of t."""
    assert [round(t_quantile(freedom), 3) for freedom in (1, 2, 3, 4, 9)] == [12.706, 4.303, 3.182, 2.776, 2.262]
    assert round(t_tails(-2.132, 4), 3) == 0.1 and round(t_tails(3.143, 6), 3) == 0.02
    assert estimate([0.1, 0.2, 0.3]).text() == "0.200 ± 0.248"


def test_verdicts_need_all_seeds_and_more_than_noise_among_all_claims():
    def judged(*samples: list[float], null: float = 0.0) -> list[str]:
        return [verdict for verdict, _ in verdicts([Claim("", estimate(values), null) for values in samples])]

    assert judged([0.0, 0.0]) == ["not measured yet (2 of 3 seeds)"]
    below = [-0.05, -0.06, -0.05]
    assert judged(below) == ["**holds here**"] and judged([-value for value in below]) == ["**does not hold here**"]
    assert judged(below, [-0.05, 0.06, -0.05]) == ["**holds here**", "can't be told"]
    assert judged(*[below] * 40) == ["can't be told"] * 40
    assert judged([0.001, -0.001, 0.002], null=0.02) == ["**holds here**"]
    assert judged([0.05, 0.06, 0.05], null=0.02) == ["**does not hold here**"]


def test_p_is_adjusted_as_holm_says():
    claims = [
        Claim("", estimate(values)) for values in ([-0.05, -0.06, -0.05], [-0.05, -0.07, -0.04], [0.1, -0.1, 0.05])
    ]
    alone = [verdicts([claim])[0][1] for claim in claims]
    assert [p for _, p in verdicts(claims)] == pytest.approx([3 * alone[0], 2 * alone[1], alone[2]])
