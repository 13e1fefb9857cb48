"""A whole model of a base and adapters: as PEFT's merge gives it, and nothing else changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, client_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import SIZES, make_llama, make_tokenizer, model_folder, trained_adapter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lori_trl.cli import main
from lori_trl.merging import merge_into_base

HEADS = {"head_dim": 8}
BASES = {
    "llama": lambda: make_llama(),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS)),
    "gemma": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS)),  # ties its embeddings
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4)),
}


def save_base(folder: Path, name: str = "llama", *, dtype: torch.dtype = torch.float32, **arguments) -> Path:
    torch.manual_seed(0)
    model = BASES[name]().to(dtype)
    model.save_pretrained(folder, **arguments)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 1, *, size: float = 0.1, **changes) -> Path:
    """Save a LoRA adapter of random numbers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | changes))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, size)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(12)[None]).logits


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("name", BASES)
def test_it_is_what_peft_merges(tmp_path, name, shards):
    base = save_base(tmp_path / "base", name, **({"max_shard_size": "20KB"} if shards == "shards" else {}))
    adapter = save_adapter(tmp_path / "task", base)
    merged = merge_into_base([adapter], output_dir=tmp_path / "merged")
    assert (merged / "model.safetensors.index.json").is_file() == (shards == "shards")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = logits(peft)
    model = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    by_peft = peft.merge_and_unload().state_dict()
    changed = {module.partition(".weight")[0] for module in by_peft} & {
        path.removeprefix("base_model.model.").rpartition(".lora_A")[0] for path in weights_of(adapter)
    }
    before, after = weights_of(base), weights_of(merged)
    assert changed and before.keys() == after.keys()
    for tensor, value in after.items():
        module = tensor.removesuffix(".weight")
        if any(path.endswith(module) for path in changed):
            full = next(path for path in changed if path.endswith(module))
            torch.testing.assert_close(value, by_peft[f"{full}.weight"], rtol=0, atol=1e-6)
        else:
            assert torch.equal(value, before[tensor]), tensor
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == make_tokenizer().get_vocab()


def test_several_adapters_are_the_weighted_sum(tmp_path):
    base = save_base(tmp_path / "base")
    adapters = [save_adapter(tmp_path / f"task{seed}", base, seed) for seed in (1, 2)]
    merged = merge_into_base(adapters, [0.5, -0.25], output_dir=tmp_path / "merged")
    alone = [weights_of(merge_into_base([each], output_dir=tmp_path / f"{each.name}-alone")) for each in adapters]
    before = weights_of(base)
    for name, tensor in weights_of(merged).items():
        expected = before[name] + 0.5 * (alone[0][name] - before[name]) - 0.25 * (alone[1][name] - before[name])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    card = (merged / "README.md").read_text()
    assert "| task1 | task1 | 0.5 |" in card and "None" not in card


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_a_sum_is_rounded_once(tmp_path, dtype, expected):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "task", base)
    merged = weights_of(merge_into_base([adapter], output_dir=tmp_path / "merged", dtype=dtype))
    assert {tensor.dtype for tensor in merged.values()} == {expected}
    factors, before = weights_of(adapter), weights_of(base)
    name = "model.layers.0.self_attn.q_proj"
    A, B = (factors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    exact = before[f"{name}.weight"].double() + 1.5 * B @ A
    difference = (merged[f"{name}.weight"].double() - exact).abs()
    assert (difference <= torch.finfo(expected).eps * exact.abs() + 1e-6).all()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(expected)[6:]


def test_a_lori_adapter_answers_as_with_peft(tmp_path):
    merged = merge_into_base([trained_adapter()], output_dir=tmp_path / "merged")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder()), trained_adapter())
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), logits(peft))


def refused(tmp_path, error, match, adapters, **arguments):
    with pytest.raises(error, match=match) as raised:
        merge_into_base(adapters, output_dir=tmp_path / "merged", **arguments)
    assert len(str(raised.value).split(". ")) >= 3
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


def test_what_would_be_wrong_is_refused(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "task", base)
    refused(
        tmp_path, ValueError, "no weights of its own", [adapter], base_model=str(save_base(tmp_path / "g", "gpt2"))
    )
    config = json.loads((base / "config.json").read_text())
    quantized = shutil.copytree(base, tmp_path / "quantized")
    (quantized / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    refused(tmp_path, ValueError, "is quantized .bitsandbytes", [adapter], base_model=str(quantized))
    pickled = shutil.copytree(base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(tmp_path, FileNotFoundError, "no model.safetensors", [adapter], base_model=str(pickled))
    refused(tmp_path, FileNotFoundError, "is not there", [adapter], base_model=str(tmp_path / "nowhere"))


def test_a_tied_head_is_refused(tmp_path):
    base = save_base(tmp_path / "base", "tied")
    adapter = save_adapter(tmp_path / "task", base, target_modules=["lm_head", "q_proj"])
    refused(tmp_path, ValueError, "ties it to its embeddings", [adapter])


def test_a_matrix_that_would_stay_is_an_error(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "task", base, size=1e-4)
    refused(tmp_path, ValueError, "would stay as it is", [adapter])
    untrained = save_adapter(tmp_path / "untrained", base, size=0.0)
    refused(tmp_path, ValueError, "would change no weight", [untrained])
    merge_into_base([adapter], output_dir=tmp_path / "merged", dtype="float32")


def test_what_is_there_is_not_replaced(tmp_path):
    base = save_base(tmp_path / "base")
    adapter, output = save_adapter(tmp_path / "task", base), tmp_path / "merged"
    for inside in (base, adapter):
        with pytest.raises(ValueError, match="never replaces"):
            merge_into_base([adapter], output_dir=inside, overwrite=True)
    merge_into_base([adapter], output_dir=output)
    before = weights_of(output)
    with pytest.raises(FileExistsError, match="holds config.json already"):
        merge_into_base([adapter], 0.5, output_dir=output)
    merge_into_base([adapter], 0.5, output_dir=output, overwrite=True)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(output).items())
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        merge_into_base([adapter], output_dir=output, overwrite=True)


def test_another_writer_who_was_faster_is_not_replaced(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")
    adapter, output = save_adapter(tmp_path / "task", base), tmp_path / "merged"

    def faster(*arguments):
        output.mkdir()
        (output / "model.safetensors").write_text("of the other")

    monkeypatch.setattr("lori_trl.merging.into_base._copy_the_rest", faster)
    with pytest.raises(FileExistsError, match=r"is not empty \(model.safetensors\)"):
        merge_into_base([adapter], output_dir=output)
    assert (output / "model.safetensors").read_text() == "of the other"


def test_the_command_writes_and_pushes(tmp_path, monkeypatch, capsys):
    arguments = ["--into-base", str(trained_adapter()), "--output_dir", str(tmp_path / "merged")]
    with HubServer() as server, client_of(server, tmp_path / "home", monkeypatch):
        assert main(["merge", *arguments, "--dtype", "bfloat16", "--push", "me/code-model"]) == 0
        pushed = server.repos["me/code-model"].log()[0].files
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(pushed)
    assert all(str(tmp_path).encode() not in content for content in pushed.values())
    assert {tensor.dtype for tensor in weights_of(tmp_path / "merged").values()} == {torch.bfloat16}
    with pytest.raises(SystemExit) as end:
        main(["merge", str(trained_adapter()), "--push", "me/x", "--output_dir", str(tmp_path / "other")])
    assert end.value.code == 2
    assert "--into_base" in capsys.readouterr().err
