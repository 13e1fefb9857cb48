"""The README is true to the letter: its snippets and commands are run, on the tiny model."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from lori_trl.cli import main, sft

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder that looks like the repository's top level."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_snippets(workplace, model_folder):
    train, load = (block.replace(SMOLLM2, str(model_folder)) for block in blocks("python"))
    names = {}
    exec(train, names)
    masks = names["trainer"].masks
    assert masks.task == "style" and masks.num_selected == masks.numel // 10
    exec(load, names)
    assert names["model"].peft_config["default"].r == 32


def test_commands(workplace, model_folder, monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    commands += [shlex.split(" ".join(text.split())) for text in re.findall(r"`(lori[- ][^`]+?)`", README)]
    ran = set()
    for program, *arguments in commands:
        if program == "make":
            subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
        elif program == "lori":
            assert main(arguments) == 0
        elif program == "lori-sft":
            on_gpus = "quickstart.yaml" not in arguments  # 8B and 70B: checked as far as their counts
            arguments += ["--model_name_or_path", str(model_folder), *["--dry-run"] * on_gpus]
            assert sft(arguments) == 0
            if "--accelerate_config" in arguments:
                assert sft(launched[-1].training_script_args[1:]) == 0
        ran.add(" ".join([program, *arguments[:2]]))
    assert {"make quickstart", "make test", "lori recipes list", "lori-sft --recipe quickstart.yaml"} <= ran
    assert len(launched) == 2 and [launch.num_processes for launch in launched] == [8, 8]
    assert os.path.isfile("quickstart-lori/adapter_model.safetensors")


def test_options_named_in_the_text(workplace, model_folder):
    """The two sentences on resuming and on the next task."""
    short = ["--model_name_or_path", str(model_folder), "--max_steps", "2", "--calibration_max_steps", "1"]
    recipe = ["--recipe", "quickstart.yaml", *short, "--eval_strategy", "no"]
    assert "--resume_from_checkpoint True" in README
    sft([*recipe, "--output_dir", "quickstart-lori", "--save_strategy", "steps", "--save_steps", "1"])
    sft([*recipe, "--output_dir", "quickstart-lori", "--resume_from_checkpoint", "True"])
    option = re.search(r"`(--adapter_name_or_path quickstart-lori --task_name next)`", README).group(1)
    assert sft([*recipe, "--output_dir", "next-lori", *option.split()]) == 0
