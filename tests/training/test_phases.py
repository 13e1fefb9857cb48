"""Two phases in one run: each with its own schedule, counters and log, and neither undoes the other."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import RecordingTrainer, Stop, lora_config
from transformers import EarlyStoppingCallback, TrainerCallback

from lori_trl import LoriSFTTrainer
from lori_trl.adapter.record import read_record


def logged_rates(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- each its own --------------------------------------------------------------------------------------------------


def test_the_calibration_has_a_schedule_of_its_own(make_trainer):
    trainer = make_trainer(
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-3}, warmup_steps=10, max_steps=12
    )
    trainer.train()
    assert logged_rates(trainer, "calibration_learning_rate") == [5e-3] * 4
    adaptation = logged_rates(trainer, "learning_rate")
    assert len(adaptation) == 12 and adaptation[0] < adaptation[5] < adaptation[10] > adaptation[11]


def test_the_calibration_warms_up_if_asked(make_trainer):
    trainer = make_trainer(calibration_lr_scheduler_type="constant_with_warmup", calibration_warmup_steps=0.5)
    trainer.calibrate()
    assert logged_rates(trainer, "calibration_learning_rate") == [0, 2.5e-3, 5e-3, 5e-3]


def test_counters_begin_again_and_the_log_has_both_phases(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    calibration, adaptation = logged_rates(trainer, "calibration_num_tokens"), logged_rates(trainer, "num_tokens")
    assert calibration == adaptation and len(calibration) == 4
    history = trainer.state.log_history
    assert len(logged_rates(trainer, "calibration_loss")) == len(logged_rates(trainer, "loss")) == 4
    assert [entry["step"] for entry in history if "calibration_loss" in entry] == [1, 2, 3, 4]
    trainer.state.save_to_json(tmp_path / "state.json")
    resumed = make_trainer(save_strategy="steps", save_steps=2, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[: len(history) - 1] == history[:-1]


def test_all_early_stopping_callbacks_stay_out_of_the_calibration(make_trainer, rows):
    trainer = make_trainer(
        callbacks=[EarlyStoppingCallback(1), EarlyStoppingCallback(2)],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        eval_dataset=rows.select(range(4)),
    )
    before = list(trainer.callback_handler.callbacks)
    trainer.calibrate()
    assert trainer.callback_handler.callbacks == before


class Evaluate(TrainerCallback):
    """Asks for an evaluation after the second step of each phase, and keeps what others are shown of it."""

    def __init__(self):
        self.metrics, self.logged = [], []

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step == 2

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append(metrics["eval_loss"])

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged += [name for name in logs if name.endswith("eval_loss")]


def test_an_evaluation_within_the_calibration_keeps_its_names(make_trainer, rows):
    watch = Evaluate()
    trainer = make_trainer(callbacks=[watch], eval_dataset=rows.select(range(4)), metric_for_best_model="eval_loss")
    trainer.train()
    assert len(watch.metrics) == 2 and watch.logged == ["calibration_eval_loss", "eval_loss"]
    assert logged_rates(trainer, "calibration_eval_loss") == watch.metrics[:1]
    assert trainer.state.best_metric == watch.metrics[1]


def test_evaluate_within_the_calibration_returns_its_figures(make_trainer, rows):
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            losses.append(trainer.evaluate()["eval_loss"])

    losses: list[float] = []
    trainer = make_trainer(callbacks=[Look()], eval_dataset=rows.select(range(4)), max_steps=1)
    trainer.train()
    assert len(losses) == 5 and len(logged_rates(trainer, "calibration_eval_loss")) == 4


def test_callbacks_that_come_and_go_in_the_calibration_stay_or_are_gone(make_trainer):
    class Seen(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((type(self).__name__, trainer.phase))

    class Late(Seen):
        pass

    class Coming(Seen):
        def on_step_end(self, args, state, control, **kwargs):
            if trainer.phase == "calibrating" and state.global_step == 1:
                trainer.add_callback(Late())
                trainer.remove_callback(Going)

    class Going(Seen):
        pass

    seen: list[tuple[str, str]] = []
    trainer = make_trainer(callbacks=[Going(), Coming(), EarlyStoppingCallback(1)], eval_strategy="no")
    trainer.remove_callback(EarlyStoppingCallback)
    trainer.train()
    assert seen[:2] == [("Going", "calibrating"), ("Coming", "calibrating")]
    assert seen[2:] == [("Coming", "adapting"), ("Late", "adapting")]


def test_an_own_trainer_keeps_what_it_noted_in_the_calibration(make_trainer):
    """TRL's counters begin again in every phase; what a subclass counts is its own affair."""
    trainer = make_trainer(trainer_class=RecordingTrainer)
    trainer.train()
    assert len(trainer.batches["calibrating"]) == len(trainer.batches["adapting"]) == 4


def test_the_record_says_how_far_the_run_is(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.save_model(str(tmp_path / "new"))
    trainer.train()
    trainer.save_model()
    folders = ("new", "out/calibration/checkpoint-2", "out/calibration", "out/checkpoint-2", "out")
    phases = [read_record(tmp_path / folder).phase for folder in folders]
    assert phases == ["new", "calibrating", "calibrated", "adapting", "adapting"]


# ---- interrupted, repeated -----------------------------------------------------------------------------------------


def test_an_interrupted_calibration_is_set_back_and_begins_again(make_trainer, tmp_path):
    whole = make_trainer(output_dir=tmp_path / "whole")
    whole.train()
    trainer = make_trainer(callbacks=[Stop("calibrating")])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not any(weight.any() for weight in trainer.weights.values()) and trainer.masks is None
    assert trainer.args.learning_rate == whole.args.learning_rate
    trainer.train()
    assert trainer.masks == whole.masks
    assert all(torch.equal(weight, whole.weights[path]) for path, weight in trainer.weights.items())


def test_a_task_is_calibrated_once(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trained = {path: weight.clone() for path, weight in trainer.weights.items()}
    with pytest.raises(ValueError, match="`calibrate\\(\\)` was called, but task 'code' has its mask already"):
        trainer.calibrate()
    assert all(torch.equal(weight, trained[path]) for path, weight in trainer.weights.items())


# ---- the next task -------------------------------------------------------------------------------------------------


def test_the_next_trainer_on_the_model_knows_the_first_task(make_trainer, tmp_path):
    first = make_trainer(output_dir=tmp_path / "first")
    first.train()
    second = make_trainer(output_dir=tmp_path / "second", model=first.model, task_name="math", disjoint_masks=True)
    assert second.run.earlier_masks == {"code": first.masks} and second.projection == first.projection
    second.train()
    assert not (second.masks & first.masks).num_selected
    assert [task.task for task in second.record.tasks] == ["code", "math"]
    assert second.record.tasks[0].calibration == first.run.calibration


def test_a_trained_adapter_without_a_record_gives_a_warning(make_trainer, llama, caplog):
    model = get_peft_model(copy.deepcopy(llama), lora_config())
    make_trainer(model=copy.deepcopy(model))
    assert "no task on record" not in caplog.text
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    make_trainer(model=model)
    assert "no task on record" in caplog.text and "`load_lori_adapter`" in caplog.text


# ---- arguments that would do nothing, or go wrong later ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, r"`learning_rate=-1.0` is outside \(0, inf\)"),
        ({"calibration_learning_rate": float("nan")}, "`calibration_learning_rate=nan` is outside"),
        ({"max_length": 1}, r"`max_length=1` is outside \[2, inf\)"),
        ({"gradient_accumulation_steps": 0}, r"`gradient_accumulation_steps=0` is outside \[1, inf\)"),
        ({"weight_decay": -1.0}, "`weight_decay=-1.0` is outside"),
        ({"max_steps": -7}, r"`max_steps=-7` is outside -1 or \[1, inf\)"),
        ({"calibration_sparsities": [0.5, 1.0]}, r"`calibration_sparsities=\[0.5, 1.0\]` is outside \[0, 1\)"),
        ({"calibration_warmup_steps": 3}, "has no effect with `calibration_lr_scheduler_type='constant'`"),
        ({"calibration_lr_scheduler_type": "reduce_lr_on_plateau"}, "is not known. Allowed are constant, "),
        ({"sparsity": 0.9999999}, "selects none of the 2,048 entries of B.*Lower `sparsity`"),
    ],
)
def test_arguments_that_cannot_be_right(make_trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration_fraction": 0.5}, "`calibration_fraction=0.5` with streamed data.*Allowed is 1"),
        (
            {"calibration_num_train_epochs": 1, "calibration_max_steps": -1},
            "`calibration_num_train_epochs=1` with streamed data.*Set `calibration_max_steps`",
        ),
    ],
)
def test_what_streamed_data_cannot_tell(make_trainer, rows, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=rows.to_iterable_dataset(), **changes)


def test_a_scheduler_object_is_refused(model, rows):
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters(), lr=0.1), lambda step: 1)
    with pytest.raises(ValueError, match="`optimizers` holds an optimizer or a scheduler.*`lr_scheduler_type`"):
        LoriSFTTrainer(model, train_dataset=rows, peft_config=lora_config(), optimizers=(None, scheduler))


def test_given_masks_that_override_the_sparsity_give_a_warning(make_trainer, adapter_folder, caplog):
    make_trainer(mask_name_or_path=str(adapter_folder), sparsity=0.5)
    assert "`sparsity=0.5` has no effect: the task's masks have sparsity 0.9" in caplog.text
    caplog.clear()
    make_trainer(mask_name_or_path=str(adapter_folder))
    assert "has no effect" not in caplog.text


def test_a_warm_up_without_a_schedule_that_has_one_gives_a_warning(make_trainer, caplog):
    make_trainer(warmup_steps=3)
    assert "`warmup_steps=3` has no effect with `lr_scheduler_type='constant'`" in caplog.text


def test_arguments_stand_in_the_order_of_trl(model, rows, tokenizer, make_trainer):
    args = make_trainer().args
    trainer = LoriSFTTrainer(model, args, None, rows, rows.select(range(2)), tokenizer, peft_config=lora_config())
    assert len(trainer.train_dataset) == len(rows) and len(trainer.eval_dataset) == 2
