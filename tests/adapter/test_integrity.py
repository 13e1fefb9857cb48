"""What was changed after it was saved is told, by every reader; and taken, where that is asked for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from files_by_hand import change_config, read_tensors
from peft import PeftModel
from safetensors.torch import save_file
from tiny import make_llama, trained_adapter

from lori_trl import cli, load_lori_adapter, merge_lori_adapters, push_lori_to_hub
from lori_trl.adapter import folder as folder_module
from lori_trl.adapter.gguf_export import export_gguf
from lori_trl.compact import export_compact
from lori_trl.continual import extract_task, read_ledger
from lori_trl.evaluation import with_adapter
from lori_trl.inspection import inspect_adapters
from lori_trl.method.lora_fields import KNOWN

B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(trained_adapter(), tmp_path / "code")


def rewrite(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = read_tensors(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def evaluate(folder, **options):
    with with_adapter(make_llama(), str(folder), **options):
        pass


READERS = {
    "load": lambda folder, out, **options: load_lori_adapter(make_llama(), folder, **options),
    "merge": lambda folder, out, **options: merge_lori_adapters([folder], 1.0, output_dir=out, **options),
    "inspect": lambda folder, out, **options: inspect_adapters([folder], **options),
    "export": lambda folder, out, **options: export_compact(folder, out, **options),
    "gguf": lambda folder, out, **options: export_gguf(folder, out, **options),
    "extract": lambda folder, out, **options: extract_task(folder, "code", out, **options),
    "eval": lambda folder, out, **options: evaluate(folder, **options),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_changed_b_is_named_and_taken_where_it_is_meant(reader, folder, tmp_path):
    rewrite(folder, lambda tensors: tensors[B][0].add_(1.0))
    with pytest.raises(ValueError, match=f"{B} is not what was saved.*allow_modified=True"):
        READERS[reader](folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    READERS[reader](folder, tmp_path / "out", allow_modified=True)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("A", "lora_A.weight is not what was saved.*another A"),
        ("no B", "name different tensors.*in one of them only"),
        ("misnamed", "name different tensors"),
        ("truncated", "is unreadable.*whole safetensors file"),
        ("alpha", "adapter_config.json has other settings"),
    ],
)
def test_what_is_damaged_is_refused_by_every_reader(reader, fault, says, folder, tmp_path):
    file = folder / "adapter_model.safetensors"
    if fault == "A":
        rewrite(folder, lambda tensors: tensors[B.replace("lora_B", "lora_A")][0].neg_())
    elif fault == "no B":
        rewrite(folder, lambda tensors: tensors.pop(B))
    elif fault == "misnamed":
        rewrite(folder, lambda tensors: tensors.update({B.replace("lora_B", "lora_b"): tensors.pop(B)}))
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    with pytest.raises(ValueError, match=says):
        READERS[reader](folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_lora_without_its_b_is_refused_too(folder):
    """PEFT itself leaves such a B at zero, without an error."""
    (folder / "lori_config.json").unlink()
    rewrite(folder, lambda tensors: tensors.pop(B))
    with pytest.raises(ValueError, match="has no lora_A and lora_B for model.layers.1.mlp.up_proj"):
        evaluate(folder)


def test_a_file_that_peft_wrote_again_is_the_same_adapter(folder, tmp_path):
    model = PeftModel.from_pretrained(make_llama(), folder)
    model.save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "again" / name, folder / name)
    load_lori_adapter(make_llama(), folder)


@pytest.mark.parametrize("reader", READERS)
def test_a_config_that_another_peft_wrote_is_the_same_adapter(reader, folder, tmp_path):
    """PEFT shortens lists of targets, and every version has fields of its own."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    change_config(folder, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.1, use_next=None, next=False)
    READERS[reader](folder, tmp_path / "out")


@pytest.mark.parametrize("is_lori", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_a_setting_that_nobody_knows_is_refused_by_name(reader, is_lori, folder, tmp_path):
    change_config(folder, use_mirror_lora=True)
    if not is_lori:
        (folder / "lori_config.json").unlink()
    with pytest.raises(ValueError, match="sets use_mirror_lora=True, which PEFT .* does not know"):
        READERS[reader](folder, tmp_path / "out", allow_modified=True)
    assert not (tmp_path / "out").exists()


def test_what_a_later_peft_writes_by_default_is_no_unknown_setting(folder, monkeypatch):
    monkeypatch.setattr(folder_module, "KNOWN", KNOWN - {"megatron_core", "qalora_group_size"})
    load_lori_adapter(make_llama(), folder)
    change_config(folder, qalora_group_size=32)
    with pytest.raises(ValueError, match="sets qalora_group_size=32"):
        load_lori_adapter(make_llama(), folder)


@pytest.mark.parametrize("is_lori", [True, False])
def test_a_module_that_peft_would_leave_out_is_named(is_lori, folder):
    change_config(folder, target_modules=["q_proj"])
    if not is_lori:
        (folder / "lori_config.json").unlink()
    with pytest.raises(ValueError, match="its adapter_config.json leaves out model.layers.0.mlp.down_proj"):
        evaluate(folder)


def test_what_plain_peft_trained_on_can_be_continued(folder, tmp_path, capsys):
    model = PeftModel.from_pretrained(make_llama(), folder, is_trainable=True)
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.add_(0.1)
    model.save_pretrained(folder)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tasks", str(folder), "--extract", "code", "--output_dir", str(tmp_path / "out")])
    assert "--allow_modified" in capsys.readouterr().err
    options = ["--output_dir", str(tmp_path / "out"), "--allow-modified"]
    assert cli.main(["tasks", str(folder), "--extract", "code", *options]) == 0
    load_lori_adapter(make_llama(), tmp_path / "out")  # saved anew, it is whole again


def test_a_changed_record_is_no_secret(folder):
    record = json.loads((folder / "lori_config.json").read_text())
    (folder / "lori_config.json").write_text(json.dumps(record | {"sparsity": 0.8}))
    for read in (
        read_ledger,
        lambda folder: inspect_adapters([folder]),
        lambda folder: push_lori_to_hub(folder, "a/b"),
    ):
        with pytest.raises(ValueError, match="was changed after it was saved"):
            read(folder)
