"""Recipes: found, checked with all their faults at once, and true to the paper."""

import pytest
import yaml
from conftest import lora_config  # noqa: F401  (puts this folder on the path for all tests alike)

from lori_trl.cli import _sft_parser
from lori_trl.recipes import find_recipe, list_recipes, read_recipe, shipped_folder, validate_recipe

ALL = sorted(shipped_folder("recipes").rglob("*.yaml"))


def test_every_recipe_is_listed():
    assert len(ALL) == 4 and {file.name for file in list_recipes()} == {file.name for file in ALL}


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.stem)
def test_recipe_is_valid_and_says_what_it_is(file):
    validate_recipe(file, _sft_parser())
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert header[0].startswith("# ") and len(header[0]) > 20
    assert any(f"lori-sft --recipe {file.name} " in line for line in header)
    assert read_recipe(file)["task_name"]


@pytest.mark.parametrize(
    ("name", "learning_rate", "sparsity", "calibration"),
    [("code_lori_s", 5e-4, 0.9, 5e-5), ("code_lori_d", 5e-5, 0.0, None)],
)
def test_code_recipes_carry_table_6(name, learning_rate, sparsity, calibration):
    recipe = read_recipe(find_recipe(name))
    assert recipe["learning_rate"] == learning_rate and recipe["sparsity"] == sparsity
    assert recipe.get("calibration_learning_rate") == calibration
    assert (recipe["lora_r"], recipe["lora_alpha"], recipe["lora_dropout"]) == (32, 64, 0.05)
    assert recipe["num_train_epochs"] == 2 and recipe["warmup_steps"] == 0
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 32
    assert len(recipe["lora_target_modules"]) == 7 and recipe["lr_scheduler_type"] == "constant"


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
        validate_recipe(file, _sft_parser())
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


@pytest.mark.parametrize("content", ["- a\n- b", "a: [1", "text", "\x00"])
def test_what_is_no_recipe_is_refused(content, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match="A recipe is lines of `key: value`"):
        read_recipe(file)
