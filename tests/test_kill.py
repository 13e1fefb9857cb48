"""SIGKILL at ten random moments over both phases, and resume: the adapter is that of an undisturbed run."""

import copy
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from conftest import lora_config
from safetensors.torch import load_file
from transformers import TrainerCallback

from lori_trl import LoriMasks, LoriSFTConfig, LoriSFTTrainer

STEPS = 12


class Slowly(TrainerCallback):
    """Gives the killer time, and tells it how far the run is."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.03)


def run(folder, llama, tokenizer, rows, resume, callbacks=()):
    config = LoriSFTConfig(
        output_dir=str(folder),
        task_name="code",
        learning_rate=1e-2,
        calibration_learning_rate=5e-3,
        max_steps=STEPS,
        calibration_max_steps=STEPS,
        per_device_train_batch_size=4,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = LoriSFTTrainer(
        copy.deepcopy(llama),
        config,
        train_dataset=rows,
        processing_class=copy.deepcopy(tokenizer),
        peft_config=lora_config(lora_dropout=0.1),
        callbacks=list(callbacks),
    )
    begun = any(folder.glob("**/checkpoint-*/trainer_state.json")) or (folder / "calibration" / "masks").is_dir()
    trainer.train(resume_from_checkpoint=resume and begun)
    trainer.save_model()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_killed_at_ten_random_moments(tmp_path, llama, tokenizer, rows):
    run(tmp_path / "whole", llama, tokenizer, rows, resume=False)
    folder = tmp_path / "killed"
    folder.mkdir()
    draw = random.Random(20261122)
    fork = multiprocessing.get_context("fork")  # the child has everything imported already
    kills = {"calibration": 0, "adaptation": 0}
    for _ in range(200):
        child = fork.Process(target=run, args=(folder, llama, tokenizer, rows, True, [Slowly()]))
        child.start()
        # Often enough that a killed run makes headway: between nothing and a few checkpoints further.
        child.join(timeout=draw.uniform(0.2, 1.2) if sum(kills.values()) < 10 else None)
        if child.is_alive():
            adapting = (folder / "calibration" / "masks" / "code.safetensors").is_file()
            kills["adaptation" if adapting else "calibration"] += 1
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        elif child.exitcode == 0:
            break
        else:
            pytest.fail(f"the resumed run failed with exit code {child.exitcode} after {kills}")
    assert sum(kills.values()) >= 10 and min(kills.values()) >= 1, kills
    assert LoriMasks.from_pretrained(folder) == LoriMasks.from_pretrained(tmp_path / "whole")
    mine, whole = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "whole"))
    assert mine.keys() == whole.keys() and all(torch.equal(mine[name], whole[name]) for name in whole)
    assert not list(folder.glob(".saving-*"))
