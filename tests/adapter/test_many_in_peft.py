"""Several LoRI adapters on one model in plain PEFT: swapped in place, and mixed in a batch."""

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from tiny import lora_config, make_llama, make_trainer


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of two tasks: each has its own A and mask."""
    folders = []
    for task in ("one", "two"):
        folder = tmp_path_factory.mktemp("many") / task
        trainer = make_trainer(folder, make_llama(), peft_config=lora_config(), task_name=task, learning_rate=5e-2)
        trainer.train()
        trainer.save_model()
        folders.append(folder)
    return folders


def logits_of(model, prompts, **named) -> torch.Tensor:
    with torch.no_grad():
        return model(prompts, **named).logits


PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])


def test_an_adapter_is_swapped_for_another_in_place(adapters):
    """Bit for bit the model that loads the second one: A, B and scaling have taken its place."""
    expected = [logits_of(PeftModel.from_pretrained(make_llama(), folder).eval(), PROMPTS) for folder in adapters]
    assert not torch.equal(*expected)
    model = PeftModel.from_pretrained(make_llama(), adapters[0]).eval()
    for number in (1, 0):
        hotswap_adapter(model, str(adapters[number]), adapter_name="default", torch_device="cpu")
        assert torch.equal(logits_of(model, PROMPTS), expected[number])


def test_each_row_of_a_batch_has_its_own_adapter(adapters):
    model = PeftModel.from_pretrained(make_llama(), adapters[0], adapter_name="one").eval()
    model.load_adapter(adapters[1], adapter_name="two")
    names = ["one", "two", "__base__"]
    mixed = logits_of(model, PROMPTS, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits_of(model, PROMPTS[row : row + 1])
        else:
            model.set_adapter(name)
            alone = logits_of(model, PROMPTS[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(mixed[row], mixed[(row + 1) % 3])


def test_another_rank_and_scaling_come_along(adapters, tmp_path):
    trainer = make_trainer(tmp_path, make_llama(), peft_config=lora_config(r=8, lora_alpha=32), task_name="wider")
    trainer.train()
    trainer.save_model()
    expected = logits_of(PeftModel.from_pretrained(make_llama(), tmp_path).eval(), PROMPTS)
    model = PeftModel.from_pretrained(make_llama(), adapters[0]).eval()
    hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(logits_of(model, PROMPTS), expected)
