"""`benchmarks/gpu.py` runs at tiny shapes, on the CPU and on the device, and ends in a JSON and a table."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.device
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    import gpu

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    return gpu


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_it_measures_every_step(gpu, where, device, monkeypatch, tmp_path):
    name = {"cpu": "cpu", "device": device}[where]
    call = f"gpu.py --device {name} --shapes tiny --batch 2 --length 16 --rounds 2 --dtype float32"
    monkeypatch.setattr(sys, "argv", call.split())
    gpu.main()
    steps = json.loads((tmp_path / "gpu.json").read_text())["results"]["steps"]
    assert list(steps) == [f"tiny {kind}" for kind in gpu.KINDS]
    assert all(step["milliseconds"]["median"] > 0 for step in steps.values())
    assert steps["tiny packed"]["trained"] * 10 == pytest.approx(steps["tiny hook"]["trained"], abs=10)
    assert len(steps["tiny packed"]["operators"]) == 12
    assert len((tmp_path / "gpu.md").read_text().splitlines()) == 2 + len(gpu.KINDS)


def test_a_step_that_does_not_fit_is_a_row(gpu, monkeypatch):
    def no_room(*_):
        raise gpu.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(gpu, "measure", no_room)
    row = gpu.attempt("packed", "8B", None, False)
    assert row == {"out_of_memory": "CUDA out of memory"}
    assert "| 8B | packed | out of memory | | |" in gpu.table({"steps": {"8B packed": row}})
