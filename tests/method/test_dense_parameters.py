"""What is trained besides B: set back after calibration, trained densely, saved with the adapter, never masked."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import RecordingTrainer, lora_config
from transformers import TrainerCallback

from lori_trl.method.dense_parameters import dense_parameters

CONFIGS = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 6, 7]},
}


def dense_of(trainer):
    return {name: value.detach().clone() for name, value in dense_parameters(trainer.model, "default").items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_calibration_sets_everything_back_and_adaptation_trains_it(make_trainer, llama, kind, tmp_path):
    trainer = make_trainer(peft_config=lora_config(**CONFIGS[kind]), weight_decay=0.1, max_grad_norm=0.5)
    before = dense_of(trainer)
    assert before and not any("lora_" in name for name in before)
    loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.calibrate()
    assert all(torch.equal(value, before[name]) for name, value in dense_of(trainer).items())
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == loss
    assert not any("lm_head" in path or "embed" in path for path in trainer.masks)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in dense_of(trainer).items())
    trainer.save_model()
    plain = PeftModel.from_pretrained(copy.deepcopy(llama), str(tmp_path / "out")).eval()
    tokens = torch.arange(3, 33).view(2, 15)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=tokens).logits, trainer.model.eval()(input_ids=tokens).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_killed_in_either_phase_and_resumed_is_the_undisturbed_run(make_trainer, tmp_path, kind):
    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if not args.output_dir.endswith("calibration"):
                raise KeyboardInterrupt

    peft_config = lora_config(**CONFIGS[kind])
    whole = make_trainer(output_dir=str(tmp_path / "whole"), peft_config=peft_config)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Stop()], peft_config=peft_config).train()
    resumed = make_trainer(trainer_class=RecordingTrainer, peft_config=peft_config)
    resumed.train(resume_from_checkpoint=True)
    assert not resumed.batches["calibrating"] and resumed.masks == whole.masks
    logged = [[sorted(entry) for entry in each.state.log_history] for each in (resumed, whole)]
    assert logged[0] == logged[1] and "calibration_loss" in logged[0][0]
    assert all(torch.equal(value, dense_of(whole)[name]) for name, value in dense_of(resumed).items())
    assert all(torch.equal(weight, whole.weights[path]) for path, weight in resumed.weights.items())


def test_what_would_be_trained_and_not_saved_is_refused(make_trainer, llama):
    model = get_peft_model(copy.deepcopy(llama), lora_config())
    model.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match="1 parameters would be trained and not be saved.*model.norm.weight"):
        make_trainer(model=model)


def test_weight_decay_without_anything_to_decay_gives_a_warning(make_trainer, caplog):
    make_trainer(weight_decay=0.1)
    assert "`weight_decay=0.1` has no effect: B is exempt" in caplog.text
    caplog.clear()
    make_trainer(weight_decay=0.1, peft_config=lora_config(modules_to_save=["lm_head"]))
    make_trainer()
    assert "weight_decay" not in caplog.text


def test_tasks_that_share_nothing_cannot_share_a_whole_module(make_trainer):
    with pytest.raises(ValueError, match="`disjoint_masks=True`, but 1 parameters besides B are trained.*lm_head"):
        make_trainer(disjoint_masks=True, peft_config=lora_config(modules_to_save=["lm_head"]))


@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_B_that_was_frozen_by_hand_stays_frozen(make_trainer, llama, backend, caplog):
    model = get_peft_model(copy.deepcopy(llama), lora_config())
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_(False)
    trainer = make_trainer(model=model, sparse_backend=backend, max_steps=2, calibration_max_steps=2)
    assert "7 of 14 modules have a frozen lora_B" in caplog.text
    trainer.train()
    for path, weight in trainer.weights.items():
        assert bool(weight.any()) == weight.requires_grad == ("layers.1" in path)
        assert not trainer.masks[path].any() or "layers.1" in path
