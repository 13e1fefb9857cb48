"""New tokens: the embeddings get the rows that an adapter needs, and are the base's own again afterwards."""

import copy

import pytest
import torch
from peft import PeftModel
from tiny import lora_config, make_trainer, model_folder
from transformers import AutoModelForCausalLM

from lori_trl import load_lori_adapter
from lori_trl.adapter.folder import open_adapter
from lori_trl.adapter.vocabulary import embedding_rows
from lori_trl.evaluation.models import with_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


def base():
    return AutoModelForCausalLM.from_pretrained(model_folder())


@pytest.fixture(scope="module", params=["resized by hand", "new tokens trained", "lm_head trained"])
def grown(request, tmp_path_factory):
    """An adapter of a base with three more tokens."""
    model = base()
    if request.param != "new tokens trained":
        model.resize_token_embeddings(103, mean_resizing=False)
    settings = {
        "resized by hand": {},
        "new tokens trained": {"trainable_token_indices": {"embed_tokens": [98, 99]}},
        "lm_head trained": {"modules_to_save": ["lm_head"]},
    }
    folder = tmp_path_factory.mktemp("grown")
    trainer = make_trainer(folder, model, peft_config=lora_config(**settings[request.param]), max_steps=2)
    trainer.train()
    trainer.save_model()
    logits = trainer.model(torch.tensor([[5, 6, 7]])).logits.detach()
    return folder, 100 if request.param == "new tokens trained" else 103, logits


def test_the_rows_that_an_adapter_needs(grown):
    folder, rows, _ = grown
    with open_adapter(folder) as adapter:
        assert embedding_rows(adapter, base()) == rows
        adapter.config["trainable_token_indices"] = [150]
        assert embedding_rows(adapter, base()) == (151 if rows == 100 else rows)


def test_in_python_an_error_says_what_to_call(grown):
    folder, rows, logits = grown
    model = base()
    if rows != 100:
        with pytest.raises(
            ValueError, match=r"with 103 tokens, and .* 100 rows.*`model.resize_token_embeddings\(103\)`"
        ):
            load_lori_adapter(model, folder)
    model.resize_token_embeddings(rows, mean_resizing=False)
    loaded = load_lori_adapter(model, folder)
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(loaded(torch.tensor([[5, 6, 7]])).logits, logits)


def test_the_base_is_what_it_was_afterwards(grown):
    folder, rows, logits = grown
    model = base()
    before = copy.deepcopy(model.state_dict())
    with with_adapter(model, str(folder)) as (adapted, _):
        torch.testing.assert_close(adapted(torch.tensor([[5, 6, 7]])).logits, logits)
        assert model.get_input_embeddings().weight.shape[0] == rows
    assert model.state_dict().keys() == before.keys() and model.config.vocab_size == 100
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
