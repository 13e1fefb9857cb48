"""Time of whole runs on SmolLM2-135M, from loading the model to the last step: LoRA, and LoRI-S by its mask's origin.

    python benchmarks/run_time.py [--rounds 3] [--steps 30]

The quickstart's rows, four a batch, r = 32, seven projections, AdamW, float32. A cheap calibration looks at a tenth of
the batches; the whole one takes as many steps as the adaptation.
"""

import argparse
import tempfile

import torch
from common import PROJECTIONS, ROOT, interleaved, report, summary
from datasets import load_dataset
from peft import LoraConfig
from quickstart import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lori_trl import LoriSFTConfig, LoriSFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    cheap = max(2, options.steps // 10)
    masks = {
        "LoRI-S, random mask": {"calibration_method": "random"},
        f"LoRI-S, {cheap} batches' gradients": {"calibration_method": "gradient", "calibration_max_steps": cheap},
        f"LoRI-S, {cheap} dense steps": {"calibration_max_steps": cheap},
        "LoRI-S, whole calibration": {},
    }
    contestants = {"LoRA": lambda: run(SFTTrainer, SFTConfig, options.steps)}
    for name, fields in masks.items():
        contestants[name] = lambda fields=fields: run(
            LoriSFTTrainer, LoriSFTConfig, options.steps, task_name="style", **fields
        )
    seconds = {name: summary(times) for name, times in interleaved(contestants, options.rounds, warmup=0).items()}
    lora = seconds["LoRA"]["median"]
    over = {name: figures["median"] / lora for name, figures in seconds.items()}
    report("run_time", {"steps": options.steps, "seconds": seconds, "over LoRA": over})


def run(trainer_class: type, config_class: type, steps: int, **fields) -> None:
    """Load the model and train an adapter."""
    rows = load_dataset("json", data_files=str(ROOT / "recipes" / "quickstart" / "train.jsonl"), split="train")
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True, bf16=False,
            activation_checkpointing=False, dataloader_pin_memory=False, save_strategy="no", report_to="none",
            disable_tqdm=True, logging_steps=steps, **fields,
        )  # fmt: skip
        trainer_class(
            AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32),
            config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(smollm2()),
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=PROJECTIONS),
        ).train()


if __name__ == "__main__":
    main()
