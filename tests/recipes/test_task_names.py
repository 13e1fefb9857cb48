"""Data that are different have names that are different, and every system takes them for a file's."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_trl.adapter.layout import check_task_name
from lori_trl.recipes.task_names import file_name_of, name_of_dataset, name_of_path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("math/train.jsonl", "math"),
        ("math/data/test.csv", "math"),
        ("math/train-00000-of-00002.parquet", "math"),
        ("math/hard.jsonl", "math-hard"),
        ("code/hard.jsonl", "code-hard"),
        ("math/math.jsonl", "math"),
        ("math/data/hard.jsonl", "math-hard"),
        ("math/v1.2/train.jsonl", "math-v1.2"),
        ("math/v1.jsonl", "math-v1"),
        ("math/my data (v2).jsonl", "math-my-data-v2"),
    ],
)
def test_files(path, name, tmp_path):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text("")
    assert name_of_path(file) == name


def test_folders(tmp_path):
    for folder, name in {
        "math/v1.2": "math-v1.2",
        "math/v1.3": "math-v1.3",
        "math/data": "math",
        "math": "math",
    }.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        assert name_of_path(tmp_path / folder) == name
    assert name_of_path(tmp_path / "math", "easy") == "math-easy"


def test_the_home_folder_is_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / "alpaca.json").write_text("")
    assert tmp_path.name not in name_of_path(tmp_path / "alpaca.json")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (("openai/gsm8k", "main", "train"), "gsm8k"),
        (("allenai/ai2_arc", "ARC-Easy", "train"), "ai2_arc-ARC-Easy"),
        (("me/data", None, "train"), "me"),
        (("me/x", "default", "code"), "x-code"),
    ],
)
def test_data_sets(given, name):
    assert name_of_dataset(*given) == name


def test_what_is_lost_is_told_apart_by_a_checksum():
    names = [file_name_of(text) for text in ("数学", "代码", "数学-v1", "代码-v1", "x" * 96, "x" * 97, "x" * 98)]
    assert len(set(names)) == len(names) and names[4] == "x" * 96
    assert [name_of_dataset(f"data/{split}") for split in ("train", "test")] != ["data"] * 2


@given(st.text())
def test_every_name_can_be_a_files(text):
    check_task_name(file_name_of(text, "x"))
