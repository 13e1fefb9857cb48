"""Recipes: found, checked with all their faults at once, and true to the paper."""

import gc
import importlib
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.scripts.sft import main as trl_sft
from trl.scripts.sft import make_parser as trl_parser

from lori_trl import LoriMasks
from lori_trl.cli import sft
from lori_trl.cli.training_options import training_parser
from lori_trl.recipes.find import find_recipe, list_recipes, read_recipe, shipped_folder, validate_recipe
from lori_trl.recipes.tasks import TASKS
from lori_trl.training.compat import CheckpointingFields

# Merge recipes have a schema of their own, and their own tests.
ALL = {file.stem: file for file in shipped_folder("recipes").rglob("*.yaml") if file.parent.name != "merge"}
LLAMA_3, MISTRAL = "meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.1"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EPOCHS = {"nlu": 1, "math": 3, "code": 2, "safety": 1}
# Tables 4 to 7: task, base, rank -> (alpha, learning rate) of LoRI-D and of LoRI-S. The rest is the same for all.
PAPER = {
    ("nlu", LLAMA_3, 32): ((64, 5e-5), (64, 5e-4)),
    ("nlu", LLAMA_3, 64): ((128, 5e-5), (128, 1e-4)),
    ("nlu", MISTRAL, 32): ((64, 1e-5), (64, 1e-4)),
    ("nlu", MISTRAL, 64): ((128, 1e-5), (128, 1e-4)),
    ("math", LLAMA_3, 32): ((64, 5e-5), (64, 5e-4)),
    ("math", LLAMA_3, 64): ((128, 5e-5), (128, 1e-3)),
    ("math", MISTRAL, 32): ((64, 5e-5), (64, 5e-4)),
    ("math", MISTRAL, 64): ((32, 1e-4), (64, 5e-4)),
    ("code", LLAMA_3, 32): ((64, 5e-5), (64, 5e-4)),
    ("code", LLAMA_3, 64): ((128, 1e-5), (128, 1e-4)),
    ("code", MISTRAL, 32): ((64, 5e-5), (64, 5e-4)),
    ("code", MISTRAL, 64): ((128, 1e-5), (128, 1e-4)),
    ("safety", LLAMA_3, 32): ((64, 5e-5), (64, 5e-4)),
    ("safety", LLAMA_3, 64): ((128, 1e-5), (128, 1e-4)),
    ("safety", MISTRAL, 32): ((64, 5e-5), (64, 5e-4)),
    ("safety", MISTRAL, 64): ((128, 1e-5), (128, 1e-4)),
}
SINGLE = [(*setting, variant) for setting in PAPER for variant in "ds"]
CONTINUAL = [f"continual_safety_{task}_lori_{variant}" for task in ("nlu", "math", "code") for variant in "ds"]
LORAF = ["loraf_math", "loraf_nlu"]
BASELINES = [f"{task}_{method}" for task in TASKS for method in ("lora", "dora", "fft")]
QUICKSTARTS = ["quickstart", "quickstart_lora"]


def stem(task, base, rank, variant):
    return f"{task}_lori_{variant}{'_mistral' * (base == MISTRAL)}{'_r64' * (rank == 64)}"


def settings(task, base, rank, variant):
    """Return what the paper says a recipe must hold."""
    dense, sparse = PAPER[task, base, rank]
    alpha, learning_rate = sparse if variant == "s" else dense
    expected = {"model_name_or_path": base, "lora_r": rank, "lora_alpha": alpha, "learning_rate": learning_rate}
    if variant == "s":
        return expected | {"sparsity": 0.9, "calibration_learning_rate": dense[1]}
    return expected | {"sparsity": 0.0, "calibration_learning_rate": None}


def check(recipe, expected, task):
    assert {key: recipe.get(key) for key in expected} == expected
    assert recipe["num_train_epochs"] == EPOCHS[task] and recipe["max_length"] == 512
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 32
    assert (recipe["lr_scheduler_type"], recipe["warmup_steps"]) == ("constant", 0)
    assert (recipe["weight_decay"], recipe["max_grad_norm"]) == (0.0, 1.0)
    if "lora_r" in recipe:
        assert recipe["lora_dropout"] == 0.05 and recipe["lora_target_modules"] == TARGETS


def check_data(recipe, task):
    source = TASKS[task].source
    if source.startswith("https://"):
        assert recipe["dataset_path"] == source.rpartition("/")[2] and "dataset_name" not in recipe
    else:
        assert recipe["dataset_name"] == source and recipe.get("dataset_config") == TASKS[task].config


def test_every_recipe_is_counted_and_listed():
    single = {stem(*setting) for setting in SINGLE}
    assert (len(single), len(CONTINUAL), len(LORAF), len(BASELINES)) == (32, 6, 2, 12)
    assert set(ALL) == single | {*CONTINUAL, *LORAF, *BASELINES, *QUICKSTARTS}
    assert {*ALL.values()} <= {*list_recipes()}
    assert {file.stem for file in ALL.values() if file.parent.name == "baselines"} == {*BASELINES, "quickstart_lora"}


@pytest.mark.parametrize("name", sorted(ALL))
def test_recipe_is_valid_and_says_what_it_is(name):
    file = ALL[name]
    validate_recipe(file, training_parser())
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    schema = header[0].removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / schema).resolve() == shipped_folder("recipes") / "recipe.schema.json"
    assert header[1].startswith("# ") and len(header[1]) > 20
    assert any(line.startswith("# Needs:") for line in header)
    is_trls = ALL[name].parent.name == "baselines"
    program = "trl sft --config" if is_trls else "lori-sft --recipe"
    commands = [line.partition(program)[2] for line in header if line.startswith(("# Run:", "# Override:"))]
    assert len(commands) == (1 if is_trls else 2)
    assert all(command.startswith(f" {name}.yaml ") for command in commands)
    if name not in QUICKSTARTS:
        assert any(line.startswith("# Reproduces:") for line in header)


@pytest.mark.parametrize("setting", SINGLE, ids=lambda setting: stem(*setting))
def test_single_task_recipes_are_tables_4_to_7(setting):
    task = setting[0]
    recipe = read_recipe(ALL[stem(*setting)])
    check(recipe, {"task_name": task, "dtype": "bfloat16"} | settings(*setting), task)
    check_data(recipe, task)
    assert f"# Reproduces: paper Table {4 + list(EPOCHS).index(task)} (settings)" in ALL[stem(*setting)].read_text()


@pytest.mark.parametrize("name", CONTINUAL)
def test_continual_recipes_are_the_single_tasks_on_a_safety_adapter(name):
    task, variant = re.match(r"continual_safety_(\w+)_lori_(.)", name).groups()
    expected = settings(task, LLAMA_3, 32, variant)
    for kept_from_the_adapter in ("lora_r", "lora_alpha"):
        del expected[kept_from_the_adapter]
    recipe = read_recipe(ALL[name])
    check(recipe, {"task_name": task} | expected, task)
    check_data(recipe, task)
    assert not {"lora_r", "lora_alpha", "disjoint_masks"} & set(recipe)


@pytest.mark.parametrize(("task", "alpha", "learning_rate"), [("nlu", 128, 1e-4), ("math", 64, 5e-4)])
def test_loraf_recipes_are_its_table_2(task, alpha, learning_rate):
    recipe = read_recipe(ALL[f"loraf_{task}"])
    expected = {"task_name": task, "model_name_or_path": MISTRAL, "lora_r": 64, "lora_alpha": alpha}
    expected |= {"learning_rate": learning_rate, "sparsity": 0.9, "disjoint_masks": True}
    check(recipe, expected, task)
    check_data(recipe, task)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_the_settings_of_lori_d(name):
    """The header's overrides turn each into the other base and rank; all of them are read by TRL's own parser."""
    task, method = name.split("_")
    lines = dict(re.findall(r"^# (Mistral-7B|r = 64|both): +(--.+)$", ALL[name].read_text(), flags=re.MULTILINE))
    bases = {"": (LLAMA_3, 32), "Mistral-7B": (MISTRAL, 32), "r = 64": (LLAMA_3, 64), "both": (MISTRAL, 64)}
    assert set(lines) == {"fft": {"Mistral-7B"}}.get(method, {"Mistral-7B", "r = 64", "both"})
    for label in ("", *lines):
        expected = settings(task, *bases[label], "d")
        arguments = ["--config", str(ALL[name]), "--output_dir", "out", "--bf16", "False"]
        script, training, model, _ = trl_parser().parse_args_and_config(
            [*arguments, *shlex.split(lines.get(label, ""))]
        )
        assert (script.dataset_name, model.model_name_or_path) == (f"{task}-data", expected["model_name_or_path"])
        assert training.learning_rate == expected["learning_rate"] and model.use_dora == (method == "dora")
        assert model.use_peft == (method != "fft")
        if model.use_peft:
            assert (model.lora_r, model.lora_alpha) == (expected["lora_r"], expected["lora_alpha"])
    assert {"lora_r", "lora_alpha"} & set(read_recipe(ALL[name])) == (
        set() if method == "fft" else {"lora_r", "lora_alpha"}
    )
    check(read_recipe(ALL[name]), {}, task)


# ---- two steps of each ---------------------------------------------------------------------------------------------

RAW = {
    "nlu": {
        "instruction": "w1 w2? Answer format: true/false",
        "output": "the correct answer is true",
        "answer": "true",
    },
    "math": {"question": "w1 w2", "answer": "w3 w4\n#### 5"},
    "code": {"instruction": "w1 w2", "input": "w3", "output": "w4 w5"},
    "safety": {"instruction": "w1 w2", "input": "", "output": "w3 w4"},
}
# For TRL's own script, too: transformers below 5.23 has the old name alone.
CHECKPOINTING = "gradient_checkpointing" if fields(CheckpointingFields) else "activation_checkpointing"
SHORT = "--dtype float32 --bf16 False --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
SHORT += f" --{CHECKPOINTING} False --dataloader_pin_memory False --save_strategy no --report_to none"
SHORT += " --disable_tqdm True"


@pytest.fixture(scope="module")
def driven(tmp_path_factory, model_folder):
    """Return a function that drives a recipe for two steps on four raw rows, once, and returns its output folder."""
    top = tmp_path_factory.mktemp("driven")
    for task, row in RAW.items():
        (top / f"{task}.jsonl").write_text((json.dumps(row) + "\n") * 4)

    def drive(name, *more, to=None):
        output = top / (to or name)
        if not output.exists():
            task = read_recipe(ALL[name])["task_name"]
            options = ["--model_name_or_path", str(model_folder), "--dataset_path", str(top / f"{task}.jsonl")]
            options += ["--output_dir", str(output), *SHORT.split(), *more]
            assert sft(["--recipe", name, *options]) == 0
        return output

    gc.freeze()  # each run's end collects garbage: without this, over everything that was imported, for half a second
    yield drive
    gc.unfreeze()


def check_run(output, name, rank, alpha):
    recipe = read_recipe(ALL[name])
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (rank, alpha, 0.05)
    assert sorted(adapter["target_modules"]) == sorted(TARGETS)
    run = json.loads((output / "lori_config.json").read_text())
    assert (run["task"], run["sparsity"]) == (recipe["task_name"], recipe["sparsity"])
    masks = LoriMasks.from_pretrained(output)
    assert len(masks) == 14
    if recipe["sparsity"] == 0:
        assert masks.density == 1 and run["calibration"] is None
    else:
        assert run["calibration"]["learning_rate"] == recipe["calibration_learning_rate"]
        if recipe.get("mask_granularity", "model") == "model":
            assert masks.num_selected == masks.numel // 10
        else:
            assert all(mask.sum() == mask.numel() // 10 for mask in masks.values())
    return masks


@pytest.mark.parametrize("setting", SINGLE, ids=lambda setting: stem(*setting))
def test_single_task_recipes_run(setting, driven):
    expected = settings(*setting)
    check_run(driven(stem(*setting)), stem(*setting), expected["lora_r"], expected["lora_alpha"])


@pytest.mark.parametrize("name", CONTINUAL)
def test_continual_recipes_run(name, driven):
    start = driven(f"safety_lori_{name[-1]}")
    output = driven(name, "--adapter_name_or_path", str(start))
    check_run(output, name, 32, 64)
    assert [task["task"] for task in json.loads((output / "lori_config.json").read_text())["tasks"]][0] == "safety"


def test_continual_learning_on_a_given_mask_as_the_header_says(driven):
    """Safety and code trained on one A: the code mask fits, and entries outside it keep their safety values."""
    same = ("--projection_seed", "7")
    safety, code = driven("safety_lori_s", *same, to="safety"), driven("code_lori_s", *same, to="code")
    given = ("--adapter_name_or_path", str(safety), "--mask_name_or_path", str(code))
    output = driven("continual_safety_code_lori_s", *given, to="safety-code")
    runs = [json.loads((folder / "lori_config.json").read_text()) for folder in (safety, code, output)]
    assert len({run["projection"]["fingerprint"] for run in runs}) == 1
    mask = LoriMasks.from_pretrained(output, task="code")
    assert mask == LoriMasks.from_pretrained(code)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (safety, output))
    moved = 0
    for path, selected in mask.items():
        key = f"base_model.model.{path}.lora_B.weight"
        changed = before[key] != after[key]
        assert not changed[~selected].any()
        moved += changed.sum()
    assert moved > 0


def test_loraf_recipes_run_one_after_the_other(driven):
    math = check_run(driven("loraf_math"), "loraf_math", 64, 64)
    continued = driven("loraf_nlu", "--adapter_name_or_path", str(driven("loraf_math")))
    nlu = check_run(continued, "loraf_nlu", 64, 64)
    assert (math & nlu).num_selected == 0


def test_calibrating_with_another_alpha_as_the_header_says(driven, monkeypatch):
    """Table 5 has LoRI-D at alpha 32 and LoRI-S at alpha 64 for Mistral-7B, r = 64."""
    name = "math_lori_s_mistral_r64"
    text = ALL[name].read_text().replace("\\\n#", "")
    commands = [shlex.split(line) for line in re.findall(r"^#   lori-sft (.+)$", text, flags=re.MULTILINE)]
    (mask, *alpha), (adapter, *masked) = ([command[3], *command[4:]] for command in commands)
    monkeypatch.chdir(driven(name).parent)
    first, second = driven(name, *alpha, to=mask), driven(name, *masked, to=adapter)
    assert json.loads((first / "adapter_config.json").read_text())["lora_alpha"] == 32
    assert json.loads((first / "lori_config.json").read_text())["calibration"]["steps"] == 3 * 2
    assert json.loads((second / "adapter_config.json").read_text())["lora_alpha"] == 64
    assert json.loads((second / "lori_config.json").read_text())["calibration"] is None
    assert LoriMasks.from_pretrained(first) == LoriMasks.from_pretrained(second)


def test_the_quickstart_of_lora_is_that_of_lori_but_for_its_rate():
    lora, lori = (read_recipe(ALL[name]) for name in reversed(QUICKSTARTS))
    assert lori["learning_rate"] == 10 * lora["learning_rate"]
    differ = {"learning_rate", "dataset_name", "output_dir", "use_peft"}
    assert {key: lora[key] for key in lora.keys() - differ} == {key: lori[key] for key in lora.keys() - differ}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_run_with_trls_script(name, tmp_path, model_folder, monkeypatch):
    task, method = name.split("_")
    monkeypatch.chdir(tmp_path)
    Path("raw.jsonl").write_text((json.dumps(RAW[task]) + "\n") * 4)
    lines = re.findall(r"^# {17}((?:from|rows).+)$", ALL[name].read_text(), flags=re.MULTILINE)
    assert len(lines) == 3
    exec(re.sub(r"LoriScriptArguments\(.+?\)", "LoriScriptArguments(dataset_path='raw.jsonl')", "\n".join(lines)), {})
    arguments = ["--config", str(ALL[name]), "--model_name_or_path", str(model_folder), "--output_dir", "out"]
    trl_sft(*trl_parser().parse_args_and_config([*arguments, *SHORT.split()]))
    if method == "fft":
        AutoModelForCausalLM.from_pretrained("out")
        return
    config = AutoPeftModelForCausalLM.from_pretrained("out").peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_dora) == (32, 64, method == "dora")
    assert config.target_modules == set(TARGETS)


def test_trls_command_line_takes_the_full_fine_tunings_launch(tmp_path, monkeypatch):
    (line,) = re.findall(r"^# Run: +trl (.+)$", ALL["code_fft"].read_text().replace("\\\n# ", ""), flags=re.MULTILINE)
    launched = {}
    launcher = importlib.import_module("trl.cli.accelerate_launcher")
    monkeypatch.setattr(launcher, "launch_training_script", lambda **options: launched.update(options))
    monkeypatch.chdir(ALL["code_fft"].parent)
    assert importlib.import_module("trl.cli.main").main([*line.split(), "--bf16", "False"]) == 0
    assert launched["launch_args"][0] == "--config_file" and launched["launch_args"][1].endswith("fsdp2.yaml")
    assert launched["launch_args"][2:] == ["--num_processes", "8"]
    assert "--per_device_train_batch_size" in launched["training_script_args"]


# ---- finding and checking ------------------------------------------------------------------------------------------


def test_names_with_and_without_yaml_and_paths(tmp_path):
    assert find_recipe("quickstart") == find_recipe("quickstart.yaml")
    own = tmp_path / "quickstart.yaml"
    own.write_text("task_name: mine")
    assert find_recipe(str(own)) == own
    with pytest.raises(FileNotFoundError, match=r"code_lori_x.*Near it are code_lori_"):
        find_recipe("code_lori_x.yaml")


def test_all_faults_come_in_one_error(tmp_path):
    file = tmp_path / "faulty.yaml"
    recipe = {
        "learnig_rate": 1e-4,
        "sparsity": "a lot",
        "max_steps": 1.5,
        "projection_init": "orthogonal",
        "eval_strategy": False,  # what YAML makes of a bare `no`
        "task_name": 5,
        "lora_r": [1, 2],
        "bf16": "maybe",
        "warmup_steps": 0,
        "model_init_kwargs": {"attn_implementation": "sdpa"},
        "env": {"OMP_NUM_THREADS": 1},
        "lora_alpha": None,
        "lora_target_modules": ["q_proj"],
        "report_to": ["tensorboard"],
    }
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="has 8 faults") as error:
        validate_recipe(file, training_parser())
    message = str(error.value)
    assert str(file) in message
    for part in (
        "learnig_rate: no such field (did you mean learning_rate?)",
        "sparsity='a lot': not a valid float",
        "max_steps=1.5: not a valid int",
        "projection_init='orthogonal': allowed are gaussian, kaiming_uniform",
        "eval_strategy=False: allowed are no, steps, epoch",
        "task_name=5: a int, where text is needed: put it in quotes",
        "lora_r=[1, 2]: a list is not allowed here",
        "bf16='maybe': not a valid bool",
    ):
        assert part in message, part


def test_all_kinds_of_faults_come_in_one_error(tmp_path):
    """Five faults of five kinds: a name, a type, a range, a repeated key, a contradiction."""
    file = tmp_path / "faulty.yaml"
    file.write_text(
        "learnig_rate: 1.0e-4\n"
        "max_steps: many\n"
        "sparsity: 1.5\n"
        "lora_r: 32\n"
        "dataset_name: some/data\n"
        "dataset_path: data.jsonl\n"
        "lora_r: 64\n"
    )
    with pytest.raises(ValueError, match="has 5 faults") as error:
        validate_recipe(file, training_parser())
    for part in (
        "learnig_rate: no such field (did you mean learning_rate?)",
        "max_steps='many': not a valid int",
        "sparsity=1.5: outside [0, 1)",
        "lora_r: in lines 4, 7. Keep one",
        "dataset_name='some/data', dataset_path='data.jsonl': they exclude each other. Keep one",
    ):
        assert part in str(error.value), part


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("calibration_fraction: 0", "outside (0, 1]"),
        ("calibration_fraction: 1", None),
        ("sparsity: 0", None),
        ("sparsity: .nan", "outside [0, 1)"),
        ("calibration_sparsities: [0.5, 1.0]", "outside [0, 1)"),
        ("learning_rate: -1.0e-4", "outside (0, inf)"),
        ("learning_rate: 5e-4", None),  # text, as YAML 1.1 reads it
        ("lora_r: 0", "outside [1, inf)"),
        ("lora_dropout: 1", "outside [0, 1)"),
        ("max_grad_norm: 0", None),
        ("truncation_mode: keep_middle", "allowed are keep_prompt_end, keep_start, keep_end"),
        ("1: 2", "1: no such field"),
        ("load_in_4bit: true\nload_in_8bit: true", "exclude each other"),
        ("load_in_4bit: true\nload_in_8bit: false", None),
    ],
)
def test_ranges(line, fault, tmp_path):
    (tmp_path / "one.yaml").write_text(line)
    if fault is None:
        assert validate_recipe(tmp_path / "one.yaml", training_parser())
        return
    with pytest.raises(ValueError, match="has 1 fault:") as error:
        validate_recipe(tmp_path / "one.yaml", training_parser())
    assert fault in str(error.value)


@pytest.mark.parametrize("content", ["- a\n- b", "a: [1", "text", "\x00"])
def test_what_is_no_recipe_is_refused(content, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match="A recipe is lines of `key: value`"):
        read_recipe(file)
