"""More rank at the same scaling, to the last bit, and masks of some columns as masks of all."""

import math

import pytest
import torch
from peft import get_peft_model
from tiny import lora_config, make_llama

from lori_trl.method.growth import alpha_for, columns_of, grow_layers, widened
from lori_trl.method.layers import lora_layers


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alpha_keeps_the_scaling_to_the_last_bit_or_is_none(use_rslora):
    root = math.sqrt if use_rslora else float
    exact = 0
    for alpha in (8, 16, 20, 64):
        for rank in range(1, 70):
            scaling = alpha / root(rank)
            assert alpha_for(scaling, rank, use_rslora=use_rslora) == alpha  # as it was, and whole
            for other in (rank + 8, rank + 32, 4 * rank):
                found = alpha_for(scaling, other, use_rslora=use_rslora)
                assert found is None or found / root(other) == scaling
                exact += found is not None
            assert alpha_for(scaling, 4 * rank, use_rslora=use_rslora) is not None
    assert exact > 700


def test_a_grown_adapter_computes_the_same_and_its_config_is_a_copy():
    config = lora_config()
    model = get_peft_model(make_llama(), config)
    with torch.no_grad():
        for layer in lora_layers(model, "default").values():
            layer.lora_B["default"].weight.normal_()
    tokens = torch.arange(8)[None]
    before = model(tokens).logits
    scalings = {path: layer.scaling["default"] for path, layer in lora_layers(model, "default").items()}
    layers = lora_layers(model, "default")
    grow_layers(model, "default", {path: torch.randn(3, layer.in_features) for path, layer in layers.items()}, 14)
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-6, atol=1e-6)
    assert {path: layer.scaling["default"] for path, layer in layers.items()} == scalings
    assert (model.peft_config["default"].r, model.peft_config["default"].lora_alpha, config.r) == (7, 14, 4)
    A, B = (next(iter(layers.values())).lora_A["default"], next(iter(layers.values())).lora_B["default"])
    assert A.weight.shape[0] == A.out_features == B.in_features == B.weight.shape[1] == 7
    assert not A.weight.requires_grad and B.weight.requires_grad


def test_masks_of_columns():
    masks = {"q": torch.ones(2, 3, dtype=torch.bool)}
    wide = widened(masks, 6, start=2)
    assert wide["q"].tolist() == [[False, False, True, True, True, False]] * 2
    assert torch.equal(columns_of(wide, (2, 5))["q"], masks["q"]) and columns_of(wide, None)["q"] is wide["q"]
