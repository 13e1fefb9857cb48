"""What a repository on GitHub has besides the package: valid, and about targets and versions that there are."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_workflow_runs_targets_that_exist_on_every_python_that_is_named():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {*matrix["target"], *(each["target"] for each in matrix["include"])}
    assert {"lint", "test", "test-lowest"} <= named <= targets
    tried = {f"Programming Language :: Python :: {each}" for each in matrix["python"]}
    assert tried == {each for each in PROJECT["classifiers"] if re.search(r"Python :: 3\.", each)}


def test_the_citation_names_the_package_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["title"] == PROJECT["name"].replace("-", "_") and citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["url"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_hooks_are_those_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format"]
