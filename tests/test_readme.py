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


def commands() -> list[str]:
    """Every command of the README, in its order: those of its blocks, and those within its sentences."""
    inline = [" ".join(text.split()) for text in re.findall(r"`(lori[- ][^`]+?)`", README)]
    return list(dict.fromkeys([line for block in blocks("bash") for line in block.splitlines() if line] + inline))


def result_of(command: str) -> str | None:
    """What a command makes: its `--output_dir`, or the last of its words where it makes one file or folder."""
    named = re.search(r"--output_dir (\S+)", command)
    makes_last = command.startswith(("lori export", "lori expand", "lori recipes copy"))
    return named[1] if named else command.split()[-1] if makes_last else None


MAKERS = {result_of(command): command for command in reversed(commands())}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder in which all commands are run."""
    return shutil.copytree(ROOT / "recipes", tmp_path_factory.mktemp("readme") / "recipes").parent


@pytest.fixture(scope="module")
def codes() -> dict[str, int]:
    """Command -> its exit code."""
    return {}


@pytest.fixture
def run(place, codes, model_folder, monkeypatch):
    """Return a function that runs a command once, after those that make what it reads."""
    monkeypatch.chdir(place)
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)

    def train(arguments: list[str]) -> int:
        if "--accelerate_config" in arguments and "--dry-run" not in arguments:
            assert sft(arguments) == 0 and launched[-1].num_processes == 8
            arguments = launched[-1].training_script_args[1:]
        on_gpus = "quickstart.yaml" not in arguments  # 8B and 70B: checked as far as their counts
        return sft([*arguments, "--model_name_or_path", str(model_folder), *["--dry-run"] * on_gpus])

    def run(command: str) -> int:
        if command not in codes:
            program, *arguments = shlex.split(command)
            for maker in {MAKERS[word] for word in arguments if word in MAKERS} - {command}:
                assert run(maker) == 0
            if program == "make":
                codes[command] = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT).returncode
            else:
                codes[command] = {"lori": main, "lori-sft": train}[program](arguments)
        return codes[command]

    return run


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_command_runs(run, command):
    assert run(command) == 0
    result = result_of(command)
    assert result is None or os.path.exists(result) or "code_lori_s" in command  # dry runs


def test_the_commands_are_those_meant():
    assert {"make quickstart", "make test", "lori recipes list"} <= {*commands()}
    assert sum("--accelerate_config" in command for command in commands()) == 3


def test_options_named_in_the_text(workplace, model_folder):
    """The two sentences on resuming and on the next task."""
    short = ["--model_name_or_path", str(model_folder), "--max_steps", "2", "--calibration_max_steps", "1"]
    recipe = ["--recipe", "quickstart.yaml", *short, "--eval_strategy", "no"]
    assert "--resume_from_checkpoint True" in README
    sft([*recipe, "--output_dir", "quickstart-lori", "--save_strategy", "steps", "--save_steps", "1"])
    sft([*recipe, "--output_dir", "quickstart-lori", "--resume_from_checkpoint", "True"])
    option = re.search(r"`(--adapter_name_or_path quickstart-lori --task_name next)`", README).group(1)
    assert sft([*recipe, "--output_dir", "next-lori", *option.split()]) == 0
