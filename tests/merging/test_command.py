"""`lori merge`: the recipes, the options, the errors."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from merging.adapters import write_adapter

from lori_trl import merge_lori_adapters
from lori_trl.cli import main
from lori_trl.cli.merge import recipe_parser
from lori_trl.merging import METHODS
from lori_trl.recipes.find import find_recipe, read_recipe, shipped_folder

RECIPES = sorted(shipped_folder("recipes").glob("merge/*.yaml"))
# Tables 8 to 10: table -> adapters, weight of LoRA and LoRI-D, weight of LoRI-S.
TABLES = {8: (4, 0.4, 0.3), 9: (4, 0.4, 0.3), 10: (3, 0.5, 0.4)}
DENSITIES = {"magnitude": 0.3, "ties": 0.7, "dare": 0.7}


def test_the_recipes_are_the_papers_27_merges():
    methods = {
        "lora": ["concat", "linear", *DENSITIES],
        "lori_d": ["concat", "linear"],
        "lori_s": ["concat", "linear"],
    }
    rows = [(table, variant, method) for table in TABLES for variant in methods for method in methods[variant]]
    assert len(rows) == 27 and {file.stem for file in RECIPES} == {f"table{t}_{v}_{m}" for t, v, m in rows}
    for table, variant, method in rows:
        count, dense, sparse = TABLES[table]
        suffix = variant.replace("_", "-") + "-mistral" * (table == 9)
        assert read_recipe(find_recipe(f"table{table}_{variant}_{method}")) == {
            "adapters": [f"{task}-{suffix}" for task in ("nlu", "math", "code", "safety")[:count]],
            "weights": sparse if variant == "lori_s" else dense,
            "method": "linear_peft" if method == "linear" else method,  # the authors' code merged by PEFT's
            **({"density": DENSITIES[method]} if method in DENSITIES else {}),
            **({"seed": 0} if method == "dare" else {}),
        }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_runs_as_its_header_says(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    runs = [shlex.split(line.partition(":")[2]) for line in header if line.startswith(("# Run:", "# Override:"))]
    assert [run[:4] for run in runs] == [["lori", "merge", "--recipe", file.name]] * 2
    recipe = read_recipe(file)
    for seed, name in enumerate(recipe["adapters"]):
        write_adapter(tmp_path / name, seed)
    for run, weight in zip(runs, (recipe["weights"], 0.25), strict=True):
        assert main(run[1:]) == 0
        merge = json.loads(Path("merged", "lori_config.json").read_text())["merge"]
        assert [adapter["weight"] for adapter in merge["adapters"]] == [weight] * len(recipe["adapters"])
        assert merge["method"] == recipe["method"] and merge.get("density") == recipe.get("density")
        shutil.rmtree("merged")
    assert main(["recipes", "validate", str(file)]) == 0


def test_the_command_line_merges_as_python_does(tmp_path, capsys):
    adapters = [str(write_adapter(tmp_path / str(seed), seed)) for seed in range(2)]
    merge_lori_adapters(adapters, [0.5, -0.2], "ties", tmp_path / "python", density=0.5)
    options = ["--weights", "0.5", "-0.2", "--method", "ties", "--density", "0.5"]
    assert main(["merge", *adapters, *options, "--output_dir", str(tmp_path / "command")]) == 0
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("python", "command"))
    assert first.read_bytes() == second.read_bytes()
    assert "-0.2" in capsys.readouterr().out


def test_the_command_line_knows_every_method():
    choices = next(action.choices for action in recipe_parser()._actions if action.dest == "method")
    assert choices == list(METHODS)


def test_bad_input_on_the_command_line_is_one_message(tmp_path, capsys):
    adapter = str(write_adapter(tmp_path / "a"))
    out = ["--output_dir", str(tmp_path / "merged")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"adapters: [{adapter}]\nwieghts: 0.5\ndensity: 2\nmethod: tie\n")
    for arguments, says in (
        ([adapter, "--weights", "0.5", "0.5"], "are 2 for 1 adapters"),
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([], "is no list of adapters"),
        (["--recipe", str(recipe)], "has 3 faults"),
        (["--recipe", "table8_lori_s_concat"], "`nlu-lori-s` does not exist"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(["merge", *arguments, *out])
        error = capsys.readouterr().err
        assert raised.value.code == 2 and says in error and "Traceback" not in error
        assert not (tmp_path / "merged").exists()
