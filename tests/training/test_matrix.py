"""What SFTTrainer's users do, one after the other: the same five invariants each time (see `invariants`)."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from invariants import check_run
from PIL import Image
from tiny import SMALL, lora_config, make_llama, make_rows, make_tokenizer, tiny_args
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    TrainerCallback,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from lori_trl import LoriSFTTrainer


def build(config_name: str, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{config_name}Config")(**SMALL | changes)
    return transformers.AutoModelForCausalLM.from_config(config)


class Experts(nn.Module):
    """A mixture of experts that are modules of linear layers: each token goes to the likelier of two."""

    def __init__(self, config, mlp):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, 2, bias=False)
        self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, x):
        shares, result = self.router(x).softmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = shares.argmax(-1) == number
            result[chosen] = expert(x[chosen]) * shares[chosen][:, number, None]
        return result


def mixture_of_experts():
    model = make_llama()
    for layer in model.model.layers:
        layer.mlp = Experts(model.config, layer.mlp)
    return model


MESSAGES = Dataset.from_list(
    [
        {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i} w3"}]}
        for i in range(16)
    ]
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}w90 {% generation %}{{ message['content'] }} "
    "</s>{% endgeneration %}{% else %}w91 {{ message['content'] }} {% endif %}{% endfor %}"
)


def format_row(row):
    return row["prompt"] + row["completion"]


class Meddler(TrainerCallback):
    """A callback that looks at everything: evaluates, copies the model, reads B and the state dict."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert not any("sparse_" in name for name in copy.deepcopy(model).state_dict())
        control.should_evaluate = args.eval_strategy != "no"


def meddled():
    eval_dataset = make_rows().select(range(4))
    return {"eval_dataset": eval_dataset, "callbacks": [Meddler(), EarlyStoppingCallback(1)]}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}

TOLERANCES = {"bfloat16 autocast": 0.01}  # of the logits: the trained model computes in bfloat16, plain PEFT does not

# name -> (fields of the config, fields of the LoraConfig, what else the trainer is made with)
CASES = {
    "plain": ({}, {}, {}),
    "streaming": ({}, {}, {"train_dataset": make_rows().to_iterable_dataset()}),
    "packing": ({"packing": True, "max_length": 32}, {}, {}),
    "padding-free": ({"padding_free": True, "max_length": None}, {}, {}),
    "assistant-only loss": ({"assistant_only_loss": True}, {}, {"train_dataset": MESSAGES}),
    "formatting function": (
        {"completion_only_loss": False},
        {},
        {"formatting_func": format_row},
    ),
    "callbacks": (EVALUATED | {"load_best_model_at_end": True, "metric_for_best_model": "loss"}, {}, meddled()),
    "compile": ({"torch_compile": True, "torch_compile_backend": "eager"}, {}, {}),
    "activation checkpointing": ({"activation_checkpointing": True}, {"lora_dropout": 0.1}, {}),
    "NEFTune": ({"neftune_noise_alpha": 5.0}, {}, {}),
    "bfloat16 autocast": ({"bf16": True}, {}, {}),
    "adafactor": ({"optim": "adafactor", "weight_decay": 0.1}, {}, {}),
    "8-bit AdamW": ({"optim": "adamw_8bit", "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}, {}, {}),
    "cosine": ({"lr_scheduler_type": "cosine", "warmup_steps": 0.5, "max_steps": 3}, {}, {}),
    "plateau": (EVALUATED | {"lr_scheduler_type": "reduce_lr_on_plateau"}, {}, {"eval_dataset": make_rows()}),
    "rank and alpha patterns": ({}, {"rank_pattern": {"q_proj": 2, "up_proj": 8}, "alpha_pattern": {"v_proj": 3}}, {}),
    "rsLoRA": ({"sparse_backend": "hook"}, {"use_rslora": True, "lora_dropout": 0.1}, {}),
    "layer replication": ({}, {"layer_replication": [(0, 2), (1, 2)]}, {}),
    "some layers": ({"disjoint_masks": True}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}, {}),
    "tied embeddings": ({}, {}, {"model": build("Llama", tie_word_embeddings=True)}),
    "new tokens": ({}, {"trainable_token_indices": [5, 6]}, {"model": build("Llama", tie_word_embeddings=True)}),
    "a whole module": ({"weight_decay": 0.1, "sparse_backend": "hook"}, {"modules_to_save": ["lm_head"]}, {}),
    "Qwen2": ({}, {}, {"model": build("Qwen2")}),
    "Gemma 2": ({}, {}, {"model": build("Gemma2", head_dim=8)}),
    "Phi-3": ({}, {}, {"model": build("Phi3")}),
    "GPT-2": (
        {},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        {"model": build("GPT2", n_embd=32, n_head=4, n_layer=2)},
    ),
    "Mixtral's attention": (
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"model": build("Mixtral", num_local_experts=2)},
    ),
    "experts of linear layers": ({}, {}, {"model": mixture_of_experts()}),
}


MARKS = {"compile": pytest.mark.release}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in CASES])
def test_the_five_invariants(tmp_path, name):
    fields, lora, others = CASES[name]
    named = {"model": make_llama(), "train_dataset": make_rows(), **others}
    base, tokenizer = copy.deepcopy(named["model"]), make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    args = tiny_args(tmp_path / "out", **{"max_steps": 2, "calibration_max_steps": 2, "learning_rate": 1e-2} | fields)
    trainer = LoriSFTTrainer(args=args, peft_config=lora_config(**lora), processing_class=tokenizer, **named)
    check_run(trainer, base, tolerance=TOLERANCES.get(name, 0.0))
    assert not name.startswith("experts") or any("experts.1" in path for path in trainer.masks)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is not installed")
def test_liger(tmp_path):
    args = tiny_args(tmp_path / "out", max_steps=2, calibration_max_steps=2, use_liger_kernel=True)
    trainer = LoriSFTTrainer(
        make_llama(), args, None, make_rows(), processing_class=make_tokenizer(), peft_config=lora_config()
    )
    check_run(trainer, make_llama())


# ---- vision-language models ----------------------------------------------------------------------------------------

SPECIAL = ["<pad>", "</s>", "<unk>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
IMAGE_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} </s> {% endfor %}"
)


def make_processor() -> Idefics3Processor:
    vocabulary = [*SPECIAL, *(f"w{i}" for i in range(80))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
    )
    size = {"longest_edge": 28}
    images = Idefics3ImageProcessorPil(do_image_splitting=False, size=size, max_image_size=size)
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IMAGE_TEMPLATE)


def make_smolvlm() -> SmolVLMForConditionalGeneration:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SmolVLMConfig(
        text_config=SMALL | {"model_type": "llama"},
        vision_config=vision | {"image_size": 28, "patch_size": 7},
        scale_factor=2,
        image_token_id=SPECIAL.index("<image>"),
        pad_token_id=0,
    )
    return SmolVLMForConditionalGeneration(config)


def image_rows() -> Dataset:
    draw = np.random.default_rng(0)
    return Dataset.from_list(
        [
            {
                "images": [Image.fromarray(draw.integers(0, 255, (28, 28, 3), dtype=np.uint8))],
                "prompt": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"w{i} w3"}]},
                ],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": f"w{i} w5"}]}],
            }
            for i in range(8)
        ]
    )


@pytest.mark.parametrize(
    ("modules", "parts"),
    [
        (None, {"text_model"}),
        ("all-linear", {"text_model", "vision_model", "connector"}),
        (["out_proj"], {"vision_model"}),
    ],
)
def test_a_vision_language_model(tmp_path, modules, parts):
    rows = image_rows()
    trainer = LoriSFTTrainer(
        make_smolvlm(),
        tiny_args(
            tmp_path / "out",
            max_steps=2,
            calibration_max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            max_length=None,
        ),
        train_dataset=rows,
        processing_class=make_processor(),
        peft_config=lora_config(target_modules=modules),
    )
    batch = trainer.data_collator([rows[0], rows[1]])
    check_run(trainer, make_smolvlm(), inputs={name: value for name, value in batch.items() if name != "labels"})
    assert {path.split(".")[1] for path in trainer.masks} == parts
