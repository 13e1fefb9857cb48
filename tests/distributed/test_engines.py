"""Two ranks of every engine, on the CPU by gloo: the masks of one process, its weights, and what becomes of a kill."""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
from cases import CASES, RUNS, make_trainer
from safetensors.torch import load_file

from lori_trl import LoriMasks
from lori_trl.launch import find_launch_file

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent


def launch(engine: str, folder: Path, *arguments) -> None:
    """Start run.py on two ranks with the launch file that is shipped. Only its precision is another: this is a CPU."""
    (folder / "passed").unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    options = ["--config_file", find_launch_file(engine), "--num_processes", "2", "--mixed_precision", "no"]
    command = ["accelerate", "launch", *options, HERE / "run.py", engine, folder, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    (folder / "log").write_text(result.stdout + result.stderr)


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> Path:
    """Every case, run by this process alone."""
    folder = tmp_path_factory.mktemp("one-process")
    for name in CASES:
        trainer = make_trainer(name, folder / name, folder)
        trainer.train()
        trainer.save_model()
    return folder


@pytest.fixture(scope="session")
def launched(tmp_path_factory, references):
    """Return a function: engine -> the folder where its ranks ran all its cases. Each engine is launched once."""

    @cache
    def run_all(engine: str) -> Path:
        folder = tmp_path_factory.mktemp(engine)
        launch(engine, folder, references)
        assert (folder / "passed").is_file(), (folder / "log").read_text()[-4000:]
        return folder

    return run_all


@pytest.fixture(scope="session")
def table(request):
    """Collect rows, and print them when all is done."""
    rows = [("engine", "case", "backend", "phases", "largest difference", "masks equal")]
    yield rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminal = request.config.get_terminal_writer()
    terminal.line("\n\ntwo ranks against one process\n")
    for row in rows:
        terminal.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def compare(folder: Path, reference: Path) -> tuple[float, bool]:
    """Return the largest difference of a weight, and whether the masks are equal."""
    saved, expected = (load_file(adapter / "adapter_model.safetensors") for adapter in (folder, reference))
    assert saved.keys() == expected.keys()
    difference = max((saved[name] - expected[name]).abs().max().item() for name in expected)
    return difference, LoriMasks.from_pretrained(folder) == LoriMasks.from_pretrained(reference)


@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine, cases in RUNS.items() for case in cases])
def test_two_ranks_equal_one_process(engine, case, references, launched, table):
    difference, equal = compare(launched(engine) / case, references / case)
    phases = "adaptation" if {"mask_name_or_path", "sparsity"} & CASES[case].keys() else "both"
    backend = CASES[case].get("sparse_backend", "hook")
    table.append((engine, case, backend, phases, f"{difference:.1e}", "yes" if equal else "NO"))
    assert equal
    assert difference <= (1e-6 if CASES[case].get("optim") == "sgd" else 1e-5)


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_a_killed_run_goes_on_to_the_same_adapter(engine, references, launched, table):
    """The measure is how far two undisturbed runs of the engine differ."""
    folder = launched(engine)
    for phase in ("calibration", "adaptation"):
        launch(engine, folder, references, phase)
        assert not (folder / "passed").exists() and "SIGKILL" in (folder / "log").read_text()
    launch(engine, folder, references, "none")
    assert (folder / "passed").is_file(), (folder / "log").read_text()[-4000:]
    noise, _ = compare(folder / "undisturbed, again", folder / "undisturbed")
    difference, equal = compare(folder / "killed", folder / "undisturbed")
    table.append((engine, "killed in both phases", "hook", "both", f"{difference:.1e}", "yes" if equal else "NO"))
    assert equal and difference <= noise
