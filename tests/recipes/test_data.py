"""One's own data become rows that TRL trains on; a row that is none is named by its number."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from recipes.rows import RAW, write

from lori_trl.recipes.data import LoriScriptArguments, default_task_name, load_training_data
from lori_trl.recipes.tasks import TASKS

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def rows_of(path, text_field="text"):
    return load_training_data(LoriScriptArguments(dataset_path=str(path)), text_field)["train"]


@pytest.mark.parametrize("task", RAW)
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_raw_rows_become_prompt_completion_rows(task, name, tmp_path):
    raw, expected = RAW[task]
    for path in (write(tmp_path, name, [raw, raw]), tmp_path):
        assert rows_of(path)[:] == {column: [text] * 2 for column, text in expected.items()}
    prepared = write(tmp_path, "prepared.jsonl", [expected | {"answer": "x", "id": 1}])
    assert rows_of(prepared)[0] == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("raw", "expected"), [RAW["math"], ({"conversations": [{"from": "human", "value": "hi"}]}, {"messages": TALK[:1]})]
)
def test_hub_names_and_streams(streaming, raw, expected, monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        rows = Dataset.from_list([raw])
        return {"train": rows.to_iterable_dataset() if options["streaming"] else rows}

    monkeypatch.setattr("lori_trl.recipes.data.load_dataset", load_dataset)
    task = TASKS["math"]
    arguments = LoriScriptArguments(dataset_name=task.source, dataset_config=task.config, dataset_streaming=streaming)
    assert next(iter(load_training_data(arguments)["train"])) == expected
    assert asked == [("openai/gsm8k", {"name": "main", "streaming": streaming})]


def test_a_data_set_out_of_reach_says_what_to_do(monkeypatch):
    def out_of_reach(*_, **__):
        raise ConnectionError("Couldn't reach 'me/talk' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("lori_trl.recipes.data.load_dataset", out_of_reach)
    with pytest.raises(ConnectionError, match=r"`dataset_name=me/talk` is out of reach: Couldn't .* `--dataset_path`"):
        load_training_data(LoriScriptArguments(dataset_name="me/talk"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_a_data_set_on_the_hub_that_is_none(streaming, monkeypatch):
    rows = Dataset.from_list([{"messages": TALK}, {"messages": []}])
    data = {"train": rows.to_iterable_dataset() if streaming else rows}
    monkeypatch.setattr("lori_trl.recipes.data.load_dataset", lambda *_, **__: data)
    with pytest.raises(ValueError, match=r"Row 1 of `me/talk` has `messages=\[\]`"):
        load_training_data(LoriScriptArguments(dataset_name="me/talk", dataset_streaming=streaming))


@pytest.mark.parametrize(
    ("row", "text_field", "expected"),
    [
        ({"text": "w1"}, "text", None),
        ({"content": "w1", "text": "w2"}, "content", {"content": "w1"}),
        ({"messages": TALK}, "text", None),
        (
            {"messages": TALK, "tools": "[]", "chat_template_kwargs": None},
            "",
            {"tools": [], "chat_template_kwargs": {}},
        ),
        ({"messages": TALK, "prompt": "hi", "text": "hi yo"}, "text", {"messages": TALK}),
        ({"prompt": "hi", "completion": "yo", "messages": TALK, "text": "hi yo"}, "text", {"prompt": "hi"}),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, "", None),
        ({"conversations": TALK}, "text", {"messages": TALK}),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "text", None),
        ({"messages": [*TALK, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]}, "text", None),
    ],
)
def test_trls_formats_stay_and_one_of_several_is_taken(row, text_field, expected, tmp_path):
    (taken,) = rows_of(write(tmp_path, "own.jsonl", [row | {"id": 3}]), text_field)
    assert taken == row if expected is None else expected.items() <= taken.items()
    assert len(set(taken) & {"prompt", "messages", "text", "content"}) == (0 if "input_ids" in row else 1)


def test_sharegpts_speakers_become_roles(tmp_path):
    said = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "gpt", "value": "a", "weight": 1},
    ]
    roles = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for column in ("conversations", "messages"):
        (row,) = rows_of(write(tmp_path, "sharegpt.jsonl", [{column: said}]))
        assert row == {"messages": [*roles, {"role": "assistant", "content": "a", "weight": 1}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"conversations": said}]), tmp_path / "s.parquet")
    assert [each["role"] for each in rows_of(tmp_path / "s.parquet")[0]["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}], "have the columns question, answer. Allowed are TRL's formats"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "have the columns prompt, chosen, rejected"),
        ([{"prompt": "a", "messages": None}], "Row 0 of `own.jsonl` has `messages=None`"),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a"}], "Row 1 .* has `output=None`. Allowed is text"),
        ([{"question": "a", "answer": "#### 1"}, {"question": "a", "answer": "1"}], "Row 1 .* has no `#### n`"),
        ([{"prompt": "a", "completion": "7"}, {"prompt": "a", "completion": 7}], "Row 1 .* has `completion=7`"),
        ([{"prompt": "a", "completion": TALK[1:]}], "Row 0 .* has text in `prompt` and messages in `completion`"),
        ([{"prompt": TALK, "completion": TALK}, {"prompt": "a", "completion": "b"}], "Row 1 .* has text where row 0"),
        ([{"messages": TALK}, {"messages": []}], r"Row 1 .* has `messages=\[\]`. Allowed is text, or a list of"),
        ([{"messages": TALK}, {"messages": [{"content": "a"}]}], "Row 1 .* has `messages="),
        ([{"messages": [{"role": "user", "content": None}]}], "Row 0 .* has `messages="),
        (
            [{"conversations": [{"from": "narrator", "value": "a"}]}],
            "Row 0 .* has a message from 'narrator'. Allowed is",
        ),
        ([{"text": "a"}, {"text": "\ud83d"}], r"Row 1 .* has half a character, \\ud83d, in `text`"),
    ],
)
def test_what_is_not_understood_is_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        rows_of(write(tmp_path, "own.jsonl", rows))


def test_other_columns_may_hold_anything(tmp_path):
    rows = [{"text": "a", "id": 1, "meta": {}}, {"text": "b", "id": "x", "meta": [None]}]
    assert rows_of(write(tmp_path, "own.jsonl", rows))[:] == {"text": ["a", "b"]}


def test_a_file_that_was_changed_is_read_again(tmp_path):
    assert rows_of(write(tmp_path, "own.jsonl", [{"text": "a"}]))["text"] == ["a"]
    assert rows_of(write(tmp_path, "own.jsonl", [{"text": "other"}]))["text"] == ["other"]


def test_only_the_splits_that_are_needed_are_read(tmp_path):
    write(tmp_path, "train.jsonl", [{"text": "a"}])
    (tmp_path / "old.jsonl").write_text("no rows")
    folder = LoriScriptArguments(dataset_path=str(tmp_path))
    assert list(load_training_data(folder)) == ["train"]
    with pytest.raises(ValueError, match="`dataset_test_split='test'` is not in `.*`, which has old, train"):
        load_training_data(folder, evaluated=True)
    (tmp_path / "test.csv").write_text("text\nb\n")
    assert load_training_data(folder, evaluated=True)["test"]["text"] == ["b"]


def test_parts_of_a_split_are_read_together_and_a_row_is_one_of_its_part(tmp_path):
    for number, rows in enumerate(([{"text": "a"}], [{"text": "b"}, {"text": "c"}])):
        write(tmp_path, f"train-0000{number}-of-00002.jsonl", rows)
    assert rows_of(tmp_path)["text"] == ["a", "b", "c"]
    write(tmp_path, "train-00001-of-00002.jsonl", [{"text": "b"}, {"text": 1}])
    with pytest.raises(ValueError, match="Row 1 of `train-00001-of-00002.jsonl` has `text=1`"):
        rows_of(tmp_path)


def test_the_default_name_of_a_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "math").mkdir()
    write(tmp_path / "math", "train.jsonl", [])
    (tmp_path / "recipe.yaml").write_text("")
    for path in ("math/train.jsonl", str(tmp_path / "math" / "train.jsonl"), "math", "./math/../math"):
        assert default_task_name(LoriScriptArguments(dataset_path=path)) == "math"
    monkeypatch.chdir(tmp_path / "math")
    beside = LoriScriptArguments(dataset_path="math", recipe=str(tmp_path / "recipe.yaml"))
    assert default_task_name(beside) == "math"
    names = [
        default_task_name(LoriScriptArguments(dataset_name="allenai/ai2_arc", dataset_config=config))
        for config in ("ARC-Easy", "ARC-Challenge")
    ]
    assert names == ["ai2_arc-ARC-Easy", "ai2_arc-ARC-Challenge"]
    assert default_task_name(LoriScriptArguments(dataset_name="me/x", dataset_train_split="code")) == "x-code"
    assert default_task_name(LoriScriptArguments(dataset_name=str(tmp_path / "math"))) == "math"


def test_lines_of_ten_thousand_rows_keep_their_order(tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(10_000)))
    assert rows_of(tmp_path / "own.jsonl")["text"] == [str(n) for n in range(10_000)]
