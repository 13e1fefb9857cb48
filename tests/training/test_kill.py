"""SIGKILL at ten random moments over both phases, and resume: the adapter is that of an undisturbed run."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny import lora_config, make_trainer
from transformers import TrainerCallback

from lori_trl import LoriMasks

STEPS = 16


class Slowly(TrainerCallback):
    """Give the killer time, and tell it how far this process is: steps made in each phase."""

    def __init__(self, progress):
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self.progress[not args.output_dir.endswith("calibration")] += 1
        time.sleep(0.02)


def run(folder, resume, callbacks=()):
    trainer = make_trainer(
        folder,
        peft_config=lora_config(lora_dropout=0.1),
        callbacks=list(callbacks),
        learning_rate=1e-2,
        max_steps=STEPS,
        calibration_max_steps=STEPS,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
    )
    begun = any(folder.glob("**/checkpoint-*/trainer_state.json")) or (folder / "calibration" / "masks").is_dir()
    trainer.train(resume_from_checkpoint=resume and begun)
    trainer.save_model()


@pytest.mark.release
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_killed_at_ten_random_moments(tmp_path):
    run(tmp_path / "whole", resume=False)
    folder = tmp_path / "killed"
    folder.mkdir()
    draw = random.Random(20261122)
    fork = multiprocessing.get_context("fork")  # the child has everything imported already
    kills = [0, 0]
    while True:
        progress = fork.Array("i", 2)
        child = fork.Process(target=run, args=(folder, True, [Slowly(progress)]))
        child.start()
        if kills == [5, 5]:
            child.join()
            assert child.exitcode == 0
            break
        phase = int(kills[0] == 5)
        steps = draw.randint(phase, 3)
        while child.is_alive() and progress[phase] < steps and not progress[1] > steps:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.08))  # somewhere in a step, a save, a rotation, the change of phases
        assert child.is_alive(), f"the run ended by itself with exit code {child.exitcode} after {kills} kills"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills[phase] += 1
    assert LoriMasks.from_pretrained(folder) == LoriMasks.from_pretrained(tmp_path / "whole")
    mine, whole = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "whole"))
    assert mine.keys() == whole.keys() and all(torch.equal(mine[name], whole[name]) for name in whole)
    assert not list(folder.glob(".saving-*"))
