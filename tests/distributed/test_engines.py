"""Two ranks of every engine, on the CPU by gloo: the masks of one process, its weights, and what becomes of a kill."""

import gc
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import CASES, KILLED, REFERENCE, ROUNDED, RUNS, make_trainer
from launches import launch
from safetensors.torch import load_file

from lori_trl import LoriMasks
from lori_trl.adapter import write

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> Path:
    """Every case, run by this process alone."""
    folder = tmp_path_factory.mktemp("one-process")
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "draw_density", lambda *_: False)
        for name in dict.fromkeys(REFERENCE.values()):
            trainer = make_trainer(name, folder / name, folder)
            trainer.train()
            trainer.save_model()
    return folder


@pytest.fixture(scope="session")
def launched(tmp_path_factory, references):
    """Return a function: engine -> the folder where its ranks ran all its cases, and what they printed."""

    @cache
    def run_all(engine: str) -> tuple[Path, list[str]]:
        folder = tmp_path_factory.mktemp(engine)
        phases = [("calibrating",), ("adapting",)] if engine in KILLED else []
        logs = []
        for phase in [*phases, ()]:
            result = launch(engine, "run.py", engine, folder, references, *phase)
            logs.append(result.stdout + result.stderr)
            assert not phase or not (folder / "passed").exists()
        return folder, logs

    return run_all


def compare(folder: Path, reference: Path) -> tuple[float, float]:
    """Return the largest difference of a weight, and the share of either mask that is in the other: 1 if equal."""
    saved, expected = (load_file(adapter / "adapter_model.safetensors") for adapter in (folder, reference))
    assert saved.keys() == expected.keys()
    difference = max((saved[name] - expected[name]).abs().max().item() for name in expected)
    masks, expected_masks = (LoriMasks.from_pretrained(adapter) for adapter in (folder, reference))
    return difference, min(masks.overlap(expected_masks), expected_masks.overlap(masks))


@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine, cases in RUNS.items() for case in cases])
def test_two_ranks_equal_one_process(engine, case, references, launched, table):
    folder, logs = launched(engine)
    assert (folder / "passed").is_file(), logs[-1][-4000:]
    difference, overlap = compare(folder / case, references / REFERENCE[case])
    phases = "adaptation" if {"mask_name_or_path", "sparsity"} & CASES[case].keys() else "both"
    backend = CASES[case].get("sparse_backend", "hook")
    table.append((engine, case, backend, phases, f"{difference:.1e}", "yes" if overlap == 1 else f"{overlap:.0%}"))
    if case != "bfloat16":
        assert overlap == 1
        assert difference <= (1e-6 if CASES[case].get("optim") == "sgd" else 1e-5)


@pytest.mark.parametrize("engine", ROUNDED)
def test_bfloat16_trains_the_entries_of_its_mask_alone(engine, references, launched):
    """One process trains the adapter in float32: the masks are nearly the same, and rounding is all that differs."""
    folder = launched(engine)[0] / "bfloat16"
    expected = references / "bfloat16"
    masks, expected_masks = LoriMasks.from_pretrained(folder), LoriMasks.from_pretrained(expected)
    saved, expected_weights = (load_file(each / "adapter_model.safetensors") for each in (folder, expected))
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert masks.overlap(expected_masks) > 0.9
    threshold = torch.tensor(masks.threshold)
    assert threshold.bfloat16().float() != threshold  # ranked by DeepSpeed's float32 copy, not by what it rounds
    for path, mask in masks.items():
        B = saved[f"base_model.model.{path}.lora_B.weight"]
        assert not B[~mask].any() and B[mask].all()
        both = mask & expected_masks[path]
        torch.testing.assert_close(
            B[both].float(), expected_weights[f"base_model.model.{path}.lora_B.weight"][both], rtol=0.1, atol=1e-3
        )


@pytest.mark.parametrize("engine", KILLED)
def test_a_run_killed_in_both_phases_goes_on_to_the_same_adapter(engine, launched):
    """The measure is how far two undisturbed runs of the engine differ."""
    folder, logs = launched(engine)
    assert ["SIGKILL" in log for log in logs] == [True, True, False]
    noise, _ = compare(folder / "undisturbed, again", folder / "undisturbed")
    difference, overlap = compare(folder / "killed", folder / "undisturbed")
    assert overlap == 1 and difference <= noise
