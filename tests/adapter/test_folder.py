"""The adapter's folder: plain PEFT, whole or not at all, and checked when it is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from files_by_hand import change_tensors
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import lora_config
from transformers import AutoModelForCausalLM

from lori_trl import LoriMasks, load_lori_adapter
from lori_trl.adapter.record import read_record
from lori_trl.adapter.record_fields import Counts
from lori_trl.adapter.write import staged
from lori_trl.method.sparsity import num_to_select

PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
torch.save(model(torch.arange(12).view(2, 6)).logits, sys.argv[3])
assert not any(name.startswith("lori_trl") for name in sys.modules)
"""
MERGED = """
with torch.no_grad():
    before = model(torch.arange(12).view(2, 6)).logits
    after = model.merge_and_unload()(torch.arange(12).view(2, 6)).logits
torch.testing.assert_close(after, before)
assert not torch.equal(before, AutoModelForCausalLM.from_pretrained(sys.argv[1])(torch.arange(12).view(2, 6)).logits)
"""


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(12).view(2, 6)).logits


@pytest.mark.parametrize("adapter_name", ["default", "my_task"])
def test_plain_peft_gives_the_same_logits(make_trainer, model_folder, tmp_path, adapter_name):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora_config(), adapter_name)
    trainer = make_trainer(model=model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    file = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, model_folder, tmp_path / "saved", file], check=True)
    theirs = torch.load(file, weights_only=True)
    assert torch.equal(theirs, logits(trainer.model))
    assert not torch.equal(theirs, logits(AutoModelForCausalLM.from_pretrained(model_folder)))


@pytest.mark.release
@pytest.mark.parametrize("version", ["0.18.1", "0.19.1"])
def test_a_peft_too_old_to_train_it_serves_an_adapter(adapter_folder, model_folder, tmp_path, version):
    old = [f"--target={tmp_path / 'old'}", f"peft=={version}"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *old]
    installed = subprocess.run(install, text=True, capture_output=True)
    if installed.returncode and "CI" not in os.environ:
        pytest.skip(f"pip reaches no index: {installed.stderr.splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr
    file = tmp_path / "logits.pt"
    script = f"import peft; assert peft.__version__ == {version!r}\n{PLAIN_PEFT}\n{MERGED}"
    variables = os.environ | {"PYTHONPATH": str(tmp_path / "old")}
    subprocess.run([sys.executable, "-c", script, model_folder, adapter_folder, file], env=variables, check=True)
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter_folder)
    assert torch.equal(torch.load(file, weights_only=True), logits(own))


def test_what_is_saved(adapter_folder):
    files = {str(file.relative_to(adapter_folder)) for file in adapter_folder.rglob("*") if file.is_file()}
    files = {file for file in files if not file.startswith(("calibration", "tokenizer"))}
    assert files == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "density.png",
        "lori_config.json",
        "lori_run.txt",
        "masks/code.safetensors",
        "recipe.yaml",
    }
    record = read_record(adapter_folder)
    weights = load_file(adapter_folder / "adapter_model.safetensors")
    trained = sum(int(tensor.count_nonzero()) for name, tensor in weights.items() if "lora_B" in name)
    lora_B = sum(tensor.numel() for name, tensor in weights.items() if "lora_B" in name)
    assert record.counts == Counts(
        lora=sum(tensor.numel() for tensor in weights.values()),
        lora_B=lora_B,
        selected=num_to_select(0.9, lora_B),
    )
    assert trained <= record.counts.selected
    assert record.variant == "LoRI-S" and record.sparsity == 0.9 and record.phase == "adapting"
    assert record.calibration.steps == 4 and record.tasks[0].task == "code"


def test_checkpoints_hold_the_same(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=2).train()
    for folder in ("calibration/checkpoint-2", "checkpoint-4"):
        names = {file.name for file in (tmp_path / "out" / folder).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "lori_config.json", "README.md"} <= names
        assert "training_args.bin" not in names
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()  # a checkpoint is saved once, in its folder
    assert LoriMasks.from_pretrained(tmp_path / "out" / "checkpoint-4").num_selected > 0


def test_no_token_is_written(make_trainer, tmp_path):
    secret = "hf_thisIsASecretToken"
    trainer = make_trainer(hub_token=secret, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_load_restores_masks_and_freezes_A(model, adapter_folder):
    loaded = load_lori_adapter(model, adapter_folder, is_trainable=True, adapter_name="mine")
    assert loaded.lori_masks == {"code": LoriMasks.from_pretrained(adapter_folder)}
    loaded.set_adapter("mine")
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trainable and all(".lora_B.mine." in name for name in trainable)


def copy_of(folder, target):
    import shutil

    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("calibration"))


def test_another_A_is_refused(model, adapter_folder, tmp_path):
    folder = copy_of(adapter_folder, tmp_path / "copy")
    name = next(name for name in load_file(folder / "adapter_model.safetensors") if "lora_A" in name)
    change_tensors(folder, lambda tensors: tensors[name][0].add_(1e-3))
    with pytest.raises(ValueError, match="have fingerprint.*Fetch the whole folder again"):
        load_lori_adapter(model, folder)


def test_bad_folders_are_refused(model, adapter_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        load_lori_adapter(model, tmp_path)
    folder = copy_of(adapter_folder, tmp_path / "copy")
    (folder / "lori_config.json").rename(tmp_path / "lori_config.json")
    with pytest.raises(FileNotFoundError, match=r"holds no lori_config\.json"):
        load_lori_adapter(model, folder)
    (tmp_path / "lori_config.json").rename(folder / "lori_config.json")
    whole = (folder / "lori_config.json").read_text()
    for broken in (whole[:100], "[]", "{}"):
        (folder / "lori_config.json").write_text(broken)
        with pytest.raises(ValueError, match="is unreadable"):
            read_record(folder)
    (folder / "lori_config.json").write_text(json.dumps(json.loads(whole) | {"format_version": 3}))
    with pytest.raises(ValueError, match="format_version 3.*Upgrade"):
        read_record(folder)


def test_a_failing_save_leaves_the_old_adapter_whole(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    monkeypatch.setattr("lori_trl.adapter.masks.LoriMasks.save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.save_model()
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}


@pytest.mark.parametrize("fault", ["missing", "half"])
def test_a_save_that_is_not_whole_is_no_save(make_trainer, tmp_path, fault):
    trainer = make_trainer(max_steps=1, calibration_max_steps=1)
    trainer.train()
    trainer.save_model()
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    state = dict(trainer.model.state_dict())
    name = next(name for name in state if "lora_B" in name)
    if fault == "missing":
        del state[name]
    else:
        state[name] = state[name][: state[name].shape[0] // 2]
    with pytest.raises(
        RuntimeError, match="Of the adapter's 28 tensors, 1 are missing or incomplete: base_model.*FULL"
    ):
        trainer._save(state_dict=state)
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}


def test_staging_replaces_the_config_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    with staged(tmp_path / "new") as stage:
        for name in ("zzz", "lori_config.json", "aaa"):
            (stage / name).write_text("x")
    assert order == ["aaa", "zzz", "lori_config.json"]
    assert sorted(os.listdir(tmp_path / "new")) == ["aaa", "lori_config.json", "zzz"]


def test_format_2_loads_for_ever(model):
    """Golden: an adapter as format 2 was first written."""
    loaded = load_lori_adapter(model, Path(__file__).parents[1] / "golden" / "adapter")
    assert isinstance(loaded, PeftModel) and loaded.lori_masks["code"].num_selected == 204
    torch.testing.assert_close(logits(loaded)[0, 5, :3], torch.tensor(GOLDEN_LOGITS), rtol=1e-4, atol=1e-5)


GOLDEN_LOGITS = [-0.007558, 0.159934, 0.028308]
