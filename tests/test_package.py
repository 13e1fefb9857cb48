"""The package: its names, and what is in the wheel and the source distribution, with nothing else in them."""

import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import lori_trl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What the package's folders may hold besides Python. Whatever else lies there would travel to everybody.
KINDS = {
    "lori_trl": {".py", ".jinja", ".typed"},
    "lori_trl/cli": {".py", ".txt"},
    "lori_trl/training/accelerate_configs": {".yaml"},
    "lori_trl/evaluation/tasks": {".jsonl", ".yaml"},
    "lori_trl/recipes/shipped/model_cards": {".jinja"},
    "lori_trl/recipes/shipped/recipes": {".json", ".jsonl", ".yaml"},
}


def test_public_names():
    assert lori_trl.__all__ == sorted(lori_trl.__all__) == dir(lori_trl)
    assert all(getattr(lori_trl, name).__name__ == name for name in lori_trl.__all__)


def files_below(folder: Path) -> set[str]:
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    return {name for name in names if "__pycache__" not in name}


def build_wheel(source: Path, target: Path) -> set[str]:
    """Return the names in a wheel that is built of a source folder, in this process."""
    (wheel,) = WheelBuilder(str(source)).build(directory=str(target), versions=["standard"])
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    (archive,) = SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / f"lori_trl-{PROJECT['version']}"


def test_the_wheel_has_the_package_and_what_it_ships(sdist, tmp_path):
    names = build_wheel(ROOT, tmp_path)
    expected = {f"lori_trl/{name}" for name in files_below(ROOT / "lori_trl")}
    for folder in ("recipes", "model_cards"):
        expected |= {f"lori_trl/recipes/shipped/{folder}/{name}" for name in files_below(ROOT / folder)}
    metadata = {name for name in names if name.startswith(f"lori_trl-{PROJECT['version']}.dist-info/")}
    assert names - metadata == expected
    for name in sorted(expected):
        kinds = next(KINDS[folder] for folder in sorted(KINDS, reverse=True) if name.startswith(f"{folder}/"))
        assert Path(name).suffix in kinds or name == "lori_trl/py.typed", name
    assert build_wheel(sdist, tmp_path / "again") == names


def test_the_source_distribution_has_what_its_readme_needs(sdist):
    top = {path.name for path in sdist.iterdir()}
    folders = {".ci", "benchmarks", "docs", "examples", "lori_trl", "model_cards", "recipes", "tests"}
    files = {".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "mkdocs.yml"}
    assert top == folders | files | {"pyproject.toml", "PKG-INFO"}
    for folder in folders - {"benchmarks"}:  # where runs leave what git ignores
        assert files_below(sdist / folder) == files_below(ROOT / folder)
    assert not [name for name in files_below(sdist) if name.endswith((".pyc", ".whl")) or "cache" in name.lower()]
