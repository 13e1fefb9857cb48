"""Outputs: checked before any work, and never an input, another output, or another adapter."""

import shutil

import pytest
from tiny import make_rows, trained_adapter

from lori_trl.cli import main
from lori_trl.cli.targets import check_targets
from lori_trl.compact import export_compact


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two adapters, a compact file, and data; the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "math"):
        shutil.copytree(trained_adapter(), name)
    export_compact("one", "c.safetensors")
    make_rows().to_json("rows.jsonl")
    (tmp_path / "link").symlink_to("one")
    return tmp_path


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(place, call, capsys):
    """Return the error of a call that must exit with 2 and change nothing."""
    before = contents(place)
    with pytest.raises(SystemExit) as exit:
        main(call)
    error = capsys.readouterr().err
    assert exit.value.code == 2, error
    assert contents(place) == before
    assert error.count(". ") >= 2 and "Traceback" not in error, error  # given, allowed, what to do
    return error


@pytest.mark.parametrize(
    "call",
    [
        "export --compact one one/adapter_model.safetensors",
        "export --compact one link/new.safetensors --overwrite",
        "export --compact one c.safetensors",
        "export --compact one no/such/folder",
        "export --compact one math",
        "export --gguf one link/new.gguf --overwrite",
        "export --gguf one c.safetensors",
        "export --gguf one rows.jsonl",
        "export --gguf one new.gguf --dtype int8",
        "export --compact one new.safetensors --base_model me/base",
        "export --gguf one math/lori_config.json --overwrite",
        "expand c.safetensors math",
        "expand c.safetensors c.safetensors --overwrite",
        "merge one math --output_dir math --overwrite",
        "merge one --output_dir math",
        "merge one --output_dir one/merged --overwrite",
        "merge one math --output_dir . --overwrite",
        "merge one math --output_dir c.safetensors",
        "merge one --output_dir math --search shared --heldout rows.jsonl",
        "tasks one --extract code --output_dir math",
        "tasks one --extract code --output_dir one/code",
        "inspect one --html one/adapter_config.json",
        "inspect link --json one/new.json",
        "inspect one --html math/adapter_config.json",
        "inspect one --html c.safetensors",
        "eval one --tasks boolq --output_path math/lori_config.json",
        "export --compact one math/adapter_model.safetensors --overwrite",
        "inspect one --json out --html ./out",
        "inspect one --save out --html out",
        "inspect c.safetensors --json c.safetensors",
        "inspect one --save one/masks",
        "inspect one --json /dev/null",
        f"inspect one --json {'a' * 300}",
        f"expand {'a' * 300} new",
        "eval one --tasks boolq --output_path one/adapter_config.json",
        "eval one --metrics loss --dataset_path rows.jsonl --output_path rows.jsonl",
        "eval one --metrics loss --dataset_path rows.jsonl --output_path math",
        "eval one --metrics loss --dataset_path rows.jsonl --output_path no/such/file",
    ],
)
def test_outputs_destroy_nothing(call, place, capsys):
    refused(place, call.split(), capsys)


@pytest.mark.parametrize(
    "call",
    ["export --compact one c.safetensors", "expand c.safetensors math", "merge one --output_dir math --weights 0.5"],
)
def test_another_adapter_is_replaced_on_demand(call, place, capsys):
    refused(place, call.split(), capsys)
    inputs = contents(place / "one")
    assert main([*call.split(), "--overwrite"]) == 0
    assert contents(place / "one") == inputs


def test_what_is_not_on_the_disk_is_no_input(tmp_path):
    check_targets({"--json": tmp_path / "me", "--html": None}, ["me/adapter", "nowhere"])
