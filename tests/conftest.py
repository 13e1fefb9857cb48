"""The tiny model, tokenizer, data and adapter of `tiny` as fixtures."""

import copy

import pytest
import tiny
import torch
from tiny import make_llama, make_rows, make_tokenizer
from transformers import LlamaForCausalLM

torch.set_num_threads(1)  # tiny matrices are slower on more

tokenizer = pytest.fixture(scope="session", name="tokenizer")(make_tokenizer)
llama = pytest.fixture(scope="session", name="llama")(make_llama)
rows = pytest.fixture(scope="session", name="rows")(make_rows)
model_folder = pytest.fixture(scope="session", name="model_folder")(lambda: tiny.model_folder())
adapter_folder = pytest.fixture(scope="session", name="adapter_folder")(lambda: tiny.trained_adapter())


@pytest.fixture
def model(llama) -> LlamaForCausalLM:
    return copy.deepcopy(llama)


@pytest.fixture
def make_trainer(tmp_path):
    """Return [`tiny.make_trainer`] with an output folder of the test's own."""

    def make(model=None, output_dir=tmp_path / "out", **changes):
        return tiny.make_trainer(output_dir, model, **changes)

    return make
