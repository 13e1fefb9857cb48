"""The package: light to import, complete in the wheel."""

import subprocess
import sys
from pathlib import Path

import lori_trl

ROOT = Path(__file__).parents[1]


def test_importing_is_light():
    code = "import sys, lori_trl; print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_public_names():
    assert lori_trl.__all__ == sorted(lori_trl.__all__) == dir(lori_trl)
    assert all(getattr(lori_trl, name).__name__ == name for name in lori_trl.__all__)


def test_the_wheel_lists_its_recipes(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(install, check=True)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from lori_trl.cli import main; main(['recipes', 'list'])"
    code += "; import lori_trl; print(lori_trl.__file__)"
    listed = subprocess.check_output([sys.executable, "-I", "-c", code, target], text=True, cwd=tmp_path)
    assert listed.splitlines()[-1] == str(target / "lori_trl" / "__init__.py")
    expected = {file.name for file in (ROOT / "recipes").rglob("*.yaml")}
    assert {line.split()[0] for line in listed.splitlines() if ".yaml" in line} == expected | {"run"}
    shipped = target / "lori_trl" / "shipped"
    assert list(shipped.glob("model_cards/*.jinja")) and list(shipped.glob("recipes/quickstart/train.jsonl"))
    task_files = {file.relative_to(ROOT) for file in (ROOT / "lori_trl" / "evaluation" / "tasks").rglob("*.*l")}
    assert len(task_files) == 23 and all((target / file).is_file() for file in task_files)
    assert (target / "lori_trl" / "inspection" / "page.html.jinja").is_file()
    assert (target / "lori_trl" / "py.typed").is_file()
