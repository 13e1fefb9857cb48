"""
Every test here runs on the pretended accelerator, which is compiled once; without a compiler they are skipped.

`LORI_TEST_DEVICE=cuda` runs them on a real one: `make test-gpu`.
"""

import os

import pretended
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny import make_trainer as make_tiny


@pytest.fixture(scope="session")
def device_name() -> str:
    if name := os.environ.get("LORI_TEST_DEVICE"):
        if not getattr(torch, name).is_available():
            pytest.fail(f"`LORI_TEST_DEVICE={name}`, but PyTorch finds none.")
        return name
    if missing := pretended.why_not():
        pytest.skip(missing)
    return pretended.device()


@pytest.fixture(autouse=True)
def device(device_name, monkeypatch) -> str:
    """Let accelerate, and whatever asks it, take the pretended device."""
    name = f"{device_name}:0"
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", name)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    yield name
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture
def make(tmp_path, device):
    """Return [`tiny.make_trainer`] on the device."""

    def make(model=None, output_dir=tmp_path / "out", **changes):
        trainer = make_tiny(output_dir, model, **{"use_cpu": False, **changes})
        assert all(str(weight.device) == device for weight in trainer.model.parameters())
        return trainer

    return make
