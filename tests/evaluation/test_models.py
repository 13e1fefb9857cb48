"""An adapter comes and goes, and names its base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lori_trl.compact import export_compact
from lori_trl.evaluation import (
    find_base_model,
    with_adapter,
)


def test_an_adapter_comes_and_goes(model, adapter_folder, plain_adapter):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.arange(10)[None]
    plain = model(ids).logits
    outputs = []
    for folder in (adapter_folder, plain_adapter, plain_adapter):
        with with_adapter(model, str(folder)) as (adapted, _):
            outputs.append(adapted(ids).logits)
            expected = PeftModel.from_pretrained(copy_of(model, before), str(folder))(ids).logits
            assert torch.equal(outputs[-1], expected)
    assert not torch.equal(outputs[0], plain) and torch.equal(outputs[1], outputs[2])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert torch.equal(model(ids).logits, plain)


def test_an_adapters_own_tokenizer_comes_with_it(model, adapter_folder, plain_adapter, tmp_path, caplog):
    own = shutil.copytree(adapter_folder, tmp_path / "own")
    (own / "chat_template.jinja").write_text("its own")
    with with_adapter(model, str(own)) as (_, tokenizer):
        assert tokenizer.chat_template == "its own"
    (own / "adapter_compact.safetensors").write_bytes(
        export_compact(own, tmp_path / "compact.safetensors").read_bytes()
    )
    assert "has a chat template, and a compact file has no tokenizer" in caplog.text
    (own / "adapter_model.safetensors").unlink()
    with with_adapter(model, str(own)) as (_, tokenizer):
        assert tokenizer.chat_template == "its own"
    for bare in (plain_adapter, tmp_path / "compact.safetensors"):
        with with_adapter(model, str(bare)) as (_, tokenizer):
            assert tokenizer is None


def copy_of(model, weights):
    fresh = type(model)(model.config)
    fresh.load_state_dict(weights)
    return fresh


def test_the_base_of_several_adapters(adapter_folder, plain_adapter, model_folder, tmp_path, caplog):
    assert find_base_model(None, [str(adapter_folder), str(plain_adapter)]) == str(model_folder)
    assert find_base_model(None, [str(model_folder)]) is None
    other = copy_with_base(plain_adapter, tmp_path / "other", "some/other-base")
    with pytest.raises(ValueError, match="different base models"):
        find_base_model(None, [str(adapter_folder), str(other)])
    assert find_base_model(str(model_folder), [str(other)]) == str(model_folder)
    assert "was trained on `some/other-base`" in caplog.text


def copy_with_base(adapter: Path, folder: Path, base: str) -> Path:
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return folder


def test_a_base_from_the_hubs_cache_is_the_base_of_its_name(plain_adapter, tmp_path, caplog):
    """What `lori merge` takes for one base, `lori eval` does too."""
    cached = str(tmp_path / "models--me--tiny" / "snapshots" / "0a1b2c")
    adapters = [
        str(copy_with_base(plain_adapter, tmp_path / name, base))
        for name, base in (("cached", cached), ("named", "me/tiny"), ("copied", "/models/tiny"))
    ]
    assert find_base_model(None, adapters) == "me/tiny"
    assert find_base_model("me/tiny", adapters) == "me/tiny" and not caplog.records
