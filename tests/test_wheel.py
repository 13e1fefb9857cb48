"""The wheel in a fresh environment, far from the checkout: it lists, checks and trains."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from lori_trl.recipes.find import list_recipes

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.release


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., str]:
    """Return a function that runs a program of the fresh environment, in another folder, and returns its output."""
    top = tmp_path_factory.mktemp("fresh")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(top), versions=["standard"])
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", top / "venv"], check=True)
    programs = top / "venv" / "bin"
    install = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--no-index", wheel], check=True)
    # What it needs comes from this environment. The .pth files there, such as an editable lori_trl's, are not read.
    (site,) = (top / "venv").glob("lib/python*/site-packages")
    (site / "below.pth").write_text(sysconfig.get_path("purelib"))
    folder = top / "elsewhere"
    folder.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(program: str, *arguments: str | Path) -> str:
        call = [programs / program, *arguments]
        ended = subprocess.run(call, cwd=folder, env=variables, text=True, capture_output=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


def test_it_is_the_wheel_that_runs(run):
    file = run("python", "-c", "import lori_trl; print(lori_trl.__file__)").strip()
    assert "site-packages" in file and not Path(file).is_relative_to(ROOT) and "fresh" in file
    (version,) = {line.partition(" = ")[2] for line in open(ROOT / "pyproject.toml") if line.startswith("version = ")}
    assert run("lori", "--version").startswith(f"lori_trl {version.strip().strip(chr(34))} (torch ")
    assert "--sparsity SPARSITY" in run("lori-sft", "--help")


def test_its_recipes_are_listed_shown_copied_and_valid(run):
    listed = {line.split()[0] for line in run("lori", "recipes", "list").splitlines() if ".yaml" in line}
    assert listed - {"run"} == {file.name for file in list_recipes()}
    assert "task_name: quickstart" in run("lori", "recipes", "show", "quickstart.yaml")
    run("lori", "recipes", "copy", "quickstart.yaml", "mine.yaml")
    assert "mine.yaml: no faults" in run("lori", "recipes", "validate", "mine.yaml")


def test_it_trains_by_a_shipped_recipe(run, model_folder):
    assert "4,404,019" in run("lori-sft", "--recipe", "code_lori_s.yaml", "--dry-run")
    short = (
        "--max_steps 2 --calibration_max_steps 2 --per_device_train_batch_size 2 --eval_strategy no --eval_on_start no"
    )
    run("lori-sft", "--recipe", "quickstart.yaml", "--model_name_or_path", model_folder, *short.split())
    assert "quickstart" in run("lori", "tasks", "quickstart-lori")
