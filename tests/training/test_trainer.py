"""The method: calibrate, select, reset, adapt; and what must never change."""

import copy
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from files_by_hand import change_record
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import RecordingTrainer, lora_config
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig

from lori_trl import LoriMasks, LoriSFTTrainer, load_lori_adapter
from lori_trl.method.projections import Projection, projections
from lori_trl.method.sparsity import num_to_select


class Losses(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs[name] for name in ("loss", "calibration_loss") if name in logs]


def algorithm_1_as_trl_steps(model, A, scaling, batches, sparsity, rates, make_optimizer, accumulate, max_norm):
    """
    `examples/algorithm_1.py` with what TRL's loop adds: calibration losses, mask, adaptation losses, B.

    `rates` has a function for each phase: step -> learning rate. A step is of `accumulate` batches, its loss the mean
    over all their tokens, and the gradient on the mask is clipped to `max_norm`.
    """
    layers = {name: module for name, module in model.named_modules() if name in A}
    B = {
        name: torch.zeros(layer.weight.shape[0], A[name].shape[0], requires_grad=True)
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, y, name=name: y + x[0] @ A[name].T @ B[name].T * scaling)

    def backward(batch, tokens):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / tokens
        loss.backward()
        return loss.item()

    def train(batches, rate_of, masks=None):
        losses = []
        optimizer = make_optimizer(B.values(), rate_of(0))
        for step, first in enumerate(range(0, len(batches), accumulate)):
            together = batches[first : first + accumulate]
            tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in together)
            optimizer.zero_grad()
            losses.append(sum(backward(batch, tokens) for batch in together))
            for name in B if masks else ():
                B[name].grad *= masks[name]
            torch.nn.utils.clip_grad_norm_(B.values(), max_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate_of(step)
            optimizer.step()
        return losses

    calibration = train(batches["calibrating"], rates[0])
    flat = torch.cat([B[name].detach().abs().flatten() for name in sorted(B)])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[: num_to_select(sparsity, flat.numel())]] = True
    parts = chosen.split([B[name].numel() for name in sorted(B)])
    masks = {name: part.view_as(B[name]) for name, part in zip(sorted(B), parts, strict=True)}
    for name in B:
        B[name].data.zero_()
    return calibration, masks, train(batches["adapting"], rates[1], masks), {name: B[name].detach() for name in B}


RATES = {"sgd": (0.25, 0.5), "adamw_torch": (5e-3, 1e-2)}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw_torch": lambda B, lr: torch.optim.AdamW(B, lr, weight_decay=0.0)}


EXAMPLE = Path(__file__).parents[2] / "examples" / "algorithm_1.py"


@pytest.mark.parametrize("backend", ["packed", "hook"])
@pytest.mark.parametrize("optim", RATES)
def test_follows_algorithm_1(make_trainer, llama, optim, backend):
    losses, (calibration_rate, rate) = Losses(), RATES[optim]
    trainer = make_trainer(
        trainer_class=RecordingTrainer,
        callbacks=[losses],
        optim=optim,
        sparse_backend=backend,
        max_grad_norm=0.0,
        learning_rate=rate,
        calibration_learning_rate=calibration_rate,
        max_steps=8,
        calibration_max_steps=6,
    )
    trainer.train()
    example, A = runpy.run_path(str(EXAMPLE)), projections(trainer.model, "default")
    masks, B, expected = example["algorithm_1"](
        copy.deepcopy(llama).train(),
        A,
        2.0,
        *trainer.batches.values(),
        0.9,
        (calibration_rate, rate),
        OPTIMIZERS[optim],
    )
    assert losses.losses == pytest.approx(expected, abs=2e-6)
    assert trainer.masks == LoriMasks(masks)
    for path, weight in trainer.weights.items():
        torch.testing.assert_close(weight.detach(), B[path], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_follows_algorithm_1_with_accumulation_clipping_and_a_cosine(make_trainer, llama, rows, backend):
    """Rows of different lengths, so that the batches of a step have different numbers of tokens."""
    losses, uneven = (
        Losses(),
        rows.map(lambda row, i: {"completion": row["completion"] + " w3" * (i % 4)}, with_indices=True),
    )
    trainer = make_trainer(
        trainer_class=RecordingTrainer,
        callbacks=[losses],
        train_dataset=uneven,
        sparse_backend=backend,
        gradient_accumulation_steps=2,
        max_grad_norm=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        learning_rate=1e-2,
        max_steps=6,
        calibration_max_steps=5,
    )
    trainer.train()

    def cosine(step):
        return 1e-2 * (step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 4)) / 2)

    A, rates = projections(trainer.model, "default"), (lambda step: 5e-3, cosine)
    calibration, masks, adaptation, B = algorithm_1_as_trl_steps(
        copy.deepcopy(llama).train(), A, 2.0, trainer.batches, 0.9, rates, OPTIMIZERS["adamw_torch"], 2, 0.05
    )
    assert losses.losses == pytest.approx(calibration + adaptation, abs=2e-6)
    assert trainer.masks == LoriMasks(masks)
    for path, weight in trainer.weights.items():
        torch.testing.assert_close(weight.detach(), B[path], rtol=1e-4, atol=1e-6)


def test_lori_d_follows_algorithm_1_without_a_mask(make_trainer, llama):
    losses = Losses()
    trainer = make_trainer(
        trainer_class=RecordingTrainer,
        callbacks=[losses],
        sparsity=0.0,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
    )
    trainer.train()
    batches = {"calibrating": trainer.batches["adapting"], "adapting": []}
    assert trainer.batches["calibrating"] == [] and trainer.masks.density == 1.0
    A = projections(trainer.model, "default")
    rates = (lambda step: 0.5, lambda step: 0.5)
    expected = algorithm_1_as_trl_steps(
        copy.deepcopy(llama).train(), A, 2.0, batches, 0.0, rates, torch.optim.SGD, 1, math.inf
    )[0]
    assert losses.losses == pytest.approx(expected, abs=2e-6)


# ---- the invariants ------------------------------------------------------------------------------------------------


def nonzero_adapter(llama, **changes) -> PeftModel:
    """A PEFT model whose B is not zero: an adapter to continue."""
    model = get_peft_model(copy.deepcopy(llama), lora_config(**changes))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


@pytest.mark.parametrize("backend", ["packed", "hook"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adagrad", "rmsprop"])
def test_entries_outside_the_mask_never_change(make_trainer, llama, optim, backend):
    """From a nonzero B, with weight decay, momentum, clipping and accumulation."""
    model = nonzero_adapter(llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(
        model=model,
        optim=optim,
        weight_decay=0.1,
        max_grad_norm=0.5,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
    )
    trainer.train()
    moved = 0
    for name, tensor in trainer.model.state_dict().items():
        if "lora_B" in name:
            mask = trainer.masks[name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")]
            assert torch.equal(tensor[~mask], before[name][~mask])
            moved += int((tensor[mask] != before[name][mask]).sum())
        else:
            assert torch.equal(tensor, before[name])
    assert moved > 0.9 * trainer.masks.num_selected


def test_an_optimizer_that_moves_frozen_entries_is_found_out(make_trainer, llama):
    class Drifting(torch.optim.SGD):
        """It is tried before a run begins, by three steps, so it drifts after them."""

        steps = 0

        def step(self, closure=None):
            super().step(closure)
            self.steps += 1
            for group in self.param_groups if self.steps > 3 else ():
                for parameter in group["params"]:
                    parameter.data += 1e-3

    trainer = make_trainer(sparse_backend="hook", max_steps=5)
    trainer.optimizer_cls_and_kwargs = (Drifting, {})
    with pytest.raises(RuntimeError, match="Drifting moved frozen entries of model.layers.0"):
        trainer.train()


def test_only_B_is_trained_and_without_weight_decay(make_trainer):
    trainer = make_trainer(weight_decay=0.1)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".lora_B." in name for name in trainable)
    for group in trainer.create_optimizer().param_groups:
        assert group["weight_decay"] == 0 or not group["params"]


def test_the_same_run_gives_the_same_masks_and_weights(make_trainer, tmp_path):
    first = make_trainer(output_dir=str(tmp_path / "1"))
    first.train()
    torch.manual_seed(123)
    second = make_trainer(output_dir=str(tmp_path / "2"))
    second.train()
    assert first.masks == second.masks
    assert all(torch.equal(first.weights[path], second.weights[path]) for path in first.weights)


# ---- the phases ----------------------------------------------------------------------------------------------------


def test_calibration_leaves_B_at_zero_and_density_exact(make_trainer):
    trainer = make_trainer(calibration_max_steps=3)
    trainer.calibrate()
    assert all(not weight.any() for weight in trainer.weights.values())
    assert trainer.masks.num_selected == num_to_select(0.9, trainer.masks.numel)
    assert trainer.run.calibration.steps == 3 and trainer.run.calibration.loss > 0
    assert trainer.masks.projection == trainer.projection


def test_calibration_has_its_own_length_rate_and_rows(make_trainer):
    seen = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((args.learning_rate, state.max_steps, args.eval_strategy == "no"))

    trainer = make_trainer(
        callbacks=[Spy()],
        max_steps=-1,
        num_train_epochs=2,
        calibration_max_steps=-1,
        calibration_fraction=0.25,
        calibration_num_train_epochs=3,
        calibration_learning_rate=1e-3,
    )
    trainer.train()
    assert seen == [(1e-3, 6, True), (5e-3, 16, True)]  # 8 rows x 3 epochs / 4; 32 rows x 2 epochs / 4
    assert trainer.run.calibration.samples == 8


def test_callbacks_see_the_B_that_the_step_has_made(make_trainer):
    class Watch(TrainerCallback):
        steps = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            B = {name: weight.clone() for name, weight in model.named_parameters() if "lora_B" in name}
            self.steps.append((B, {name: tensor.clone() for name, tensor in model.state_dict().items()}))

    trainer = make_trainer(callbacks=[Watch()], max_steps=2)
    trainer.train()
    assert len(Watch.steps) == 6
    for B, state in Watch.steps:
        assert all(torch.equal(weight, state[name]) for name, weight in B.items())
    assert any(not torch.equal(Watch.steps[-1][0][name], weight) for name, weight in Watch.steps[-2][0].items())


def test_several_sparsities_from_one_calibration(make_trainer, tmp_path):
    trainer = make_trainer(calibration_sparsities=[0.5, 0.99], mask_granularity="layer")
    trainer.train()
    half, few = (LoriMasks.from_pretrained(tmp_path / "out" / "calibration", task=f"code-{s}") for s in (0.5, 0.99))
    assert half.sparsity == 0.5 and half.num_selected == half.numel // 2
    assert few.overlap(trainer.masks) == trainer.masks.overlap(half) == 1.0
    assert trainer.masks.granularity == "layer"
    densities = trainer.masks.by_layer()
    assert densities[0] == pytest.approx(densities[1], abs=1e-3)
    again = make_trainer(mask_name_or_path=str(tmp_path / "out" / "calibration" / "masks" / "code-0.5.safetensors"))
    assert again.masks == half and again.projection == trainer.projection


def test_calibration_defaults_to_the_length_of_the_adaptation(make_trainer):
    assert make_trainer(calibration_max_steps=-1, max_steps=7).args.for_calibration().max_steps == 7


def test_phases_log_under_their_own_names(make_trainer):
    names = []

    class Names(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            names.append(set(logs))

    trainer = make_trainer(callbacks=[Names()], max_steps=1, calibration_max_steps=1)
    output = trainer.train()
    assert "calibration_loss" in names[0] and all(name.startswith("calibration_") for name in names[0])
    assert "loss" in names[2] and not any(name.startswith("calibration_") for name in names[2])
    assert {"calibration_train_loss", "train_loss"} <= output.metrics.keys()


def test_progress_bars_name_the_phase(make_trainer, capfd):
    make_trainer(disable_tqdm=False, max_steps=2, calibration_max_steps=2).train()
    shown = capfd.readouterr().err
    assert "calibrating:" in shown and "adapting:" in shown


def test_early_stopping_and_evaluation_stay_out_of_the_calibration(make_trainer, rows):
    trainer = make_trainer(
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        learning_rate=0.5,  # so high that the last step is not the best one
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        eval_dataset=rows.select(range(4)),
    )
    trainer.train()
    assert any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks)
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".lora_B." in name for name in trainable)
    best = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    for path, weight in trainer.weights.items():
        assert torch.equal(best[f"base_model.model.{path}.lora_B.weight"], weight)


def test_given_masks_skip_the_calibration_and_bring_their_A(make_trainer, adapter_folder):
    trainer = make_trainer(task_name="other", mask_name_or_path=str(adapter_folder))
    masks = LoriMasks.from_pretrained(adapter_folder)
    assert trainer.masks == masks and trainer.projection == masks.projection
    trainer.train()
    assert trainer.run.calibration is None and trainer.masks.task == "other"


def test_masks_of_another_A_give_a_warning(make_trainer, adapter_folder, caplog):
    make_trainer(mask_name_or_path=str(adapter_folder), projection_seed=5)
    assert "not calibrated on this adapter's A" in caplog.text
    caplog.clear()
    make_trainer(mask_name_or_path=str(adapter_folder))
    assert "not calibrated" not in caplog.text


# ---- names and seeds -----------------------------------------------------------------------------------------------


def test_the_task_decides_A(make_trainer):
    def flat_A(**config):
        trainer = make_trainer(**config)
        return torch.cat([A.flatten() for A in projections(trainer.model, "default").values()])

    assert torch.equal(flat_A(task_name="code"), flat_A(task_name="code"))
    assert torch.cosine_similarity(flat_A(task_name="code"), flat_A(task_name="math"), dim=0).abs() < 0.1
    assert torch.equal(flat_A(task_name="code", projection_seed=1), flat_A(task_name="math", projection_seed=1))


def test_a_task_without_a_name_is_named_after_its_data(make_trainer, rows):
    named = rows.select(range(4))
    named.info.dataset_name = "some data"
    assert make_trainer(task_name=None, train_dataset=named).task_name == "some-data"
    first = make_trainer(task_name=None).task_name
    assert first.startswith("data-") and first == make_trainer(task_name=None).task_name
    assert first != make_trainer(task_name=None, train_dataset=rows.select(range(1, 30))).task_name


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_an_adapter_is_needed(llama, make_trainer):
    with pytest.raises(ValueError, match="`peft_config` is missing"):
        make_trainer(model=copy.deepcopy(llama))


def test_an_adapter_with_nothing_trainable(make_trainer, model, adapter_folder):
    frozen = load_lori_adapter(model, adapter_folder)
    with pytest.raises(ValueError, match="every lora_B is frozen.*is_trainable=True"):
        make_trainer(model=frozen)


def test_a_calibration_that_moves_nothing(make_trainer):
    with pytest.raises(ValueError, match="moved nothing in 4 steps at `calibration_learning_rate=1e-60`"):
        make_trainer(calibration_learning_rate=1e-60).train()


def test_a_mask_of_another_rank(make_trainer, adapter_folder):
    with pytest.raises(ValueError, match=r"do not fit the adapter in 14 modules.*\(64, 4\) for lora_B \(64, 8\)"):
        make_trainer(mask_name_or_path=str(adapter_folder), peft_config=lora_config(r=8))


def test_a_mask_of_other_modules(make_trainer, adapter_folder):
    with pytest.raises(ValueError, match="has a mask but no adapter; "):
        make_trainer(mask_name_or_path=str(adapter_folder), peft_config=lora_config(target_modules=["q_proj"]))


def test_a_config_without_lori_fields(llama, rows, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="`args` is a SFTConfig, which has no LoRI fields. Pass a `LoriSFTConfig`"):
        LoriSFTTrainer(llama, SFTConfig(output_dir=str(tmp_path), bf16=False), train_dataset=rows)


def test_an_optimizer_object_is_refused(model, rows):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Pass `optimizer_cls_and_kwargs` instead"):
        LoriSFTTrainer(model, train_dataset=rows, peft_config=lora_config(), optimizers=(optimizer, None))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_in", ["calibrating", "adapting"])
def test_resuming_gives_the_undisturbed_run(make_trainer, tmp_path, stop_in):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and args.output_dir.endswith("calibration") == (stop_in == "calibrating"):
                raise KeyboardInterrupt

    config = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    peft_config = lora_config(lora_dropout=0.1)
    whole = make_trainer(output_dir=str(tmp_path / "whole"), peft_config=peft_config, **config)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Stop()], peft_config=peft_config, **config).train()
    resumed = make_trainer(trainer_class=RecordingTrainer, peft_config=peft_config, **config)
    resumed.train(resume_from_checkpoint=True)
    steps = tuple(len(resumed.batches[phase]) for phase in ("calibrating", "adapting"))
    assert steps == {"calibrating": (2, 4), "adapting": (0, 2)}[stop_in]
    assert resumed.masks == whole.masks and resumed.run.calibration.steps == 4
    assert all(torch.equal(resumed.weights[path], whole.weights[path]) for path in whole.weights)


def test_a_finished_calibration_is_not_run_again(make_trainer):
    make_trainer().calibrate()
    resumed = make_trainer(trainer_class=RecordingTrainer)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.batches["calibrating"]) == 0 and len(resumed.batches["adapting"]) == 4


def test_half_written_checkpoints_are_passed_over(make_trainer, tmp_path, caplog):
    config = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(**config).train()
    state = tmp_path / "out" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    resumed = make_trainer(trainer_class=RecordingTrainer, **config)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.batches["adapting"]) == 2 and "half-written" in caplog.text


def test_a_checkpoint_of_another_run_is_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)
    make_trainer(save_strategy="steps", save_steps=2).train()
    for changes, what in (
        ({"sparsity": 0.5}, "sparsity 0.9, this run has 0.5"),
        ({"sparsity": 0.0}, "sparsity 0.9, this run has 0.0"),
        ({"seed": 1}, "projection"),
        ({"mask_granularity": "layer"}, "granularity model, this run has layer"),
        ({"task_name": "math", "projection_seed": 5}, "task code, this run has math"),
        ({"peft_config": lora_config(r=8)}, "projection"),
    ):
        with pytest.raises(ValueError, match=f"was trained with {what}"):
            make_trainer(**changes).train(resume_from_checkpoint=True)
    change_record(tmp_path / "out" / "checkpoint-4", lambda values: values["training"].update(world_size=2))
    with pytest.raises(ValueError, match="was trained with num_processes 2, this run has 1"):
        make_trainer().train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_base_is_refused(make_trainer, tmp_path, llama):
    def base(name):
        model = copy.deepcopy(llama)
        model.config._name_or_path = model.name_or_path = name
        return model

    config = {"peft_config": lora_config(), "save_strategy": "steps", "save_steps": 2}
    make_trainer(model=base("there/tiny-llama"), **config).train()
    make_trainer(model=base("elsewhere/tiny-llama"), **config).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="was trained with base_model tiny-llama, this run has tiny-llama-instruct"):
        make_trainer(model=base("there/tiny-llama-instruct"), **config).train(resume_from_checkpoint=True)


# ---- continuing ----------------------------------------------------------------------------------------------------


def test_a_second_task_keeps_A_starts_from_B_and_remembers_the_first(make_trainer, model, adapter_folder, tmp_path):
    continued = load_lori_adapter(model, adapter_folder, is_trainable=True)
    before = {name: tensor.clone() for name, tensor in continued.state_dict().items() if "lora_" in name}
    assert any(tensor.any() for name, tensor in before.items() if "lora_B" in name)
    trainer = make_trainer(model=continued, task_name="math")
    trainer.train()
    for path, weight in trainer.weights.items():
        mask, old = trainer.masks[path], before[f"base_model.model.{path}.lora_B.default.weight"]
        assert torch.equal(weight[~mask], old[~mask])
    trainer.save_model()
    config = json.loads((tmp_path / "out" / "lori_config.json").read_text())
    assert [task["task"] for task in config["tasks"]] == ["code", "math"] and config["task"] == "math"
    assert Projection(**config["projection"]) == LoriMasks.from_pretrained(adapter_folder).projection
    assert LoriMasks.from_pretrained(tmp_path / "out", task="code") == LoriMasks.from_pretrained(adapter_folder)
    assert LoriMasks.from_pretrained(tmp_path / "out") == trainer.masks


def test_a_plain_peft_adapter_can_be_continued(make_trainer, llama):
    model = nonzero_adapter(llama)
    A = {path: tensor.clone() for path, tensor in projections(model, "default").items()}
    trainer = make_trainer(model=model)
    trainer.train()
    assert all(torch.equal(A[path], tensor) for path, tensor in projections(trainer.model, "default").items())
    assert trainer.projection.seed is None
