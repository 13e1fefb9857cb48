"""A step of ours waits for no GPU, breaks no graph, and is deterministic where torch is asked to be."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import lora_config

from lori_trl import LoriMasks
from lori_trl.method.layers import lora_layers
from lori_trl.method.projections import init_projections
from lori_trl.method.saliency import GradientAgreement
from lori_trl.method.sparse import fold_values, sparse_training

TOKENS = torch.arange(3, 63).view(4, 15)


@pytest.fixture(params=[0.0, 0.3], ids=["", "dropout"])
def adapted(model, request):
    """A PEFT model in training with a nonzero B, and random masks for it."""
    peft_model = get_peft_model(model, lora_config(lora_dropout=request.param)).train()
    init_projections(peft_model, "default", seed=1)
    torch.manual_seed(0)
    weights = {path: layer.lora_B["default"].weight for path, layer in lora_layers(peft_model, "default").items()}
    for weight in weights.values():
        weight.data.normal_(std=0.1)
    return peft_model, LoriMasks.select({path: torch.rand(weight.shape) for path, weight in weights.items()}, 0.5)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("backend", ["packed", "hook"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, GradientAgreement])
def test_nothing_in_a_step_depends_on_numbers_that_a_gpu_has(adapted, backend, optimizer_class):
    """
    Tensors on the meta device have shapes and no numbers: whatever would wait for a number raises there. Embeddings
    are trained too, so that gradients go through all layers.
    """
    model, masks = adapted
    model.get_input_embeddings().weight.requires_grad_()
    tokens = TOKENS.to("meta")
    with sparse_training(model, "default", masks, backend):
        model.to("meta")
        parameters = trained(model)
        optimizer = optimizer_class(parameters, lr=1e-3)
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            assert all(parameter.grad.is_meta for parameter in parameters)
            optimizer.step()
            optimizer.zero_grad()
            fold_values(model, "default")


@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_compiling_finds_no_graph_break(adapted, backend):
    model, masks = adapted
    torch._dynamo.reset()
    with sparse_training(model, "default", masks, backend):
        explained = torch._dynamo.explain(model)(input_ids=TOKENS, labels=TOKENS)
    assert explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_deterministic_algorithms_are_honoured(adapted, backend):
    """They raise where an operation has no deterministic form, and fill new tensors with NaN: nobody reads it."""
    gradients = []
    for deterministic in (False, True, True):
        model, masks = copy.deepcopy(adapted[0]), adapted[1]
        torch.use_deterministic_algorithms(deterministic)
        try:
            with sparse_training(model, "default", masks, backend):
                torch.manual_seed(0)
                model(input_ids=TOKENS, labels=TOKENS).loss.backward()
                fold_values(model, "default")
                gradients.append([parameter.grad for parameter in trained(model)])
        finally:
            torch.use_deterministic_algorithms(False)
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))
