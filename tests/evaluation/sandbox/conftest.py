"""The sandbox's two configurations, and the folder of the scratch folders."""

import tempfile

import pytest

from lori_trl.evaluation.sandbox import run


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """The folder of the scratch folders; empty again after every test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(params=[True, False], ids=["all layers", "Landlock and seccomp"])
def namespaces(request, monkeypatch):
    """Run samples in one configuration; say whether it has namespaces."""
    if request.param and not run._has_namespaces():
        pytest.skip("a hostile sample is not let loose on a machine that has less")
    monkeypatch.setattr(run, "_has_namespaces", lambda: request.param)
    return request.param
