"""The two backends: the same result, and what packed promises about memory, PEFT and dropout."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from tiny import lora_config
from torch import nn
from transformers import LlamaForCausalLM

from lori_trl import LoriMasks
from lori_trl.method.branch import draw_dropped
from lori_trl.method.layers import lora_layers
from lori_trl.method.projections import init_projections
from lori_trl.method.sparse import VALUES, SparseLora, sparse_training


@pytest.fixture
def adapted(model):
    """A PEFT model with a nonzero B."""
    peft_model = get_peft_model(model, lora_config())
    init_projections(peft_model, "default", seed=1)
    torch.manual_seed(0)
    for layer in lora_layers(peft_model, "default").values():
        layer.lora_B["default"].weight.data.normal_(std=0.1)
    return peft_model


def weights(model, name="default"):
    return {path: layer.lora_B[name].weight for path, layer in lora_layers(model, name).items()}


def random_masks(model, sparsity=0.9, seed=0) -> LoriMasks:
    generator = torch.Generator().manual_seed(seed)
    saliency = {path: torch.rand(weight.shape, generator=generator) for path, weight in weights(model).items()}
    return LoriMasks.select(saliency, sparsity)


TOKENS = torch.arange(3, 63).view(4, 15)


def loss(model):
    return model(input_ids=TOKENS, labels=TOKENS).loss


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_gradients_equal_those_of_peft(adapted, backend):
    """Against autograd through PEFT's own layers, for B on the mask and for the input."""
    masks = random_masks(adapted)
    embeddings = adapted.get_input_embeddings()
    embeddings.weight.requires_grad_()
    expected_loss = loss(adapted)
    expected_loss.backward()
    expected = {path: weight.grad.clone() for path, weight in weights(adapted).items()}
    expected_input = embeddings.weight.grad.clone()
    adapted.zero_grad()
    with sparse_training(adapted, "default", masks, backend):
        here = loss(adapted)
        torch.testing.assert_close(here, expected_loss, rtol=1e-6, atol=1e-6)
        here.backward()
        for path, layer in lora_layers(adapted, "default").items():
            if backend == "packed":
                values = getattr(layer, VALUES)["default"]
                assert layer.lora_B["default"].weight.grad is None
                torch.testing.assert_close(values.grad, expected[path][masks[path]], rtol=1e-4, atol=1e-7)
            else:
                gradient = layer.lora_B["default"].weight.grad
                torch.testing.assert_close(gradient, expected[path] * masks[path], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(embeddings.weight.grad, expected_input, rtol=1e-4, atol=1e-7)


def test_both_backends_train_to_the_same_weights(adapted):
    """50 AdamW steps with clipping, accumulation, and weight decay on other parameters."""
    masks, trained = random_masks(adapted), {}
    for backend in ("packed", "hook"):
        model = copy.deepcopy(adapted)
        model.get_base_model().lm_head.weight.requires_grad_()
        with sparse_training(model, "default", masks, backend):
            parameters = trainable(model)
            decayed = [parameter for name, parameter in parameters.items() if "lm_head" in name]
            others = [parameter for name, parameter in parameters.items() if "lm_head" not in name]
            assert len(decayed) == 1
            groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=1e-3)
            for _ in range(50):
                for half in TOKENS.split(2):
                    (model(input_ids=half, labels=half).loss / 2).backward()
                nn.utils.clip_grad_norm_(parameters.values(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        trained[backend] = weights(model) | {"lm_head": model.get_base_model().lm_head.weight}
    start = weights(adapted)
    for path, weight in trained["packed"].items():
        torch.testing.assert_close(weight, trained["hook"][path], rtol=0, atol=1e-6)
        if path in masks:
            assert torch.equal(weight[~masks[path]], start[path][~masks[path]])
    assert any((trained["packed"][path] - start[path]).abs().max() > 1e-2 for path in start)


def test_packed_trains_nothing_but_the_values(adapted):
    masks = random_masks(adapted)
    before = trainable(adapted).keys()
    with sparse_training(adapted, "default", masks):
        parameters = trainable(adapted)
        assert all(f".{VALUES}.default" in name and p.dim() == 1 for name, p in parameters.items())
        assert sum(parameter.numel() for parameter in parameters.values()) == masks.num_selected
        loss(adapted).backward()
        assert all(parameter.grad is None for name, parameter in adapted.named_parameters() if name not in parameters)
    assert trainable(adapted).keys() == before
    assert not any(VALUES in name for name, _ in adapted.named_modules())


def test_a_mask_of_everything_trains_B_itself(adapted):
    with sparse_training(adapted, "default", None):
        assert all(".lora_B." in name for name in trainable(adapted))
        loss(adapted).backward()
        got = {path: weight.grad.clone() for path, weight in weights(adapted).items()}
    adapted.zero_grad()
    loss(adapted).backward()
    for path, weight in weights(adapted).items():
        torch.testing.assert_close(got[path], weight.grad, rtol=1e-4, atol=1e-7)


def test_matrices_without_an_entry_have_no_parameter_and_cost_nothing(model):
    peft_model = get_peft_model(model, lora_config())
    init_projections(peft_model, "default", seed=1)
    masks = {path: torch.zeros_like(weight, dtype=torch.bool) for path, weight in weights(peft_model).items()}
    masks["model.layers.0.self_attn.q_proj"][3, 1] = True
    with sparse_training(peft_model, "default", masks):
        assert [p.numel() for p in trainable(peft_model).values()] == [1]
        idle = [layer.lora_variant["default"].idle for layer in lora_layers(peft_model, "default").values()]
        assert sum(idle) == 13
        x, result = torch.ones(1, 32), torch.ones(1, 32)
        layer = lora_layers(peft_model, "default")["model.layers.1.self_attn.q_proj"]
        assert layer.lora_variant["default"].forward(layer, "default", x, result) is result


def test_a_frozen_nonzero_B_still_counts(adapted):
    expected = loss(adapted)
    masks = {path: torch.zeros_like(weight, dtype=torch.bool) for path, weight in weights(adapted).items()}
    masks["model.layers.0.self_attn.q_proj"][3, 1] = True
    with sparse_training(adapted, "default", masks):
        torch.testing.assert_close(loss(adapted), expected)
        loss(adapted).backward()


# ---- whoever looks at B sees the values ----------------------------------------------------------------------------


def nudge(model):
    """Change the values as an optimizer would: B itself is behind now."""
    for layer in lora_layers(model, "default").values():
        getattr(layer, VALUES)["default"].data.add_(0.5)


def check_against(B, start, masks):
    for path, weight in B.items():
        assert torch.equal(weight[~masks[path]], start[path][~masks[path]])
        torch.testing.assert_close(weight[masks[path]], start[path][masks[path]] + 0.5)


def test_saving_sees_the_values(adapted):
    masks = random_masks(adapted)
    start = {path: weight.clone() for path, weight in weights(adapted).items()}
    with sparse_training(adapted, "default", masks):
        nudge(adapted)
        saved = get_peft_model_state_dict(adapted)
    assert not any(VALUES in name for name in saved)
    B = {path: saved[f"base_model.model.{path}.lora_B.weight"] for path in start}
    check_against(B, start, masks)
    check_against(weights(adapted), start, masks)


@pytest.mark.parametrize("safe", [True, False])
def test_merging_sees_the_values(adapted, safe):
    masks = random_masks(adapted)
    reference = copy.deepcopy(adapted)
    for path, weight in weights(reference).items():
        weight.data[masks[path]] += 0.5
    expected = loss(reference.merge_and_unload())
    with sparse_training(adapted, "default", masks):
        nudge(adapted)
        base = {name: parameter.clone() for name, parameter in adapted.named_parameters() if "base_layer" in name}
        adapted.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(loss(adapted), expected)
        adapted.unmerge_adapter()
        torch.testing.assert_close(loss(adapted), expected)
        for name, parameter in base.items():
            torch.testing.assert_close(adapted.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)
        merged = copy.deepcopy(adapted).merge_and_unload(safe_merge=safe)
    assert isinstance(merged, LlamaForCausalLM)
    torch.testing.assert_close(loss(merged), expected)


def test_another_adapter_and_back(adapted):
    masks = random_masks(adapted)
    with sparse_training(adapted, "default", masks):
        nudge(adapted)
        expected = loss(adapted)
        adapted.add_adapter("other", lora_config())
        adapted.set_adapter("other")
        assert all(".other." in name for name in trainable(adapted))
        assert not torch.equal(loss(adapted), expected)
        adapted.set_adapter("default")
        assert all(f".{VALUES}.default" in name for name in trainable(adapted))
        torch.testing.assert_close(loss(adapted), expected)
        with adapted.disable_adapter():
            assert not torch.equal(loss(adapted), expected)
        assert all(f".{VALUES}.default" in name for name in trainable(adapted))
    torch.testing.assert_close(loss(adapted), expected)


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_beside_another_active_adapter(adapted, order):
    """Gradients pass through the other adapter's branch too, whichever comes first."""
    adapted.add_adapter("other", lora_config(init_lora_weights=False))
    adapted.base_model.set_adapter(order)
    embeddings = adapted.get_input_embeddings()
    embeddings.weight.requires_grad_()
    loss(adapted).backward()
    expected = embeddings.weight.grad.clone()
    adapted.zero_grad()
    with sparse_training(adapted, "default", random_masks(adapted)):
        loss(adapted).backward()
    torch.testing.assert_close(embeddings.weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_deleting_the_adapter_takes_the_values_along(adapted):
    adapted.add_adapter("other", lora_config())
    layer = next(iter(lora_layers(adapted, "default").values()))
    with sparse_training(adapted, "default", random_masks(adapted)):
        adapted.delete_adapter("default")
        assert "default" not in getattr(layer, VALUES) and "default" not in layer.lora_variant
    assert all(".other." in name for name in trainable(adapted))


@pytest.mark.parametrize("backend", ["packed", "hook"])
@pytest.mark.parametrize("masked", [True, False])
def test_the_adapter_can_be_deleted_in_every_phase(adapted, masked, backend):
    adapted.add_adapter("other", lora_config())
    with sparse_training(adapted, "default", random_masks(adapted) if masked else None, backend):
        adapted.delete_adapter("default")
    assert all(".other." in name for name in trainable(adapted))
    assert not any("sparse" in name for name, _ in [*adapted.named_buffers(), *adapted.named_modules()])
    loss(adapted)


# ---- the layer moves, is copied, and is looked at -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_masks_and_positions_follow_the_model_to_another_device(adapted, backend):
    with sparse_training(adapted, "default", random_masks(adapted), backend):
        names = {name.rpartition(".")[2] for name, _ in adapted.named_buffers()}
        assert names & {"sparse_indices", "sparse_mask"}
        assert not any("sparse" in name for name in adapted.state_dict())
        adapted.to("meta")
        tokens = TOKENS.to("meta")
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        gradients = [parameter.grad for parameter in trainable(adapted).values()]
        assert gradients and all(gradient.device.type == "meta" for gradient in gradients)
    assert not any("sparse" in name for name, _ in adapted.named_buffers())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_is_whole_and_its_own(adapted, way):
    masks = random_masks(adapted)
    start = {path: weight.clone() for path, weight in weights(adapted).items()}
    with sparse_training(adapted, "default", masks):
        if way == "deepcopy":
            copied = copy.deepcopy(adapted)
        else:
            file = io.BytesIO()
            torch.save(adapted, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)  # this test's own bytes
        nudge(copied)
        state = copied.state_dict()
        check_against({path: state[f"base_model.model.{path}.lora_B.default.weight"] for path in start}, start, masks)
        assert all(torch.equal(weight, start[path]) for path, weight in weights(adapted).items())


@pytest.mark.parametrize("where", ["base layer", "every module"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_a_base_layer_fire_and_see_what_peft_shows_them(adapted, kind, where):
    """Also where the base layer's W would else be used directly, and where the branch writes into its output."""
    base = lora_layers(adapted, "default")["model.layers.1.mlp.up_proj"].get_base_layer()
    embeddings = adapted.get_input_embeddings()
    embeddings.weight.requires_grad_()
    shown = []

    def remember(module, *tensors):
        if module is base:
            shown.append([tensor for group in tensors for tensor in (group if isinstance(group, tuple) else (group,))])

    if where == "base layer":
        handle = getattr(base, f"register_{kind}_hook")(remember)
    else:
        handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(remember)
    try:
        loss(adapted).backward()
        with sparse_training(adapted, "default", random_masks(adapted)):
            loss(adapted).backward()
    finally:
        handle.remove()
    peft, ours = shown
    assert peft and len(peft) == len(ours)
    for expected, tensor in zip(peft, ours, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)


def test_buffers_that_ddp_was_to_ignore_are_so_afterwards(adapted):
    """Masks and positions are added to the list that is there, and taken out of it again."""
    adapted._ddp_params_and_buffers_to_ignore = ["mine"]
    with sparse_training(adapted, "default", random_masks(adapted)):
        assert "mine" in adapted._ddp_params_and_buffers_to_ignore
        assert len(adapted._ddp_params_and_buffers_to_ignore) == 15
    assert adapted._ddp_params_and_buffers_to_ignore == ["mine"]


@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_B_need_not_be_contiguous(adapted, backend):
    masks, expected = random_masks(adapted), {}
    for layout in ("contiguous", "transposed"):
        model = copy.deepcopy(adapted)
        if layout == "transposed":
            for weight in weights(model).values():
                weight.data = weight.data.T.contiguous().T
        with sparse_training(model, "default", masks, backend):
            optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
            for _ in range(2):
                loss(model).backward()
                optimizer.step()
                optimizer.zero_grad()
        for path, weight in weights(model).items():
            torch.testing.assert_close(weight, expected.setdefault(path, weight))
            assert weight.is_contiguous() is (layout == "contiguous")


def test_the_values_of_a_bfloat16_B_are_float32(adapted):
    """A step far below bfloat16's resolution is not lost."""
    model = copy.deepcopy(adapted).bfloat16()
    with sparse_training(model, "default", random_masks(model)):
        loss(model).backward()
        values = list(trainable(model).values())
        assert {value.dtype for value in values} == {value.grad.dtype for value in values} == {torch.float32}
        before = [value.detach().clone() for value in values]
        for value in values:
            value.data += 1e-5
        loss(model)
        assert all((value > old).all() for value, old in zip(values, before, strict=True))
    assert {weight.dtype for weight in weights(model).values()} == {torch.bfloat16}


class Activated(nn.Linear):
    """A linear layer of somebody's own that ends in an activation, which keeps its output for the backward pass."""

    def forward(self, x):
        return super().forward(x).sigmoid()


@pytest.mark.parametrize("how", ["subclass", "forward replaced"])
@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_a_linear_layer_that_ends_in_an_activation(backend, how):
    torch.manual_seed(0)
    linear = Activated(8, 6) if how == "subclass" else nn.Linear(8, 6)
    if how == "forward replaced":
        linear.forward = lambda x, plain=linear.forward: plain(x).sigmoid()
    model = get_peft_model(nn.ModuleDict({"one": linear}), lora_config(target_modules=["one"]))
    layer = lora_layers(model, "default")["one"]
    layer.lora_B["default"].weight.data.normal_()
    x, gradients = torch.randn(5, 8), []
    for ours in (False, True):
        leaf = x.clone().requires_grad_()
        with sparse_training(model, "default", None, backend) if ours else nullcontext():
            layer(leaf).square().sum().backward()
        gradients.append((leaf.grad, layer.lora_B["default"].weight.grad.clone()))
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_a_layer_without_tokens(model, backend):
    """An expert that no token goes to, with dropout."""
    peft_model = get_peft_model(model, lora_config(lora_dropout=0.5)).train()
    init_projections(peft_model, "default", seed=1)
    masks = random_masks(peft_model)
    layer = lora_layers(peft_model, "default")["model.layers.0.self_attn.q_proj"]
    with sparse_training(peft_model, "default", masks, backend):
        x = torch.zeros(0, 32, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == (0, 32)
        assert all(not weight.grad.any() for weight in trainable(layer).values())


# ---- dropout -------------------------------------------------------------------------------------------------------


def test_dropped_entries_are_independent_and_of_the_right_share():
    torch.manual_seed(0)
    numel, rounds, p = 1000, 4000, 0.05
    counts, pairs = torch.zeros(numel), torch.zeros(numel)
    for _ in range(rounds):
        dropped = torch.zeros(numel + 1)
        dropped[draw_dropped(numel, p, torch.device("cpu"))] = 1
        dropped = dropped[:-1]  # what lies past the end
        counts += dropped
        pairs += dropped * dropped.roll(1)
    sigma = (p * (1 - p) / rounds) ** 0.5
    share = counts / rounds
    assert (share - p).abs().max() < 5 * sigma  # everywhere, also at both ends
    assert (share.mean() - p).abs() < 5 * sigma / numel**0.5
    assert (pairs.mean() / rounds - p * p).abs() < 1e-4


def test_the_last_entry_is_dropped_no_more_often_than_the_others():
    """Of 256 entries at p = 0.001, none is dropped 77 times of a hundred."""
    torch.manual_seed(0)
    config = lora_config(r=256, lora_alpha=256, target_modules=["one"], lora_dropout=0.001)
    model = get_peft_model(nn.ModuleDict({"one": nn.Linear(256, 256, bias=False)}), config).train()
    layer = lora_layers(model, "default")["one"]
    layer.get_base_layer().weight.data.zero_()
    for part in (layer.lora_A, layer.lora_B):
        part["default"].weight.data.copy_(torch.eye(256))
    layer.lora_variant["default"] = SparseLora()
    kept = sum((layer(torch.ones(1, 256)) > 0).long() for _ in range(2000))
    assert kept.min() > 1980


@pytest.mark.parametrize("numel", [1, 2, 7])
def test_few_entries_can_be_dropped(numel):
    positions = torch.cat([draw_dropped(numel, 0.3, torch.device("cpu")) for _ in range(50)])
    assert set(positions.tolist()) == {*range(numel + 1)}  # the last is past the end


def test_dropout_is_what_lora_means_by_it(model):
    """Unbiased, the same in forward and backward, off in evaluation."""
    peft_model = get_peft_model(model, lora_config(lora_dropout=0.4))
    layer = lora_layers(peft_model, "default")["model.layers.0.self_attn.q_proj"].train()
    weight = layer.lora_B["default"].weight.data.normal_()
    delta = 2.0 * weight @ layer.lora_A["default"].weight
    base = layer.get_base_layer().weight.detach()
    layer.lora_variant["default"] = SparseLora()
    x = torch.randn(1, 32)
    outputs = []
    for _ in range(3000):
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        outputs.append(output.detach())
        output.sum().backward()
        through_branch = leaf.grad - base.sum(0)
        kept = through_branch.abs() > 1e-5
        torch.testing.assert_close(output, x @ base.T + (x * kept / 0.6) @ delta.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(through_branch, delta.sum(0)[None] * kept / 0.6, rtol=1e-4, atol=1e-4)
    mean, error = torch.stack(outputs).mean(0), torch.stack(outputs).std(0) / 3000**0.5
    assert ((mean - x @ (base + delta).T).abs() < 5 * error + 1e-5).all()
    layer.eval()
    torch.testing.assert_close(layer(x), x @ (base + delta).T, rtol=1e-4, atol=1e-4)
