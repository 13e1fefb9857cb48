"""A run has an identity: it is resumed from its own checkpoints, whatever else lies in its folder."""

import json

import pytest
from tiny import Stop, lora_config

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
