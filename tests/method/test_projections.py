"""A: reproducible, independent between tasks, frozen whatever happens."""

import itertools
import math

import pytest
import torch
from peft import get_peft_model
from tiny import lora_config

from lori_trl.method.layers import lora_layers, module_path
from lori_trl.method.projections import (
    derive_projection_seed,
    draw_projection,
    fingerprint,
    freeze_projections,
    init_projections,
    projections,
)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.", "base_model.model."]
)
@pytest.mark.parametrize("suffix", ["", ".lora_B", ".lora_B.default.weight", ".lora_A.my_name.weight"])
def test_module_path_strips_every_wrapper(prefix, suffix):
    path = "model.layers.0.self_attn.q_proj"
    wrapped = prefix + "base_model.model." * ("base_model" not in prefix and bool(suffix)) + path + suffix
    assert module_path(wrapped) == path
    assert module_path("model.layers.0._checkpoint_wrapped_module.self_attn.q_proj") == path


@pytest.mark.parametrize("init", ["gaussian", "kaiming_uniform"])
def test_moments(init):
    d_in = 1024
    A = draw_projection("layers.0.q_proj", 64, d_in, seed=1, init=init)
    assert A.shape == (64, d_in) and A.dtype == torch.float32
    assert A.mean().abs() < 4 * A.std() / A.numel() ** 0.5
    assert A.var().item() == pytest.approx(1 / (3 * d_in), rel=0.02)
    kurtosis = ((A / A.std()) ** 4).mean().item()
    assert kurtosis == pytest.approx(3.0 if init == "gaussian" else 1.8, rel=0.03)
    if init == "kaiming_uniform":
        assert A.abs().max() <= 1 / math.sqrt(d_in)


def test_same_A_for_any_adapter_name_and_module_order(model, llama):
    first = get_peft_model(model, lora_config(target_modules=["q_proj", "down_proj"]), adapter_name="default")
    init_projections(first, "default", seed=7)
    torch.manual_seed(99)  # nothing outside the seed and the path counts
    import copy

    config = lora_config(target_modules=["down_proj", "v_proj", "q_proj"])
    second = get_peft_model(copy.deepcopy(llama), config, adapter_name="other")
    init_projections(second, "other", seed=7)
    mine, theirs = projections(first, "default"), projections(second, "other")
    assert mine.keys() < theirs.keys()
    assert all(torch.equal(mine[path], theirs[path]) for path in mine)


def test_two_tasks_get_independent_A_and_one_task_the_same():
    d_in, rank = 576, 32
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(8)]
    drawn = {
        task: torch.cat([
            draw_projection(path, rank, d_in, seed=derive_projection_seed(42, task)).flatten() for path in paths
        ])
        for task in ("code", "math", "safety")
    }  # fmt: skip
    cosines = [torch.cosine_similarity(drawn[a], drawn[b], dim=0) for a, b in itertools.combinations(drawn, 2)]
    assert torch.stack(cosines).abs().mean() < 0.02
    again = draw_projection(paths[0], rank, d_in, seed=derive_projection_seed(42, "code"))
    assert torch.equal(again.flatten(), drawn["code"][: again.numel()])
    assert derive_projection_seed(42, "code") != derive_projection_seed(43, "code")


def test_A_is_pinned_for_ever():
    """Golden: another A would make every saved seed and mask worthless."""
    A = draw_projection("model.layers.0.self_attn.q_proj", 2, 3, seed=derive_projection_seed(42, "code"))
    golden = torch.tensor([[0.383292705, -0.212460503, 0.0359091051], [-0.0945458263, -1.05197871, -0.163952708]])
    torch.testing.assert_close(A, golden, rtol=1e-6, atol=0)


def test_set_adapter_does_not_thaw_A(model):
    peft_model = get_peft_model(model, lora_config())
    init_projections(peft_model, "default", seed=1)
    peft_model.add_adapter("second", lora_config())
    peft_model.set_adapter("second")
    peft_model.set_adapter("default")
    trainable = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_B.default" in name for name in trainable)


def test_fingerprint_sees_values_paths_and_shapes_but_not_precision(model):
    peft_model = get_peft_model(model, lora_config())
    init_projections(peft_model, "default", seed=1)
    A = projections(peft_model, "default")
    rounded = {path: tensor.bfloat16() for path, tensor in A.items()}
    assert fingerprint(rounded) == fingerprint({path: tensor.float() for path, tensor in reversed(rounded.items())})
    assert fingerprint(rounded) != fingerprint(A)
    path = next(iter(A))
    nudged = A[path].clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(1.0))
    assert fingerprint(A | {path: nudged}) != fingerprint(A)
    assert fingerprint(A | {path: A[path].T}) != fingerprint(A)


def test_adapters_on_other_than_linear_layers_are_refused(model):
    peft_model = get_peft_model(model, lora_config(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(ValueError, match=r"model\.embed_tokens \(Embedding\).*Name those in `target_modules`"):
        lora_layers(peft_model, "default")


def test_conv1d_layers_are_linear_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=50))
    peft_model = get_peft_model(gpt2, lora_config(target_modules=["c_attn"], fan_in_fan_out=True))
    init_projections(peft_model, "default", seed=1)
    layer = lora_layers(peft_model, "default")["transformer.h.0.attn.c_attn"]
    assert layer.lora_A["default"].weight.shape == (4, 16) and layer.lora_B["default"].weight.shape == (48, 4)


def test_freeze_survives_disabling_and_enabling(model):
    peft_model = get_peft_model(model, lora_config())
    freeze_projections(peft_model, "default")
    peft_model.base_model.disable_adapter_layers()
    peft_model.base_model.enable_adapter_layers()
    assert not any(A.requires_grad for name, A in peft_model.named_parameters() if "lora_A" in name)
    assert all(B.requires_grad for name, B in peft_model.named_parameters() if "lora_B" in name)
