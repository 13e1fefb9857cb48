"""One tiny Llama, tokenizer, data set and adapter for all tests: no network, no downloads."""

import functools
import random
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from lori_trl import LoriSFTConfig, LoriSFTTrainer

# Of the models of most architectures.
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL = SIZES | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}  # as of the tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(97)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="</s>"
    )


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """A chat template that knows three roles, w3 the user, w4 the assistant and w5 the system, and refuses others."""
    tokenizer = make_tokenizer()
    roles = "{% set roles = {'user': 'w3', 'assistant': 'w4', 'system': 'w5'} %}"
    unknown = "{% if m['role'] not in roles %}{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    message = "{{ roles[m['role']] }} {{ m['content'] }} </s> "
    tokenizer.chat_template = f"{roles}{{% for m in messages %}}{unknown}{message}{{% endfor %}}"
    tokenizer.chat_template += "{% if add_generation_prompt %}w4{% endif %}"
    return tokenizer


def make_llama() -> LlamaForCausalLM:
    """The same weights every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def make_rows() -> Dataset:
    """32 rows whose completions repeat the prompt's first words: something that can be learnt."""
    draw = random.Random(0)
    prompts = [[f"w{draw.randrange(97)}" for _ in range(5)] for _ in range(32)]
    return Dataset.from_list(
        [{"prompt": " ".join(words), "completion": " " + " ".join(words[:2] * 2)} for words in prompts]
    )


def lora_config(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | changes)


def tiny_args(output_dir: str | Path, **changes) -> LoriSFTConfig:
    """A run of seconds: four steps a phase, on the CPU, that writes only what is asked for."""
    defaults = {
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
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return LoriSFTConfig(str(output_dir), **defaults | changes)


def make_trainer(
    output_dir: str | Path,
    model=None,
    *,
    peft_config=None,
    train_dataset: Dataset | None = None,
    callbacks=None,
    eval_dataset=None,
    trainer_class: type = LoriSFTTrainer,
    processing_class=None,
    **changes,
) -> LoriSFTTrainer:
    """
    A trainer on the tiny data.

    Args:
        model: the tiny Llama with a fresh adapter where neither this nor `peft_config` is given.
        **changes: of [`tiny_args`].
    """
    if model is None:
        model, peft_config = make_llama(), peft_config or lora_config()
    return trainer_class(
        model,
        tiny_args(output_dir, **changes),
        train_dataset=make_rows() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class or make_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


@functools.cache
def model_folder() -> Path:
    """The tiny model as a folder, as the command line takes it. Copy it before changing anything."""
    folder = Path(tempfile.mkdtemp(prefix="lori-")) / "tiny-llama"
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def trained_adapter() -> Path:
    """The folder of a trained LoRI-S adapter of that model. Copy it before changing anything."""
    folder = Path(tempfile.mkdtemp(prefix="lori-")) / "code-lori-s"
    trainer = make_trainer(folder, str(model_folder()), peft_config=lora_config())
    trainer.recipe = {"task_name": "code", "sparsity": 0.9}
    trainer.train()
    trainer.save_model()
    return folder


class RecordingTrainer(LoriSFTTrainer):
    """Keeps the batches of each phase."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = {"calibrating": [], "adapting": []}

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches[self.phase].append({key: value.clone() for key, value in inputs.items()})
        return super().training_step(model, inputs, num_items_in_batch)


class Stop(TrainerCallback):
    """Interrupt a phase after its second step, once."""

    def __init__(self, phase):
        self.phase = phase

    def on_step_end(self, args, state, control, **kwargs):
        phase = "calibrating" if args.output_dir.endswith("calibration") else "adapting"
        if phase == self.phase and state.global_step == 2:
            self.phase = None
            raise KeyboardInterrupt


def needs(package: str, version: str, why: str) -> pytest.MarkDecorator:
    """Skip a test where a package is older than what it needs."""
    there = metadata.version(package)
    return pytest.mark.skipif(Version(there) < Version(version), reason=f"needs {package} {version}: {why}")
