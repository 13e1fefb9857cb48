"""A base in 4 bits: TRL casts what is trained on it to bfloat16, and LoRI trains float32 all the same."""

import pytest
import torch
from invariants import check_trained, values_of
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import lora_config, make_rows
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lori_trl import load_lori_adapter
from lori_trl.method.dense_parameters import dense_parameters


def packed(model_folder, dtype=torch.float32):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return LlamaForCausalLM.from_pretrained(model_folder, quantization_config=quantization, dtype=dtype)


@pytest.fixture
def packed_llama(model_folder, monkeypatch):
    """A base in 4 bits, on a CPU where bitsandbytes repacks its layers for inference, whichever this one is."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    return packed(model_folder)


def test_a_4bit_base(make_trainer, packed_llama):
    assert type(packed_llama.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": make_rows()}
    trainer = make_trainer(model=packed_llama, peft_config=lora_config(), learning_rate=5e-2, **evaluated)
    trainer.train()
    check_trained(trainer)
    base = trainer.record.training.base_model
    assert (base.quantization, base.parameters) == ("4-bit", 24992)  # two of its entries are a byte


def test_a_4bit_base_that_no_gradient_goes_through_is_refused(make_trainer, packed_llama):
    layer = packed_llama.model.layers[1].mlp.down_proj  # 64 wide: a whole block
    packed_llama.eval()
    with torch.no_grad():
        layer(torch.zeros(1, 64))
    with pytest.raises(ValueError, match="no gradient goes through it"):
        make_trainer(model=packed_llama, peft_config=lora_config())


# ---- values and types ----------------------------------------------------------------------------------------------


def float32_adapter(model):
    """What is trained as float32, and a base that TRL does not take for a packed one: the yardstick."""
    model.is_loaded_in_4bit = False
    return model


@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_what_is_trained_is_what_a_float32_adapter_trains(make_trainer, model_folder, tmp_path, backend):
    trained = {}
    for name, base in {"4bit": packed(model_folder), "float32": float32_adapter(packed(model_folder))}.items():
        trainer = make_trainer(
            base, tmp_path / name, peft_config=lora_config(), sparse_backend=backend, calibration_sparsities=[0.5]
        )
        trainer.train()
        trainer.save_model()
        check_trained(trainer)
        trained[name] = trainer
    ours, yardstick = trained["4bit"], trained["float32"]
    assert ours.projection == yardstick.projection and ours.masks == yardstick.masks
    assert all(torch.equal(weight, yardstick.weights[path]) for path, weight in ours.weights.items())
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in trained]
    assert {tensor.dtype for tensor in files[0].values()} == {torch.float32}
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_calibration_ranks_float32_values(make_trainer, model_folder, compute):
    base = packed(model_folder, compute)
    trainer = make_trainer(base, peft_config=lora_config(r=32), bf16=compute == torch.bfloat16)
    saliencies = []
    trainer._save_calibration = saliencies.append
    trainer.calibrate()
    values = torch.cat([value.flatten() for value in saliencies[0].values()])
    assert values.unique().numel() > 0.9 * values.numel()


def test_a_continued_adapter_keeps_every_entry_outside_the_new_mask(make_trainer, model_folder, adapter_folder):
    before = load_file(adapter_folder / "adapter_model.safetensors")
    model = load_lori_adapter(packed(model_folder), adapter_folder, is_trainable=True)
    trainer = make_trainer(model, task_name="math")
    trainer.train()
    trainer.save_model()
    after = load_file(trainer.args.output_dir + "/adapter_model.safetensors")
    assert before.keys() == after.keys()
    for path, mask in trainer.masks.items():
        name = f"base_model.model.{path}.lora_{{}}.weight"
        assert torch.equal(after[name.format("A")], before[name.format("A")])
        assert torch.equal(after[name.format("B")][~mask], before[name.format("B")][~mask])
    check_trained(trainer)


def test_what_is_trained_besides_keeps_its_values(make_trainer, model_folder, tmp_path):
    config = lora_config(modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [3, 4]})
    dense = {}
    for name, base in {"4bit": packed(model_folder), "float32": float32_adapter(packed(model_folder))}.items():
        trainer = make_trainer(base, tmp_path / name, peft_config=config)
        dense[name] = values_of(dense_parameters(trainer.model, "default"))
    assert len(dense["4bit"]) == 2 and dense["4bit"].keys() == dense["float32"].keys()
    for name, value in dense["float32"].items():
        assert dense["4bit"][name].dtype == value.dtype and torch.equal(dense["4bit"][name], value)

    first = get_peft_model(packed(model_folder), config)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter), alpha=1e-3)
    before = values_of({name: each for name, each in first.named_parameters() if each.requires_grad})
    trainer = make_trainer(first, tmp_path / "continued")
    for name, value in before.items():
        assert torch.equal(trainer.model.get_parameter(name), value), name
