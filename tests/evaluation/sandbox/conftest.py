"""Layers to run a sample under, and the folder of the scratch folders."""

import tempfile

import pytest

from lori_trl.evaluation.sandbox import kernel, run

# What an ordinary user, a container without namespaces, and a kernel without Landlock and seccomp have to offer.
SETS = {
    "all": kernel.LAYERS,
    "no namespaces": ("landlock", "seccomp"),
    "namespaces alone": ("pids", "mounts", "network", "nobody"),
}


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """The folder of the scratch folders; empty again after every test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(params=SETS)
def layers(request, monkeypatch):
    available = run._layers()
    chosen = tuple(layer for layer in SETS[request.param] if layer in available)
    if not chosen:
        pytest.skip("a hostile sample is not let loose on a machine that has none of these")
    monkeypatch.setattr(run, "_layers", lambda: chosen)
    return chosen
