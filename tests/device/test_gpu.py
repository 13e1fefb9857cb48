"""What only a GPU can do: each says what it needs, and is skipped where that is missing. `make test-gpu` runs them."""

import copy
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from tiny import lora_config, model_folder
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytestmark = pytest.mark.gpu
BACKENDS = ("packed", "hook")


def installed(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def check_frozen(trainer) -> None:
    """A and B outside the mask are what they were, and B inside it was trained."""
    moved = 0
    for path, weight in trainer.weights.items():
        B, B0 = weight.detach().cpu(), trainer.run.initial_weights[path].cpu()
        assert torch.equal(B[~trainer.masks[path]], B0[~trainer.masks[path]]), path
        moved += int((B != B0).sum())
    assert moved > 0.5 * trainer.masks.num_selected


def load(device: str, **arguments) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_folder(), device_map={"": device}, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@installed("bitsandbytes")
def test_a_base_in_4_bits(make, device, backend):
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    trainer = make(
        load(device, quantization_config=bits), peft_config=lora_config(), bf16=True, sparse_backend=backend
    )
    trainer.train()
    check_frozen(trainer)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("backend", BACKENDS)
@installed("bitsandbytes")
def test_8_bit_optimizers(make, backend, optim):
    trainer = make(optim=optim, sparse_backend=backend)
    trainer.train()
    check_frozen(trainer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model(make, backend):
    trainer = make(torch_compile=True, sparse_backend=backend)
    trainer.train()
    check_frozen(trainer)


@installed("flash_attn")
def test_flash_attention(make, device):
    model = load(device, attn_implementation="flash_attention_2", dtype=torch.bfloat16)
    trainer = make(model, peft_config=lora_config(), bf16=True)
    trainer.train()
    check_frozen(trainer)


@installed("liger_kernel")
def test_liger(make):
    trainer = make(use_liger_kernel=True)
    trainer.train()
    check_frozen(trainer)


def test_the_layout_that_transformers_chooses(make):
    trainer = make(AutoModelForCausalLM.from_pretrained(model_folder(), device_map="auto"), peft_config=lora_config())
    trainer.train()
    check_frozen(trainer)


def test_plain_peft_has_the_same_logits(make, device, llama, tmp_path):
    trainer = make(bf16=True)
    trainer.train()
    trainer.save_model()
    plain = PeftModel.from_pretrained(copy.deepcopy(llama).to(device), str(tmp_path / "out")).eval()
    tokens = torch.arange(3, 33, device=device).view(2, 15)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, trainer.model.eval()(tokens).logits, rtol=1e-3, atol=1e-4)
