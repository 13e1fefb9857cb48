"""Every kind of the study's cells, run on a tiny model: what a cell gives, and that it gives the same again."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.claims import data, training  # noqa: E402
from benchmarks.claims.cells import (  # noqa: E402
    CHEAP,
    Base,
    Cell,
    Gradients,
    Held,
    Mask,
    Merge,
    Overlaps,
    Refusals,
    Rounded,
    Train,
)
from benchmarks.claims.store import Store  # noqa: E402
from benchmarks.claims.work import Worker  # noqa: E402

pytestmark = pytest.mark.release

RATE = 5e-3


def words(number: int) -> dict[str, str]:
    return {"prompt": f"w{number % 97} w{number % 89} ", "completion": f"w{number % 13} w{number % 7}"}


@pytest.fixture
def worker(tmp_path, monkeypatch, model_folder):
    for module in (data, training):
        monkeypatch.setattr(module, "model_name", lambda: str(model_folder))
    data.tokenizer.cache_clear()
    for task in ("gsm8k", "safety", "code"):
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in ("train", "test"):
            lines = [json.dumps(words(number)) for number in range(len(task), 420)]
            (tmp_path / "data" / task / f"{split}.jsonl").write_text("\n".join(lines))
    yield Worker(Store(tmp_path / "claims.jsonl"), data.Rows(tmp_path / "data"), tmp_path / "cache", list)
    data.tokenizer.cache_clear()


def cells() -> list[Cell]:
    full = Mask("train", 30, RATE)
    safety, gsm8k = (Train("LoRI", task, 0, RATE, full) for task in ("safety", "gsm8k"))
    lora = tuple(Train("LoRA", task, 0, RATE) for task in ("safety", "gsm8k"))
    shared = tuple(Train("LoRI", task, 0, RATE, Mask("random"), shared_A=True) for task in ("safety", "gsm8k"))
    merge = Merge((safety, gsm8k), "concat", 0.5)
    return [
        Base("code"),
        Train("LoRI", "code", 1, RATE, Mask("agreement", CHEAP)),
        Train("LoRI", "code", 1, RATE, Mask("train", 30, RATE, 0.5, "layer")),
        Overlaps("gsm8k", 0, RATE, CHEAP),
        Overlaps("gsm8k", 0, RATE, 30),
        merge,
        Merge(lora, "linear", 0.5, "dev"),
        Merge(shared, "concat", 0.5),
        Held(merge, ("code",)),
        Refusals(),
        Refusals(Train("LoRA", "gsm8k", 0, RATE, start=lora[0])),
        Held(Train("LoRI", "gsm8k", 0, RATE, full, start=safety), ("safety",)),
        Train("LoRI", "gsm8k", 0, RATE, full, start=safety, disjoint=True),
        Train("LoRI", "gsm8k", 0, RATE, Mask("random"), start=safety),
        Gradients("gsm8k", 0, CHEAP, start=safety),
        Rounded(gsm8k, ""),
        Rounded(gsm8k, "int8"),
    ]


def test_every_kind_of_cell(worker, capsys):
    for cell in cells():
        while not worker._done(cell).is_file():
            assert worker.run_cell(cell)
    figures = {cell.key: worker.store.figures(cell) for cell in cells()}
    base, agreement, layered, cheap, whole, merge, *_ = figures.values()
    assert base["loss"] > 0 and agreement["loss"] != layered["loss"]
    assert set(merge) == {"safety", "gsm8k"}
    assert {"train-3", "agreement-3", "fisher-3"} <= set(cheap) <= set(whole)
    assert 0 < cheap["agreement-3"] < 1 and whole["agreement-30"] > 0
    disjoint = worker.folder(cells()[-5])
    assert json.loads((disjoint / "lori_config.json").read_text())["tasks"][-1]["task"] == "gsm8k"

    exact, rounded = list(figures.values())[-2:]
    assert exact["loss"] == worker.store.figures(cells()[-2].of)["loss"] and rounded["bytes"] < exact["bytes"]

    capsys.readouterr()
    for cell in cells():
        worker._done(cell).unlink()
        worker.run_cell(cell)
    assert capsys.readouterr().out.count("the same again, to the last digit") == len(cells())
