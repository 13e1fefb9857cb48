"""A run has an identity: it is resumed from its own checkpoints, whatever else lies in its folder."""

import json

import pytest
import torch
from datasets import concatenate_datasets
from tiny import Stop, lora_config, make_chat_tokenizer, make_llama, make_rows
from transformers import TrainerCallback

from lori_trl import LoriSFTTrainer
from lori_trl.adapter.record import read_record

SAVING = {"save_strategy": "steps", "save_steps": 2}


def test_a_second_run_in_a_folder_is_told_and_never_takes_the_first_one_s_masks(make_trainer, caplog):
    first = make_trainer(**SAVING)
    first.train()
    assert "checkpoints of another run" not in caplog.text
    second = make_trainer(callbacks=[Stop("calibrating")], seed=0, **SAVING | {"save_steps": 3})
    with pytest.raises(KeyboardInterrupt):
        second.train()  # before its first checkpoint
    assert "holds checkpoints of another run. This one begins anew" in caplog.text
    with pytest.raises(ValueError, match="the run that began last in .* left no complete checkpoint; .*checkpoint-4"):
        make_trainer(**SAVING).train(resume_from_checkpoint=True)
    third = make_trainer(callbacks=[Stop("adapting")], **SAVING)
    with pytest.raises(KeyboardInterrupt):
        third.train()
    resumed = make_trainer(**SAVING)
    resumed.train(resume_from_checkpoint=True)  # not from the first one's checkpoint-4
    assert resumed.run.id == third.run.id != first.run.id and resumed.state.global_step == 4


def test_a_resumed_run_keeps_its_identity(make_trainer, tmp_path):
    first = make_trainer(callbacks=[Stop("adapting")], **SAVING)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = make_trainer(**SAVING)
    second.train(resume_from_checkpoint=True)
    second.save_model()
    assert read_record(tmp_path / "out").training.run == first.run.id == second.run.id and len(first.run.id) == 16


def test_checkpoints_of_other_data_and_another_calibration_are_refused(make_trainer, rows, tmp_path):
    make_trainer(**SAVING).train()
    for changes, difference in (
        ({"train_dataset": rows.select(range(1, 32))}, "data"),
        ({"calibration_learning_rate": 1e-3}, "calibration_learning_rate 0.005, this run has 0.001"),
        ({"calibration_fraction": 0.5}, "calibration_fraction its default, this run has 0.5"),
    ):
        with pytest.raises(ValueError, match=f"was trained with {difference}"):
            make_trainer(**changes).train(resume_from_checkpoint=True)


def test_what_is_trained_besides_is_on_record_and_in_the_card(make_trainer, tmp_path):
    trainer = make_trainer(
        peft_config=lora_config(modules_to_save=["lm_head"], trainable_token_indices=[5, 6]),
        max_steps=1,
        calibration_max_steps=1,
    )
    trainer.train()
    trainer.save_model()
    counts = json.loads((tmp_path / "out" / "lori_config.json").read_text())["counts"]
    assert counts["dense"] == {"lm_head.weight": 3200, "model.embed_tokens": 64}
    card = (tmp_path / "out" / "README.md").read_text()
    table = card[card.index("| parameters | count |") :].partition("\n\n")[0]
    assert "| besides, without a mask: lm_head.weight | 3,200 |" in table and "| this trains | " in table


# ---- what decides the result, whether or not a card shows it -------------------------------------------------------


ONE = {"save_strategy": "steps", "save_steps": 1}


def stop_early(make_trainer, optimizer=None, **changes):
    trainer = make_trainer(callbacks=[Stop("adapting")], calibration_method="random", **ONE | changes)
    trainer.optimizer_cls_and_kwargs = optimizer
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def resume(make_trainer, optimizer=None, **changes):
    trainer = make_trainer(calibration_method="random", **ONE | changes)
    trainer.optimizer_cls_and_kwargs = optimizer
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ((torch.optim.SGD, {}), (torch.optim.Adagrad, {}), "optim SGD, this run has Adagrad"),
        ((torch.optim.SGD, {}), None, "optim SGD, this run has its default"),
        ((torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), "optimizer_kwargs .*, this run has"),
    ],
)
def test_another_optimizer_class_is_another_run(make_trainer, tmp_path, before, after, difference):
    stop_early(make_trainer, before)
    with pytest.raises(ValueError, match=f"was trained with {difference}"):
        resume(make_trainer, after)
    resume(make_trainer, before).save_model()
    assert read_record(tmp_path / "out").training.hyperparameters["optim"] == "SGD"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy its default"),
        ({"shuffle_dataset": True}, "shuffle_dataset its default, this run has True"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config its default, this run has sha256:"),
        ({"pad_to_multiple_of": 16}, "pad_to_multiple_of its default, this run has 16"),
        ({"max_length": None}, "max_length its default, this run has none"),
        ({"processing_class": make_chat_tokenizer()}, "chat_template its default, this run has sha256:"),
        ({"model": make_llama().bfloat16(), "peft_config": lora_config()}, "dtype float32, this run has bfloat16"),
        ({"peft_config": lora_config(modules_to_save=["lm_head"])}, "modules_to_save None, this run has"),
    ],
)
def test_every_setting_that_decides_the_result_is_compared(make_trainer, changes, difference):
    stop_early(make_trainer)
    with pytest.raises(ValueError, match=f"was trained with {difference}"):
        resume(make_trainer, **changes)


def test_what_does_not_decide_the_result_may_change(make_trainer, tmp_path, caplog):
    stop_early(make_trainer)
    free = {"logging_steps": 2, "save_steps": 2, "save_total_limit": 1, "per_device_eval_batch_size": 1}
    free |= {"dataloader_num_workers": 1, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": make_rows()}
    resume(make_trainer, **free, activation_checkpointing=True, run_name="again", max_steps=6)
    assert "undisturbed" not in caplog.text


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"lr_scheduler_type": "cosine"}, {"max_steps": 6}, "lr_scheduler_type=cosine"),
        ({}, {"ignore_data_skip": True}, "ignore_data_skip=True"),
    ],
)
def test_a_resume_that_is_not_the_same_run_says_so(make_trainer, caplog, before, after, words):
    stop_early(make_trainer, **before)
    resume(make_trainer, **before, **after)
    assert words in caplog.text and "not be that of an undisturbed run" in caplog.text


def test_rows_behind_the_first_hundred_count(make_trainer):
    rows = concatenate_datasets([make_rows()] * 5)
    stop_early(make_trainer, train_dataset=rows)
    with pytest.raises(ValueError, match="was trained with data"):
        resume(make_trainer, train_dataset=rows.select([*range(110), *reversed(range(110, 160))]))


class Momentum(LoriSFTTrainer):
    """Makes its own optimizer, which no argument names."""

    def create_optimizer(self, model=None):
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [{"params": trained}, {"params": []}]  # as many as the Trainer makes
        self.optimizer = torch.optim.SGD(groups, lr=self.args.learning_rate, momentum=0.9)
        return self.optimizer


def test_an_optimizer_that_a_subclass_makes_is_compared_before_its_state_is_loaded(make_trainer):
    stop_early(make_trainer, trainer_class=Momentum)
    with pytest.raises(ValueError, match="has the state of an SGD, and this run's optimizer is an AdamW"):
        resume(make_trainer)
    assert resume(make_trainer, trainer_class=Momentum).state.global_step == 4


class StopAtLastSave(TrainerCallback):
    """Interrupts a phase once its last checkpoint is there, before the phase has ended."""

    def __init__(self, phase):
        self.phase = phase

    def on_save(self, args, state, control, **kwargs):
        phase = "calibrating" if args.output_dir.endswith("calibration") else "adapting"
        if phase == self.phase and state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("phase", ["calibrating", "adapting"])
def test_a_phase_that_has_all_its_steps_gets_no_further_one(make_trainer, tmp_path, phase):
    whole = make_trainer(output_dir=tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[StopAtLastSave(phase)], **SAVING).train()
    resumed = make_trainer(**SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and resumed.masks == whole.masks
    assert all(torch.equal(weight, whole.weights[path]) for path, weight in resumed.weights.items())
