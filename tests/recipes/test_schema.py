"""The recipes' schema: as new as the classes, true of every shipped recipe, and strict."""

import json

import jsonschema
import pytest
import yaml
from tiny import needs

from lori_trl.cli.merge import recipe_parser
from lori_trl.cli.training_options import training_parser
from lori_trl.cli.training_verbs import VERBS
from lori_trl.recipes.find import list_recipes, shipped_folder, validate_recipe
from lori_trl.recipes.schema import recipe_schema

SHIPPED = json.loads((shipped_folder("recipes") / "recipe.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft7Validator(SHIPPED)


@needs("trl", "1.16", "its fields and transformers 5.23's are in the schema")
@needs("transformers", "5.23", "as above")
def test_the_shipped_schema_is_current():
    parsers = {name: training_parser(verb) for name, verb in VERBS.items()}
    made = json.loads(json.dumps(recipe_schema(parsers, recipe_parser())))
    assert made == SHIPPED, "run `lori recipes schema > recipes/recipe.schema.json`"


def test_every_shipped_recipe_fits_and_names_it():
    jsonschema.Draft7Validator.check_schema(SHIPPED)
    assert len(list_recipes()) == 81
    for file in list_recipes():
        text = file.read_text(encoding="utf-8")
        VALIDATOR.validate(yaml.safe_load(text))
        named = text.partition("\n")[0].removeprefix("# yaml-language-server: $schema=")
        assert (file.parent / named).resolve() == (shipped_folder("recipes") / "recipe.schema.json").resolve()


@pytest.mark.parametrize(
    "text",
    [
        "learnig_rate: 1.0e-4",
        "sparsity: high",
        "sparsity: 1.0",
        "max_steps: 0",
        "calibration_method: guess",
        "lora_r: [1, 2]",
        "calibration_sparsities: [0.5, 2.0]",
        "lora_target_modules: []",
        "env: {A: [1]}",
        "dataset_name: some/data\ndataset_path: data.jsonl",
        "load_in_4bit: true\nload_in_8bit: true",
        "adapters: [a]\nmethod: mix",
        "adapters: [a]\nsparsity: 0.9",
    ],
)
def test_what_validate_refuses_does_not_fit(text, tmp_path):
    assert not VALIDATOR.is_valid(yaml.safe_load(text))
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match="fault"):
        validate_recipe(tmp_path / "recipe.yaml", recipe_parser() if "adapters" in text else training_parser())


@pytest.mark.parametrize(
    "text",
    [
        "max_steps: -1",
        "max_steps: 5",
        "sparsity: 0",
        "lora_target_modules: all-linear",
        "report_to: [tensorboard, trackio]",
        "model_init_kwargs: {attn_implementation: sdpa}",
        "env: {OMP_NUM_THREADS: 1}",
        "load_in_4bit: true\nload_in_8bit: false",
    ],
)
def test_what_is_valid_fits(text, tmp_path):
    assert VALIDATOR.is_valid(yaml.safe_load(text))
    (tmp_path / "recipe.yaml").write_text(text)
    assert validate_recipe(tmp_path / "recipe.yaml", training_parser())
