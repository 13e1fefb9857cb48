"""One tiny adapter, trained once for all tests that share, describe or pack an adapter."""

import functools
import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lori_trl import LoriSFTConfig, LoriSFTTrainer


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=100, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **shape)
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(97)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def rows(count: int = 16) -> Dataset:
    draw = random.Random(0)
    words = [[f"w{draw.randrange(97)}" for _ in range(5)] for _ in range(count)]
    return Dataset.from_list([{"prompt": " ".join(row), "completion": " " + " ".join(row[:3])} for row in words])


def make_trainer(output_dir: str | Path, model=None, **changes) -> LoriSFTTrainer:
    fresh = model is None
    settings = {
        "task_name": "code",
        "max_steps": 2,
        "calibration_max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return LoriSFTTrainer(
        base_model() if fresh else model,
        LoriSFTConfig(output_dir=str(output_dir), **settings | changes),
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if fresh else None,
    )


@functools.cache
def trained_adapter() -> Path:
    """The folder of a trained adapter. Copy it before changing anything."""
    folder = Path(tempfile.mkdtemp(prefix="lori-")) / "code-lori-s"
    trainer = make_trainer(folder)
    trainer.recipe = {"task_name": "code", "sparsity": 0.9}
    trainer.train()
    trainer.save_model()
    return folder
