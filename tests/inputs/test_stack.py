"""Which versions are needed: told in one line each, at the trainer's import and by `--version`."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from lori_trl.cli import main
from lori_trl.inputs import stack

PROJECT = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def pretend(monkeypatch):
    """Return a function that lets packages have other versions."""

    def change(**versions):
        def version(name):
            if (there := versions.get(name.replace("-", "_"))) is None:
                return metadata.version(name)
            if there == "none":
                raise metadata.PackageNotFoundError(name)
            return there

        monkeypatch.setattr(stack, "version", version)

    return change


def test_the_bounds_are_those_of_the_package():
    bounded = {requirement for requirement in PROJECT["dependencies"] if "<" in requirement}
    assert {f"{name}{needed}" for name, needed in stack.NEEDED.items()} == bounded


def test_what_is_installed_is_neither_too_old_nor_untried():
    assert stack.too_old() == stack.untried() == []
    stack.check_stack()


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"peft": "0.19.1"}, "peft 0.19.1: lori_trl needs peft>=0.20,<1. Run `pip install 'peft>=0.20,<1'`."),
        ({"trl": "1.8.0rc1"}, "trl 1.8.0rc1: lori_trl needs trl>=1.8,<2."),
        ({"torch": "2.6.0+cu124"}, "torch 2.6.0+cu124: lori_trl needs torch>=2.11,<3."),
        ({"huggingface_hub": "none"}, "huggingface-hub (not installed): lori_trl needs huggingface-hub>=1.16,<3."),
    ],
)
def test_an_old_package_is_refused_at_import(pretend, versions, words):
    pretend(**versions)
    assert [line.startswith(words) and "\n" not in line for line in stack.too_old()] == [True]
    with pytest.raises(ImportError, match="too old for lori_trl") as error:
        stack.check_stack()
    assert words in str(error.value)


def test_all_that_are_old_are_told_at_once(pretend):
    pretend(trl="0.24.0", transformers="4.57.1", peft="0.18.0")
    assert [line.split()[0] for line in stack.too_old()] == ["transformers", "trl", "peft"]


def test_trl_1_15_needs_triton(pretend, monkeypatch):
    pretend(trl="1.15.0")
    monkeypatch.setattr(stack, "find_spec", lambda name: None)
    assert [line.startswith("trl 1.15 needs triton, which is not installed: ") for line in stack.too_old()] == [True]
    monkeypatch.setattr(stack, "find_spec", lambda name: object())
    assert stack.too_old() == []


@pytest.mark.parametrize("newer", ["1.0.0", "1.2.0.dev0"])
def test_a_new_major_is_tried_and_told(pretend, caplog, newer):
    pretend(peft=newer)
    stack.check_stack()
    (line,) = caplog.messages
    assert line == f"peft {newer} was never tried with this version of lori_trl, which was with peft>=0.20,<1."


@pytest.mark.parametrize("newer", ["0.22.0", "0.21.3.dev0"])
def test_a_minor_release_is_not_told(pretend, newer):
    pretend(peft=newer)
    assert stack.too_old() == stack.untried() == []


def test_version_tells_it(pretend, capsys):
    pretend(trl="1.5.0", accelerate="2.0.1")
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    first, *rest = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and "trl 1.5.0" in first and "accelerate 2.0.1" in first
    assert [line.split(" ")[0] for line in rest] == ["trl", "accelerate"]


def test_the_trainer_is_not_imported_on_an_old_stack(tmp_path):
    """PEFT 0.17 as far as metadata go: the line is told, and not a name that PEFT lacks."""
    info = tmp_path / "peft-0.17.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.17.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom lori_trl import LoriSFTTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: ") and "peft 0.17.0: lori_trl needs" in done.stderr
