"""Any optimizer, any precision, any way to batch: the packed backend trains, and nothing else moves."""

import copy

import pytest
import torch
from invariants import check_trained
from peft import get_peft_model
from tiny import SMALL, lora_config


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adafactor", "sgd", "lion_32bit", "paged_adamw_8bit"])
def test_optimizers(make_trainer, optim):
    trainer = make_trainer(optim=optim, weight_decay=0.1)
    trainer.train()
    check_trained(trainer)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(make_trainer, tmp_path, reentrant):
    plain = make_trainer(output_dir=str(tmp_path / "plain"))
    plain.train()
    config = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = make_trainer(peft_config=lora_config(), **config)
    checkpointed.train()
    check_trained(checkpointed)
    assert checkpointed.masks == plain.masks
    for path, weight in plain.weights.items():
        torch.testing.assert_close(checkpointed.weights[path], weight, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_draws_the_same_dropout_again(make_trainer, tmp_path):
    losses = {}
    for checkpointing in (False, True):
        trainer = make_trainer(
            output_dir=str(tmp_path / str(checkpointing)),
            peft_config=lora_config(lora_dropout=0.3),
            activation_checkpointing=checkpointing,
        )
        trainer.train()
        losses[checkpointing] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)


def test_packed_batches(make_trainer):
    trainer = make_trainer(packing=True, max_length=32, packing_strategy="wrapped")
    trainer.train()
    check_trained(trainer)


def test_padding_free_batches(make_trainer):
    trainer = make_trainer(padding_free=True, max_length=None)
    trainer.train()
    check_trained(trainer)


def test_rslora(make_trainer):
    trainer = make_trainer(peft_config=lora_config(use_rslora=True, lora_alpha=4))
    assert next(iter(trainer.lora_layers.values())).scaling["default"] == 2.0
    trainer.train()
    check_trained(trainer)


@pytest.mark.parametrize("backend", ["packed", "hook"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_a_bfloat16_base(make_trainer, llama, adapter, backend):
    base = copy.deepcopy(llama).bfloat16()
    model = get_peft_model(base, lora_config(), autocast_adapter_dtype=adapter == torch.float32)
    trainer = make_trainer(model=model, sparse_backend=backend, learning_rate=5e-2)
    assert {weight.dtype for weight in trainer.weights.values()} == {torch.float32}
    trainer.train()
    check_trained(trainer)


def test_autocast_gives_what_peft_gives(llama):
    """bfloat16 autocast: forward and gradients of the fused branch follow PEFT's own layers."""
    from lori_trl.method.sparse import sparse_training

    tokens = torch.arange(3, 63).view(4, 15)
    model = get_peft_model(copy.deepcopy(llama), lora_config())
    results = []
    for packed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if packed:
                with sparse_training(model, "default", None):
                    loss = model(input_ids=tokens, labels=tokens).loss
            else:
                loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        gradients = [p.grad.clone() for name, p in model.named_parameters() if "lora_B" in name]
        results.append((loss.item(), torch.cat([gradient.flatten() for gradient in gradients])))
        model.zero_grad()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert torch.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.999


# ---- other architectures -------------------------------------------------------------------------------------------


def build(architecture):
    import transformers

    config_class, model_class, config = {
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 100}),
        "phi3": ("Phi3Config", "Phi3ForCausalLM", SMALL),
        "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL | {"attention_bias": True, "mlp_bias": True}),
        "mixtral": ("MixtralConfig", "MixtralForCausalLM", SMALL | {"num_local_experts": 2}),
    }[architecture]
    torch.manual_seed(0)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**config))


@pytest.mark.parametrize(
    ("architecture", "modules", "projections_found"),
    [
        ("gpt2", ["c_attn", "c_fc"], {"c_attn", "c_fc"}),
        ("llama", ["q_proj", "up_proj"], {"q_proj", "up_proj"}),
        ("phi3", "all-linear", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("mixtral", ["q_proj", "v_proj"], {"q_proj", "v_proj"}),
    ],
)
def test_fused_and_otherwise_named_modules(make_trainer, architecture, modules, projections_found):
    config = lora_config(target_modules=modules, fan_in_fan_out=architecture == "gpt2")
    trained = {}
    for backend in ("hook", "packed"):
        trainer = make_trainer(model=build(architecture), peft_config=config, sparse_backend=backend)
        trainer.train()
        check_trained(trainer)
        trained[backend] = trainer
    for path, weight in trained["hook"].weights.items():
        torch.testing.assert_close(trained["packed"].weights[path], weight, rtol=1e-3, atol=1e-5)
    assert trained["packed"].masks == trained["hook"].masks
    assert set(trainer.masks.by_projection()) == projections_found
    assert set(trainer.masks.by_layer()) == {0, 1}


def test_fused_experts_are_refused(make_trainer):
    config = lora_config(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match=r"`target_parameters=.*experts.*` is not possible with LoRI.*is None"):
        make_trainer(model=build("mixtral"), peft_config=config)
