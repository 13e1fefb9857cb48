"""`lori dpo`, `kto`, `grpo`, `rloo` and `reward`: each trains, continues an adapter, and says what is wrong."""

import json
import re
import sys

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lori_trl import LoriMasks
from lori_trl.adapter.record import read_record
from lori_trl.cli import main

PAIRS = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i} w3", "rejected": f" w{i + 2} w9"} for i in range(8)]
ROWS = {
    "dpo": PAIRS,
    "kto": [{"prompt": f"w{i}", "completion": f" w{i} w3", "label": i % 2 == 0} for i in range(8)],
    "grpo": [{"prompt": f"w{i} w{i + 1}", "level": i} for i in range(8)],
    "rloo": [{"prompt": f"w{i} w{i + 1}", "level": i} for i in range(8)],
    "reward": [{**pair, "margin": 0.5} for pair in PAIRS],
}
REWARDED = ("grpo", "rloo")


@pytest.fixture
def call(tmp_path, model_folder, monkeypatch):
    """Return a function that makes a small call of a verb."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "my_rewards.py").write_text(
        "SEEN = []\n\n\ndef is_short(completions, level, **kwargs):\n"
        "    SEEN.extend(level)\n    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )
    recipe = {
        "sparsity": 0.8,
        "lora_r": 4,
        "max_steps": 2,
        "calibration_max_steps": 2,
        "learning_rate": 5.0e-3,
        "calibration_learning_rate": 5.0e-3,
        "per_device_train_batch_size": 4,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    of_rollouts = {"num_generations": 2, "max_completion_length": 4, "reward_funcs": ["my_rewards.is_short"]}

    def make(verb, *more, output="out"):
        own = of_rollouts if verb in REWARDED else {}
        (tmp_path / f"{verb}.yaml").write_text(yaml.safe_dump({"trainer": verb} | recipe | own))
        rows = tmp_path / f"{verb}_rows"
        rows.mkdir(exist_ok=True)
        (rows / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[verb]))
        options = {"recipe": f"{verb}.yaml", "model_name_or_path": model_folder, "dataset_path": rows}
        options["output_dir"] = tmp_path / output
        return [verb, *(str(word) for key, value in options.items() for word in (f"--{key}", value)), *more]

    return make


@pytest.mark.parametrize("verb", ROWS)
def test_each_trains_an_adapter_that_plain_peft_loads(verb, call, tmp_path, model_folder, capsys):
    assert main(call(verb)) == 0
    masks = LoriMasks.from_pretrained(tmp_path / "out")
    assert masks.task == f"{verb}_rows" and masks.num_selected == masks.numel // 5
    assert "saved to" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    if verb == "reward":
        base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert any(weight.any() for name, weight in loaded.named_parameters() if "lora_B" in name)
    as_run = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert as_run["trainer"] == verb and main(["recipes", "validate", str(tmp_path / "out" / "recipe.yaml")]) == 0


@pytest.mark.parametrize("verb", ["dpo", "kto", "grpo", "rloo"])
def test_each_continues_an_adapter_of_supervised_training(verb, call, tmp_path, adapter_folder):
    before = read_record(adapter_folder).history[0]
    assert main(call(verb, "--adapter_name_or_path", str(adapter_folder), "--disjoint_masks")) == 0
    record = read_record(tmp_path / "out")
    assert [task.task for task in record.history] == ["code", f"{verb}_rows"] and record.history[0] == before
    old, new = (LoriMasks.from_pretrained(tmp_path / "out", task=task) for task in ("code", f"{verb}_rows"))
    assert new.num_selected and not (old & new).num_selected


def test_a_reward_model_goes_on_and_rewards_answers(call, tmp_path, adapter_folder, capsys):
    fails(call("reward", "--adapter_name_or_path", str(adapter_folder)), capsys, "has a head", "--into-base")
    fails(call("reward", "--adapter_name_or_path", str(adapter_folder), "--dry_run"), capsys, "has a head")
    assert main(call("reward")) == 0
    again = call("reward", "--adapter_name_or_path", str(tmp_path / "out"), "--task_name", "two", output="again")
    assert main(again) == 0
    fails(call("dpo", "--adapter_name_or_path", str(tmp_path / "out"), output="dpo"), capsys, "task_type='SEQ_CLS'")
    more = ["--reward_model_name_or_path", str(tmp_path / "again"), "--save_strategy", "steps", "--save_steps", "2"]
    assert main(call("grpo", *more, "--logging_steps", "1", output="grpo")) == 0
    state = json.loads((tmp_path / "grpo" / "checkpoint-2" / "trainer_state.json").read_text())
    rewards = {name for entry in state["log_history"] for name in entry if re.fullmatch(r"rewards/.+/mean", name)}
    assert len(rewards) == 2 and "rewards/is_short/mean" in rewards


def test_columns_that_a_reward_function_asks_for_arrive(call):
    assert main(call("grpo")) == 0
    import my_rewards

    assert my_rewards.SEEN and set(my_rewards.SEEN) <= set(range(8))


@pytest.mark.parametrize("verb", ROWS)
def test_a_dry_run_looks_at_the_rows_and_writes_nothing(verb, call, tmp_path, capsys):
    assert main(call(verb, "--dry_run")) == 0
    shown = capsys.readouterr().out
    assert "this run is LoRI-S" in shown and "8 rows of " in shown and f"task: {verb}_rows" in shown
    assert ("answers to a prompt: 2" in shown) == (verb in REWARDED)
    assert not (tmp_path / "out").exists()


# ---- wrong calls ---------------------------------------------------------------------------------------------------


def fails(arguments, capsys, *parts):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "Traceback" not in error
    assert not [part for part in parts if part not in error], error


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("verb", "rows", "parts"),
    [
        ("dpo", ROWS["kto"], ["have the columns prompt, completion, label. Needed are prompt, chosen and rejected"]),
        ("kto", ROWS["dpo"], ["Needed are prompt, completion and label"]),
        ("grpo", [{"text": "w1"}], ["Needed are prompt, and what the reward functions ask for"]),
        ("rloo", [{"text": "w1"}], ["Needed are prompt, and what the reward functions ask for"]),
        ("reward", ROWS["grpo"], ["and, where it is known, margin"]),
        ("kto", [{**ROWS["kto"][0], "label": "good"}], ["Row 0 of", "has `label='good'`", "true or false"]),
        ("dpo", [PAIRS[0], {**PAIRS[1], "chosen": None}], ["Row 1 of", "has `chosen=None`"]),
        ("dpo", [{key: [{"role": "user", "content": "w1"}] for key in PAIRS[0]}], ["has no chat template"]),
    ],
)
def test_rows_of_another_kind_are_told_before_the_base_is_loaded(
    verb, rows, parts, more, call, tmp_path, monkeypatch, capsys
):
    def load_base_model(*_, **__):
        pytest.fail("the base was loaded")

    monkeypatch.setattr("lori_trl.training.base_model.load_base_model", load_base_model)
    arguments = call(verb, *more)
    if more and "no chat template" in parts[0]:
        pytest.skip("a dry run fetches no tokenizer")
    (tmp_path / f"{verb}_rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fails(arguments, capsys, f"lori {verb}: ", *parts)


@pytest.mark.parametrize(
    ("verb", "more", "parts"),
    [
        ("dpo", ["--packing"], ["`--packing` is no option", "`lori dpo --help_all` lists all"]),
        ("dpo", ["--preview", "1"], ["`preview=1` with `lori dpo`", "`--dry_run` looks at the rows"]),
        ("dpo", ["--recipe", "kto.yaml"], ["trainer='kto': it is for `lori kto`"]),
        ("dpo", ["--reward_funcs", "a.b"], ["`--reward_funcs` is no option"]),
        ("grpo", ["--reward_funcs", "my_rewards.nothing"], ["`reward_funcs=my_rewards.nothing` is no function"]),
        ("grpo", ["--reward_funcs", "nowhere.f", "--dry_run"], ["No module named 'nowhere'", "think_format_reward"]),
        ("grpo", ["--reward_funcs", "is_short"], ["and import paths, e.g. `my_rewards.is_short`"]),
        ("grpo", ["--reward_funcs", "my_rewards.SEEN"], ["it is a list"]),
        ("reward", ["--sparsity", "1.5"], ["`sparsity=1.5` is outside [0, 1)"]),
        ("kto", ["--beta", "text"], ["invalid float value: 'text'", "`lori kto --help_all`"]),
    ],
)
def test_wrong_calls_exit_with_2(verb, more, parts, call, capsys):
    call("kto")
    fails(call(verb, *more), capsys, *parts)


def test_without_a_reward_there_is_nothing_to_learn(call, tmp_path, capsys):
    arguments = call("grpo", "--dry_run")
    recipe = yaml.safe_load((tmp_path / "grpo.yaml").read_text())
    del recipe["reward_funcs"]
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(recipe))
    fails(arguments, capsys, "`reward_funcs` and `reward_model_name_or_path` are both missing", "Pass `--reward_funcs")


@pytest.mark.parametrize("verb", ROWS)
def test_help_and_completion_have_each_one_s_own_options(verb, capsys):
    assert main([verb, "--help_all"]) == 0
    shown = capsys.readouterr().out
    own = {"dpo": "--beta", "kto": "--desirable_weight", "grpo": "--reward_funcs", "rloo": "--num_generations"}
    assert own.get(verb, "--center_rewards_coefficient") in shown and "--packing " not in shown
    assert f"example:\n  lori {verb} " in shown
    with pytest.raises(SystemExit):
        main([verb, "--print_completion", "bash"])
    script = capsys.readouterr().out
    assert own.get(verb, "--center_rewards_coefficient") in script and "--packing " not in script
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"    {verb} " in capsys.readouterr().out


def test_code_that_a_recipe_brings_in_is_told(call, capsys):
    main(call("grpo", "--dry_run"))
    assert "reward_funcs=my_rewards.is_short: Python code" in capsys.readouterr().err
