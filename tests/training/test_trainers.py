"""The pairs for TRL's other trainers: the five invariants with each, and what is each one's own."""

import copy

import pytest
import torch
from datasets import Dataset
from invariants import check_run
from peft import PeftModel
from tiny import lora_config, make_tokenizer, needs
from transformers import LlamaForSequenceClassification

import lori_trl
from lori_trl import (
    LoriDPOConfig,
    LoriDPOTrainer,
    LoriGRPOConfig,
    LoriGRPOTrainer,
    LoriKTOConfig,
    LoriKTOTrainer,
    LoriRewardConfig,
    LoriRewardTrainer,
    LoriRLOOConfig,
    LoriRLOOTrainer,
)
from lori_trl.training import compat

PAIRS = {
    "DPO": (LoriDPOConfig, LoriDPOTrainer),
    "KTO": (LoriKTOConfig, LoriKTOTrainer),
    "GRPO": (LoriGRPOConfig, LoriGRPOTrainer),
    "RLOO": (LoriRLOOConfig, LoriRLOOTrainer),
    "Reward": (LoriRewardConfig, LoriRewardTrainer),
}
PREFERENCES = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i} w3", "rejected": f" w{i + 2} w9"} for i in range(16)]
RATINGS = [{"prompt": f"w{i}", "completion": f" w{i % 5} w3", "label": i % 3 > 0} for i in range(16)]
ROWS = {
    "DPO": PREFERENCES,
    "KTO": RATINGS,
    "GRPO": [{"prompt": row["prompt"]} for row in PREFERENCES],
    "RLOO": [{"prompt": row["prompt"]} for row in PREFERENCES],
    "Reward": [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PREFERENCES
    ],
}


PEFT = {"Reward": {"task_type": "SEQ_CLS"}}


def reward_short_words(completions, **kwargs):
    """Prefers small tokens, so that groups differ."""
    return [sum(len(word) for word in text.split()) / 10 for text in completions]


def make(name, model, output_dir, **changes):
    config_class, trainer_class = PAIRS[name]
    defaults = {
        "task_name": "task",
        "learning_rate": 5e-2,
        "calibration_learning_rate": 5e-3,
        "max_steps": 2,
        "calibration_max_steps": 2,
        "per_device_train_batch_size": 4,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if name in ("GRPO", "RLOO"):
        defaults |= {"num_generations": 4, "max_completion_length": 4, "temperature": 1.0}
    named = {"reward_funcs": reward_short_words} if name in ("GRPO", "RLOO") else {}
    return trainer_class(
        model,
        args=config_class(str(output_dir), **defaults | changes),
        train_dataset=Dataset.from_list(ROWS[name]),
        processing_class=make_tokenizer(),
        peft_config=None if isinstance(model, PeftModel) else lora_config(**PEFT.get(name, {})),
        **named,
    )


@pytest.fixture(scope="session")
def classifier(llama):
    torch.manual_seed(1)
    config = copy.deepcopy(llama.config)
    config.num_labels = 1
    return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DPO", {}),
        pytest.param(
            *("DPO", {"precompute_ref_log_probs": True, "calibration_fraction": 0.5}),
            marks=needs("trl", "1.9", "1.8 looks for rows in memory in a file that it has not written"),
        ),
        ("KTO", {}),
        ("GRPO", {"steps_per_generation": 4, "max_steps": 3, "beta": 0.1}),
        ("RLOO", {"steps_per_generation": 4, "max_steps": 3}),
        ("Reward", {}),
    ],
)
def test_the_five_invariants(llama, classifier, tmp_path, name, changes):
    base = classifier if name == "Reward" else llama
    trainer = make(name, copy.deepcopy(base), tmp_path / "out", **changes)
    check_run(trainer, copy.deepcopy(base))
    if name == "Reward":
        assert any("score" in name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_a_4bit_base_keeps_the_adapter_in_float32(llama, classifier, tmp_path, name):
    base = copy.deepcopy(classifier if name == "Reward" else llama)
    base.is_loaded_in_4bit = True  # TRL asks for no more before it casts what is trained
    trainer = make(name, base, tmp_path)
    trained = [each for each in trainer.model.parameters() if each.requires_grad]
    A = [layer.lora_A["default"].weight for layer in trainer.lora_layers.values()]
    assert {each.dtype for each in (*trained, *A)} == {torch.float32}
    if name == "Reward":
        assert torch.equal(trainer.model.base_model.model.score.modules_to_save["default"].weight, base.score.weight)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_rollouts_that_would_round_the_adapter_are_refused(llama, tmp_path, name):
    """TRL casts the whole model, A and B with it, in place before each generation."""
    with pytest.raises(ValueError, match="would be cast to bfloat16 at each generation, A and B with it"):
        make(name, llama, tmp_path, use_transformers_continuous_batching=True, bf16=True)


def test_what_trl_1_8_cannot_do_is_refused_by_its_name(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "1.8.0")
    with pytest.raises(ValueError, match=r"`precompute_ref_log_probs=True` with rows in memory needs TRL 1\.9"):
        make("DPO", llama, tmp_path, precompute_ref_log_probs=True)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_no_phase_learns_from_the_other_s_completions(llama, tmp_path, name):
    """`steps_per_generation` and `num_iterations` keep completions for several steps."""
    trainer = make(
        name, copy.deepcopy(llama), tmp_path, steps_per_generation=4, num_iterations=2, calibration_max_steps=3
    )
    generated = []
    generate = trainer._generate_and_score_completions

    def watched(inputs):
        generated.append((trainer.phase, trainer.state.global_step))
        return generate(inputs)

    trainer._generate_and_score_completions = watched
    trainer.train()
    assert generated == [("calibrating", 0), ("adapting", 0)]


def test_grpo_s_entropy_control_begins_anew_in_the_adaptation(llama, tmp_path):
    control = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.05}
    trainer = make("GRPO", copy.deepcopy(llama), tmp_path, **control)
    trainer.calibrate()
    assert trainer.entropy_coef == 0.1
    coefficients = [entry["calibration_entropy_coef"] for entry in trainer.state.log_history[:2]]
    assert coefficients[1] != 0.1  # the calibration did move it


def test_dpo_on_an_adapter_that_is_continued_keeps_a_frozen_reference(llama, tmp_path):
    first = make("DPO", copy.deepcopy(llama), tmp_path / "first")
    first.train()
    before = {path: weight.detach().clone() for path, weight in first.weights.items()}
    second = make("DPO", first.model, tmp_path / "second", task_name="next")
    second.train()
    for path, layer in second.lora_layers.items():
        assert torch.equal(layer.lora_B["ref"].weight, before[path])
        mask = second.masks[path]
        assert torch.equal(layer.lora_B["default"].weight[~mask], before[path][~mask])


@pytest.mark.parametrize("name", PAIRS)
def test_defaults_and_order_of_arguments(name, tmp_path):
    config_class, trainer_class = PAIRS[name]
    args = config_class(str(tmp_path))
    assert args.lr_scheduler_type == "constant" and args.bf16 is torch.accelerator.is_available()
    assert args.learning_rate == pytest.approx(10 * args.calibration_learning_rate)
    assert trainer_class.config_class is config_class
    assert {f"Lori{name}Config", f"Lori{name}Trainer"} <= set(lori_trl.__all__)
