"""The four tasks and their benchmarks: raw rows and prepared ones give the same prompts."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from recipes.rows import RAW, write

from lori_trl.evaluation.harness import benchmark_rows
from lori_trl.recipes.data import LoriScriptArguments, load_training_data
from lori_trl.recipes.find import shipped_folder
from lori_trl.recipes.tasks import BENCHMARKS, TASKS, load_benchmark


def test_the_papers_tasks_and_benchmarks():
    assert list(TASKS) == list(RAW) == ["nlu", "math", "code", "safety"]
    assert [len(task.benchmarks) for task in TASKS.values()] == [8, 1, 1, 1] and len(BENCHMARKS) == 11
    assert TASKS["math"].config == "main" and BENCHMARKS["hex_phi"].gated


# ---- benchmarks ----------------------------------------------------------------------------------------------------

HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": '\ndef one():\n    """ One. """\n',
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
}


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("boolq", RAW["nlu"][0], RAW["nlu"][1] | {"answer": "true", "choices": ["true", "false"]}),
        ("gsm8k", RAW["math"][0], RAW["math"][1] | {"answer": "4000"}),
        (
            "humaneval",
            HUMAN_EVAL,
            {
                "prompt": 'def one():\n    """ One. """',
                "raw_prompt": HUMAN_EVAL["prompt"],
                "completion": "\n    return 1",
                "test": HUMAN_EVAL["test"],
                "entry_point": "one",
            },
        ),
        (
            "hex_phi",
            {"instruction": "Do it."},
            {
                "prompt": "You are a helpful assistant. Always answer as helpfully as possible, while being safe.\n\n"
                "Human: Do it.\n\nAssistant:"
            },
        ),
    ],
)
def test_raw_benchmarks_carry_what_scoring_needs(name, raw, expected, tmp_path):
    path = write(tmp_path, "test.jsonl", [raw])
    row = load_benchmark(name, path)[0]
    assert {column: row[column] for column in expected} == expected
    assert load_benchmark(name, write(tmp_path, "again.json", [row]))["prompt"] == [expected["prompt"]]


def test_a_benchmark_in_a_folder_and_wrong_calls(tmp_path):
    write(tmp_path, "train.jsonl", [{"prompt": "train"}])
    with pytest.raises(ValueError, match="no benchmark. Allowed are boolq, piqa"):
        load_benchmark("mmlu")
    assert load_benchmark("boolq", str(tmp_path))[0] == {"prompt": "train"}
    write(tmp_path, "dev.jsonl", [{"prompt": "dev"}])
    with pytest.raises(ValueError, match="has dev, train. Allowed is a folder with boolq or test"):
        load_benchmark("boolq", str(tmp_path))
    write(tmp_path, "test.jsonl", [{"prompt": "test"}])
    assert load_benchmark("boolq", str(tmp_path))[0] == {"prompt": "test"}
    write(tmp_path, "boolq.jsonl", [{"prompt": "boolq"}])
    assert load_benchmark("boolq", str(tmp_path))[0] == {"prompt": "boolq"}
    with pytest.raises(ValueError, match="columns other. Allowed are the raw rows of boolq"):
        load_benchmark("boolq", write(tmp_path, "other.jsonl", [{"other": 1}]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "answer": "7"}, {"prompt": "b", "answer": 7}],
            r"Row 1 of `.*` has `answer=7`. Allowed is a str",
        ),
        ([RAW["math"][0], {"question": "a", "answer": "7"}], "Row 1 of .* has no `#### n` in `answer='7'`"),
        ([RAW["nlu"][0], {"instruction": "a", "output": None}], "Row 1 of .* has `output=None`. Allowed is text"),
    ],
)
def test_a_row_of_a_benchmark_that_is_not_like_the_others(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_benchmark("gsm8k", write(tmp_path, "test.jsonl", rows))


@pytest.mark.parametrize("header", [True, False])
def test_hex_phis_files_without_a_header_line(header, tmp_path, monkeypatch, caplog):
    """On the Hub they are one file, and one split, a category."""
    (tmp_path / "category_1.csv").write_text('"Do A, now"\nDo B\n')
    (tmp_path / "category_3.csv").write_text("Do C\nDo D\n")
    splits = [f"{{split: Category_{i}, path: category_{i}.csv}}" for i in (1, 3)]
    if header:
        (tmp_path / "README.md").write_text(
            f"---\nconfigs: [{{config_name: default, data_files: [{', '.join(splits)}]}}]\n---\n"
        )
    local = dataclasses.replace(BENCHMARKS["hex_phi"], source=str(tmp_path))
    monkeypatch.setitem(BENCHMARKS, "hex_phi", local)
    assert load_benchmark("hex_phi")["instruction"] == ["Do A, now", "Do B", "Do C", "Do D"]
    assert "has 4 rows; known are 300 and 330" in caplog.text


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["Do A, now", "Do B, now"], "'Do A' has a second field, ' now'"),
        (["Do A", "Do B, now"], "'Do B' has a second field, ' now'"),
        (["Do A", "Do B, now, please"], "Expected 2 fields"),
    ],
)
def test_half_an_instruction_is_refused(rows, says, tmp_path, monkeypatch):
    """A comma without quotes cuts a row in two, of which pandas would take the first for the row's name."""
    (tmp_path / "category_1.csv").write_text("Do X\nDo Y\n")
    (tmp_path / "category_3.csv").write_text("\n".join(rows) + "\n")
    local = dataclasses.replace(BENCHMARKS["hex_phi"], source=str(tmp_path))
    monkeypatch.setitem(BENCHMARKS, "hex_phi", local)
    with pytest.raises(ValueError, match=f"(?s)not whole: .*{says}.*Get the files anew"):
        load_benchmark("hex_phi")


# ---- the columns that the sources publish ---------------------------------------------------------------------------

COLUMNS = yaml.safe_load((Path(__file__).parents[1] / "fixtures" / "columns.yaml").read_text())


def data_of_recipes() -> set[str]:
    """The data sets that recipes name, but for the quickstart's own and the folders that baselines make of them."""
    recipes = [yaml.safe_load(file.read_text()) for file in shipped_folder("recipes").rglob("*.yaml")]
    named = {recipe.get("dataset_name") or recipe.get("dataset_path") for recipe in recipes}
    return {name for name in named if name and name.rpartition("/")[2] != "quickstart" and not name.endswith("-data")}


def test_every_source_has_its_columns_on_file():
    assert {task.source.rpartition("training/")[2] for task in TASKS.values()} == data_of_recipes()
    sources = {re.sub("/dataset/[^/]+/", "/dataset/{}/", benchmark.source) for benchmark in BENCHMARKS.values()}
    assert data_of_recipes() | sources == COLUMNS.keys()
    assert all(each["source"].startswith("https://") for each in COLUMNS.values())


@pytest.mark.parametrize("name", sorted(data_of_recipes()))
def test_the_columns_of_the_recipes_data_become_prompts_and_completions(name, tmp_path):
    file = write(tmp_path, "train.jsonl", [COLUMNS[name]["row"]])
    (row,) = load_training_data(LoriScriptArguments(dataset_path=file))["train"]
    assert row.keys() == {"prompt", "completion"} and all(row.values())


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=list(BENCHMARKS))
def test_the_columns_of_the_benchmarks_have_what_scoring_needs(benchmark, tmp_path):
    raw = COLUMNS[re.sub("/dataset/[^/]+/", "/dataset/{}/", benchmark.source)]["row"]
    file = write(tmp_path, "test.jsonl", [raw])
    assert len(benchmark_rows(benchmark.name, {benchmark.name: file}, None)["test"]) == 1
