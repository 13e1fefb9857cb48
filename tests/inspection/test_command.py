"""`lori inspect` refuses what it cannot read or write, and writes nothing then."""

import json
import math
from pathlib import Path

import pytest
import torch
from files_by_hand import change_tensors, read_tensors
from inspection.adapters import matrices, random_masks, write
from safetensors.torch import save_file

from lori_trl.cli import main


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["inspect", *map(str, arguments)])
    assert exit.value.code == 2
    out, error = capsys.readouterr()
    assert out == "" and "Traceback" not in error and error.count(". ") >= 2  # given, allowed, what to do
    return error


def spoil(folder: Path, name: str) -> None:
    file = folder / "adapter_model.safetensors"
    state = read_tensors(file)
    first = sorted(state)[0]
    if name.endswith("plain LoRA"):
        (folder / "lori_config.json").unlink()
    if name == "nan":
        change_tensors(folder, lambda tensors: tensors[first].fill_(math.nan))
    elif name == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif name.startswith("no B"):
        save_file({key: tensor for key, tensor in state.items() if key == first or "lora_A" in key}, file)
    elif name.startswith("no lora"):
        save_file({"lm_head.weight": torch.ones(2, 2)}, file)
    elif name == "no weights":
        file.unlink()
    elif name == "no config":
        (folder / "adapter_config.json").unlink()
    elif name == "dora":
        (folder / "lori_config.json").unlink()  # it tells of a change of the other
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    elif name == "not json":
        (folder / "adapter_config.json").write_text("{")
    elif name == "other masks":
        weights = matrices(1, rank=2)
        random_masks("code", weights, 0.5, 1).save_pretrained(folder)
    elif name == "no mask":
        (folder / "masks" / "code.safetensors").unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "holds NaN or infinity"),
        ("truncated", "unreadable"),
        ("no B", "name different tensors"),
        ("no lora", "name different tensors"),
        ("no B in plain LoRA", "no pair of lora_A"),
        ("no lora in plain LoRA", "holds no lora_A and lora_B"),
        ("no weights", "holds no adapter_model.safetensors"),
        ("no config", "holds no adapter_config.json"),
        ("dora", "use_dora=True"),
        ("not json", "must be the JSON that PEFT wrote"),
        ("other masks", "do not fit the adapter"),
        ("no mask", "holds no masks"),
    ],
)
def test_a_spoiled_adapter_is_refused_and_nothing_written(tmp_path, capsys, fault, message):
    weights = matrices(1)
    folder = write(tmp_path / "a", weights, [random_masks("code", weights, 0.3, 1)])
    spoil(folder, fault)
    error = refused(capsys, folder, "--html", tmp_path / "page.html", "--json", tmp_path / "x.json")
    assert message in error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]


def test_wrong_calls_are_refused(tmp_path, capsys, two_tasks, monkeypatch):
    folder = two_tasks[0]
    assert "does not exist" in refused(capsys, tmp_path / "nowhere")
    assert "is there twice" in refused(capsys, folder, folder)
    assert "--save" in refused(capsys, folder, "--save", tmp_path / "picture.jpg")
    assert "--save" in refused(capsys, folder, "--save", folder / "adapter_config.json")
    assert "--html" in refused(capsys, folder, "--html", tmp_path / "no" / "page.html")
    assert "--json" in refused(capsys, folder, "--json", tmp_path)
    monkeypatch.setattr("lori_trl.adapter.heatmaps.find_spec", lambda name: None)
    for option, target in (("--html", "page.html"), ("--save", "a.png"), ("--save", "folder")):
        assert "pip install matplotlib" in refused(capsys, folder, option, tmp_path / target)
    assert not list(tmp_path.iterdir())
    assert main(["inspect", str(folder)]) == 0  # the tables need no matplotlib


def test_an_untrained_adapter_has_tables_and_no_pictures(tmp_path, capsys):
    folder = write(tmp_path / "a", {path: (A, torch.zeros_like(B)) for path, (A, B) in matrices(1).items()})
    for target in ("a.png", "pictures"):
        assert "nothing to draw" in refused(capsys, folder, "--save", tmp_path / target)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert main(["inspect", str(folder), "--html", str(tmp_path / "page.html")]) == 0
