"""
The trainer on a device that is not the CPU, and what reads its adapters there.

A tensor of the CPU's that meets one of the device's is an error, as on a GPU.
"""

import copy

import pytest
import torch
from accelerate import accelerator, dispatch_model
from accelerate.state import AcceleratorState, PartialState
from invariants import check_run
from tiny import Stop, lora_config, make_rows, make_trainer
from transformers import AutoModelForCausalLM, training_args

from lori_trl import LoriMasks, load_lori_adapter
from lori_trl.evaluation import completion_loss
from lori_trl.merging.search import search_merge_weights

pytestmark = pytest.mark.device
BACKENDS = ("packed", "hook")


def check_frozen(trainer) -> None:
    """B outside the mask is what it was, and inside it was trained."""
    moved = 0
    for path, weight in trainer.weights.items():
        B, B0 = weight.detach().cpu(), trainer.run.initial_weights[path].cpu()
        assert torch.equal(B[~trainer.masks[path].cpu()], B0[~trainer.masks[path].cpu()]), path
        moved += int((B != B0).sum())
    assert moved > 0.5 * trainer.masks.num_selected


def values(trainer) -> dict[str, torch.Tensor]:
    return {path: weight.detach().cpu().clone() for path, weight in trainer.weights.items()}


def test_devices_do_not_meet(device):
    here, there = torch.ones(2, device=device), torch.ones(2, device=device[:-1] + "1")
    for other in (torch.ones(2), there):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            here + other
    assert (here * torch.tensor(2.0)).device == here.device and here[torch.tensor([1])].device == here.device


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_five_invariants(make, llama, backend, dropout):
    check_run(make(sparse_backend=backend, peft_config=lora_config(lora_dropout=dropout)), copy.deepcopy(llama))


def test_both_backends_train_what_the_cpu_does(make, tmp_path, monkeypatch):
    trained = {}
    for backend in BACKENDS:
        trainer = make(output_dir=tmp_path / backend, sparse_backend=backend)
        trainer.train()
        trained[backend] = values(trainer)
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    PartialState._reset_state()
    AcceleratorState._reset_state()
    trainer = make_trainer(tmp_path / "cpu")
    assert all(weight.device.type == "cpu" for weight in trainer.model.parameters())
    trainer.train()
    for path, weight in values(trainer).items():
        torch.testing.assert_close(trained["packed"][path], trained["hook"][path], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(trained["packed"][path], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["train", "gradient", "random"])
def test_every_way_to_a_mask(make, method, backend):
    trainer = make(calibration_method=method, sparse_backend=backend, calibration_sparsities=None)
    trainer.train()
    trainer.save_model()
    check_frozen(trainer)


@pytest.mark.parametrize("granularity", ["module", "matrix"])
def test_pools(make, granularity):
    trainer = make(mask_granularity=granularity, calibration_sparsities=[0.5])
    trainer.train()
    check_frozen(trainer)


def test_lori_d(make):
    trainer = make(sparsity=0.0)
    trainer.train()
    check_frozen(trainer)


def test_given_masks_are_the_cpu_s(make, adapter_folder):
    trainer = make(mask_name_or_path=str(adapter_folder))
    assert trainer.masks == LoriMasks.from_pretrained(adapter_folder)
    trainer.train()
    check_frozen(trainer)


@pytest.mark.parametrize("method", ["train", "gradient"])
@pytest.mark.parametrize("disjoint", [False, True])
def test_a_second_task(make, llama, adapter_folder, tmp_path, disjoint, method):
    model = load_lori_adapter(copy.deepcopy(llama), adapter_folder, is_trainable=True)
    first = LoriMasks.from_pretrained(adapter_folder)
    trainer = make(model=model, task_name="math", disjoint_masks=disjoint, calibration_method=method)
    trainer.train()
    trainer.save_model()
    check_frozen(trainer)
    assert not disjoint or (trainer.masks & first).num_selected == 0
    assert LoriMasks.from_pretrained(tmp_path / "out", task="code") == first


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("phase", ["calibrating", "adapting"])
def test_resuming_gives_the_undisturbed_run(make, tmp_path, phase, backend):
    run = {"save_strategy": "steps", "save_steps": 1, "sparse_backend": backend}
    whole = make(output_dir=tmp_path / "whole", **run)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make(output_dir=tmp_path / "cut", callbacks=[Stop(phase)], **run).train()
    resumed = make(output_dir=tmp_path / "cut", **run)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.masks == whole.masks
    assert all(torch.equal(weight, values(resumed)[path]) for path, weight in values(whole).items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_model(make, rows, backend):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    trainer = make(
        eval_dataset=rows.select(range(4)), metric_for_best_model="eval_loss", sparse_backend=backend, **best
    )
    trainer.train()
    check_frozen(trainer)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_with_a_gradient_scaler(make, device, monkeypatch, backend):
    scaler = torch.amp.GradScaler(device.split(":")[0], init_scale=2.0**10)
    monkeypatch.setattr(accelerator, "get_grad_scaler", lambda *_, **__: scaler)
    trainer = make(fp16=True, bf16=False, sparse_backend=backend)
    trainer.train()
    assert scaler.get_scale() == 2.0**10 and scaler._growth_tracker is not None
    check_frozen(trainer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16(make, backend, monkeypatch):
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    trainer = make(bf16=True, sparse_backend=backend)
    trainer.train()
    check_frozen(trainer)


def test_activation_checkpointing(make):
    trainer = make(activation_checkpointing=True, peft_config=lora_config(lora_dropout=0.1))
    trainer.train()
    check_frozen(trainer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_on_two_devices(llama, device, backend, tmp_path):
    """A layer on the second device, and the head on the first, where TRL's fused loss wants it."""
    if torch.accelerator.device_count() < 2:
        pytest.skip("this machine has one device")
    first, second = torch.device(device), torch.device(device[:-1] + "1")
    parts = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first}
    parts |= {"model.layers.1": second, "model.norm": first, "lm_head": first}
    model = dispatch_model(copy.deepcopy(llama), parts, main_device=first)
    trainer = make_trainer(tmp_path, model, peft_config=lora_config(), use_cpu=False, sparse_backend=backend)
    assert {str(weight.device) for weight in trainer.weights.values()} == {device, device[:-1] + "1"}
    trainer.train()
    check_frozen(trainer)


def test_a_search_for_weights(make, device, model_folder, adapter_folder, tokenizer, tmp_path):
    trainer = make(task_name="math")
    trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(device)
    search = search_merge_weights(
        [adapter_folder, tmp_path / "out"],
        {"code": list(make_rows().select(range(4)))},
        model,
        tokenizer,
        grid=(0.5, 1.0),
    )
    assert all(trial.objective > 0 for trial in search.trials)


def test_the_loss_of_an_adapter_is_the_cpu_s(device, llama, adapter_folder, tokenizer, rows):
    losses = []
    for where in ("cpu", device):
        model = load_lori_adapter(copy.deepcopy(llama).to(where), adapter_folder)
        losses.append(completion_loss(model, tokenizer, rows.select(range(6))).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
