"""The four tasks: raw rows and prepared ones give the same prompts; only completions bear loss; the EOS stays."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import needs

from lori_trl.evaluation.harness import benchmark_rows
from lori_trl.recipes import tasks
from lori_trl.recipes.find import shipped_folder
from lori_trl.recipes.tasks import (
    BENCHMARKS,
    TASKS,
    LoriScriptArguments,
    kept_positions,
    load_benchmark,
    load_training_data,
)

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
BOOLQ = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"
RAW = {
    "nlu": (
        {"instruction": BOOLQ, "input": "", "output": "the correct answer is true", "answer": "true"},
        {"prompt": ALPACA.format(BOOLQ), "completion": "the correct answer is true"},
    ),
    "math": (
        {"question": "Two and two?", "answer": "It is <<2+2=4>>4, thousandfold.\n#### 4,000"},
        {
            "prompt": "Two and two?\nAnswer the above question. First think step by step and then answer the final "
            "number.\n",
            "completion": "It is <<2+2=4>>4, thousandfold.\nThe final answer is: 4,000",
        },
    ),
    "code": (
        {"instruction": "Sort the list.", "input": "[2, 1]", "output": "[1, 2]"},
        {
            "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n### Instruction:\nSort the list."
            "\n\n### Input:\n[2, 1]\n\n### Response:\n",
            "completion": "[1, 2]",
        },
    ),
    "safety": (
        {"instruction": "Say hello.", "input": None, "output": "Hello."},
        {"prompt": ALPACA.format("Say hello."), "completion": "Hello."},
    ),
}


def write(folder, name, rows):
    file = folder / name
    file.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)) + "\n")
    return str(file)


def test_the_papers_tasks_and_benchmarks():
    assert list(TASKS) == list(RAW) == ["nlu", "math", "code", "safety"]
    assert [len(task.benchmarks) for task in TASKS.values()] == [8, 1, 1, 1] and len(BENCHMARKS) == 11
    assert TASKS["math"].config == "main" and BENCHMARKS["hex_phi"].gated


@pytest.mark.parametrize("task", RAW)
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_raw_rows_become_prompt_completion_rows(task, name, tmp_path):
    raw, expected = RAW[task]
    for path in (write(tmp_path, name, [raw, raw]), str(tmp_path)):
        data = load_training_data(LoriScriptArguments(dataset_path=path))
        assert data["train"][:] == {column: [text] * 2 for column, text in expected.items()}
    prepared = write(tmp_path, "prepared.jsonl", [expected | {"answer": "x", "id": 1}])
    assert load_training_data(LoriScriptArguments(dataset_path=prepared))["train"][0] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_names_and_streams(streaming, monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        rows = Dataset.from_list([RAW["math"][0]])
        return {"train": rows.to_iterable_dataset() if options["streaming"] else rows}

    monkeypatch.setattr("lori_trl.recipes.tasks.load_dataset", load_dataset)
    task = TASKS["math"]
    arguments = LoriScriptArguments(dataset_name=task.source, dataset_config=task.config, dataset_streaming=streaming)
    assert next(iter(load_training_data(arguments)["train"])) == RAW["math"][1]
    assert asked == [("openai/gsm8k", {"name": "main", "streaming": streaming})]


@pytest.mark.parametrize(
    ("row", "text_field"),
    [
        ({"text": "w1"}, "text"),
        ({"content": "w1", "text": "w2"}, "content"),
        ({"messages": [{"role": "user", "content": "w1"}]}, "text"),
        ({"conversations": [{"from": "human", "value": "w1"}], "tools": "[]"}, "text"),
        ({"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w2"}]}, ""),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "text"),
    ],
)
def test_trls_formats_stay_as_they_are(row, text_field, tmp_path):
    path = write(tmp_path, "own.jsonl", [row | {"id": 3}])
    assert load_training_data(LoriScriptArguments(dataset_path=path), text_field)["train"][0] == row


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}], "have the columns question, answer. Allowed are TRL's formats"),
        pytest.param(
            [{"instruction": "a", "output": "b"}, {"instruction": "a"}],
            "`output=None`, where text is needed",
            marks=needs("datasets", "4.8", "reads rows of which some lack a key"),
        ),
        ([{"question": "a", "answer": "#### 1"}, {"question": "a", "answer": "1"}], "has no `#### n`"),
    ],
)
def test_what_is_not_understood_is_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_training_data(LoriScriptArguments(dataset_path=write(tmp_path, "own.jsonl", rows)))


def test_rows_without_a_key_are_read_or_refused_by_the_version_s_name(tmp_path, monkeypatch):
    """As datasets 4.7 does it."""

    def load_dataset(*args, **kwargs):
        raise KeyError("output")

    monkeypatch.setattr(tasks, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"rows without the key 'output', which datasets below 4\.8 can't read"):
        load_training_data(LoriScriptArguments(dataset_path=write(tmp_path, "own.jsonl", [{"a": 1}])))


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
    return {name for name in named if name and name != "quickstart" and not name.endswith("-data")}


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


# ---- truncation ----------------------------------------------------------------------------------------------------

BOS, EOS = 1, 2


@given(prompt=st.integers(0, 30), completion=st.integers(1, 30), max_length=st.integers(2, 40), bos=st.booleans())
def test_the_prompts_end_and_the_eos_always_stay(prompt, completion, max_length, bos):
    ids = [BOS if bos and i == 0 else 10 + i for i in range(prompt)] + [100 + i for i in range(completion - 1)] + [EOS]
    positions = kept_positions(ids, prompt, max_length, BOS, EOS)
    kept = [ids[position] for position in positions]
    assert len(kept) == min(len(ids), max_length) and positions == sorted(set(positions))
    assert kept[-1] == EOS
    assert not prompt or prompt - 1 in positions
    if bos and prompt and sum(position < prompt for position in positions) > 1:
        assert kept[0] == BOS
    in_prompt = sum(position < prompt for position in positions)
    assert in_prompt >= min(prompt, max_length // 2) and len(kept) - in_prompt >= min(completion, max_length // 2)


def test_truncation_by_token_ids():
    prompt, completion = [BOS, 11, 12, 13, 14, 15], [21, 22, 23, 24, 25, EOS]

    def cut(max_length, ids=prompt + completion):
        return [ids[position] for position in kept_positions(ids, 6, max_length, BOS, EOS)]

    assert cut(12) == prompt + completion
    assert cut(10) == [BOS, 12, 13, 14, 15, 21, 22, 23, 24, EOS]
    assert cut(11) == [BOS, 12, 13, 14, 15] + completion
    assert cut(8) == [BOS, 13, 14, 15, 21, 22, 23, EOS]
    assert cut(8, prompt + completion[:3] + [EOS]) == [BOS, 13, 14, 15, 21, 22, 23, EOS]
    assert cut(5, prompt + [EOS]) == [BOS, 13, 14, 15, EOS]
    assert cut(8, prompt + completion[:5] + [EOS, 99]) == [BOS, 13, 14, 15, 21, 22, EOS, 99]  # a chat's line end


def test_the_trainer_truncates_so_and_only_completions_bear_loss(make_trainer, tokenizer):
    words = [f"w{i}" for i in range(20)]
    rows = Dataset.from_list(
        [
            {"prompt": " ".join(words[:3]), "completion": " w30 w31"},
            {"prompt": " ".join(words), "completion": " w30 w31"},
            {"prompt": " ".join(words), "completion": " " + " ".join(words)},
            {"prompt": " ".join(words[:3]), "completion": " " + " ".join(words)},
        ]
    )
    trained = make_trainer(train_dataset=rows, eval_dataset=rows, max_length=10)
    eos = tokenizer.eos_token_id
    for data in (trained.train_dataset, trained.eval_dataset):
        tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in data["input_ids"]]
        end = "</s>"
        assert tokens[0] == ["w0", "w1", "w2", "w30", "w31", end]
        assert tokens[1] == [*words[-7:], "w30", "w31", end]
        assert tokens[2] == [*words[-5:], *words[:4], end]
        assert tokens[3] == [*words[:3], *words[:6], end]
        for ids, labels, prompt_length in zip(data["input_ids"], data["labels"], (3, 7, 5, 3), strict=True):
            assert labels == [-100] * prompt_length + ids[prompt_length:] and labels[-1] == eos
    everything = make_trainer(train_dataset=rows, max_length=10, completion_only_loss=False).train_dataset
    assert everything["labels"] == everything["input_ids"] == trained.train_dataset["input_ids"]


def test_trls_own_truncation_is_still_there(make_trainer, tokenizer):
    rows = Dataset.from_list([{"prompt": "w0 w1 w2", "completion": " w3 w4 w5"}])
    kept = make_trainer(train_dataset=rows, max_length=4, truncation_mode="keep_start").train_dataset["input_ids"]
    assert tokenizer.decode(kept[0]) == "w0 w1 w2 w3"
    text = Dataset.from_list([{"text": "w0 w1 w2 w3 w4"}])
    kept = make_trainer(train_dataset=text, max_length=4).train_dataset["input_ids"]
    assert tokenizer.decode(kept[0]) == "w0 w1 w2 w3"
