"""One tiny Llama, tokenizer and data set for all tests, made in memory: no network, no downloads."""

import copy
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lori_trl import LoriSFTConfig, LoriSFTTrainer

torch.set_num_threads(1)  # tiny matrices are slower on more


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(97)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="</s>"
    )


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def model(llama) -> LlamaForCausalLM:
    return copy.deepcopy(llama)


def make_rows() -> Dataset:
    """32 rows whose completions repeat the prompt's first words: something that can be learnt."""
    draw = random.Random(0)
    prompts = [[f"w{draw.randrange(97)}" for _ in range(5)] for _ in range(32)]
    return Dataset.from_list(
        [{"prompt": " ".join(words), "completion": " " + " ".join(words[:2] * 2)} for words in prompts]
    )


tokenizer = pytest.fixture(scope="session", name="tokenizer")(make_tokenizer)
llama = pytest.fixture(scope="session", name="llama")(make_llama)
rows = pytest.fixture(scope="session", name="rows")(make_rows)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, llama, tokenizer) -> Path:
    """The tiny model as a folder, as the command line takes it."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lora_config(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | changes)


@pytest.fixture
def make_trainer(tmp_path, llama, tokenizer, rows):
    """Return a function that makes a trainer: keyword arguments are the configuration's, `model` and others aside."""

    def make(model=None, peft_config=None, train_dataset=rows, trainer_class=LoriSFTTrainer, **changes):
        arguments = {name: changes.pop(name) for name in ("callbacks", "eval_dataset") if name in changes}
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "task_name": "code",
            "learning_rate": 5e-3,
            "calibration_learning_rate": 5e-3,
            "max_steps": 4,
            "calibration_max_steps": 4,
            "per_device_train_batch_size": 4,
            "activation_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        if peft_config is None and model is None:
            peft_config = lora_config()
        return trainer_class(
            model if model is not None else copy.deepcopy(llama),
            LoriSFTConfig(**defaults | changes),
            train_dataset=train_dataset,
            processing_class=copy.deepcopy(tokenizer),
            peft_config=peft_config,
            **arguments,
        )

    return make


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory, model_folder, tokenizer, rows) -> Path:
    """A LoRI-S adapter trained on the tiny model and saved."""
    folder = tmp_path_factory.mktemp("adapter") / "code"
    config = LoriSFTConfig(
        output_dir=str(folder),
        task_name="code",
        learning_rate=5e-3,
        calibration_max_steps=4,
        max_steps=4,
        activation_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = LoriSFTTrainer(
        str(model_folder), config, train_dataset=rows, processing_class=tokenizer, peft_config=lora_config()
    )
    trainer.train()
    trainer.save_model()
    return folder
