"""Files of rows: the one that was named is read, as what it is, and a fault names it."""

import codecs
import json

import pyarrow
import pyarrow.parquet
import pytest

from lori_trl.recipes.data_files import read_rows, split_files

ROWS = [{"prompt": "a", "completion": "7"}, {"prompt": "b", "completion": 7, "id": 1}, {"prompt": None}]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "name", ["run[12].jsonl", "what?.jsonl", "part*.jsonl", "[v2] data/train.jsonl", "a::b.jsonl"]
)
def test_a_path_is_no_pattern(name, tmp_path):
    for other in ("run1.jsonl", "whatX.jsonl", "part_old.jsonl"):
        (tmp_path / other).write_text(lines([{"prompt": "other"}]))
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(lines([{"prompt": "mine"}]))
    assert split_files(str(file)) == {"train": [file]}
    assert list(read_rows(file)) == [{"prompt": "mine"}]
    if file.parent != tmp_path:
        assert split_files(str(file.parent)) == {"train": [file]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl", "\n" + lines(ROWS).replace("\n", "\r\n\r\n")),
        ("a.json", lines(ROWS)),
        ("a.json", " \n" + json.dumps(ROWS, indent=2)),
    ],
)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_json_in_its_forms_keeps_every_value(name, text, mark, tmp_path):
    (tmp_path / name).write_bytes(mark + text.encode())
    assert list(read_rows(tmp_path / name)) == ROWS


def test_every_value_of_a_csv_is_text(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(codecs.BOM_UTF8 + 'prompt,completion\n"a, ""b""\nc",7\né,NA\n'.encode())
    assert list(read_rows(file)) == [{"prompt": 'a, "b"\nc', "completion": "7"}, {"prompt": "é", "completion": "NA"}]


def test_a_parquet_file(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}], "n": number} for number in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == rows


def test_a_folder_has_a_file_a_split_or_parts_that_are_numbered(tmp_path):
    names = ["test.csv", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "notes.txt"]
    for name in names:
        (tmp_path / name).write_text("")
    splits = {split: [file.name for file in files] for split, files in split_files(str(tmp_path)).items()}
    assert splits == {"test": names[:1], "train": names[1:3]}
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(ValueError, match="has test.csv, test.jsonl for the split 'test'. A split is one file"):
        split_files(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), "is not UTF-8: it has byte 0xe9"),
        ("a.csv", "prompt\né\n".encode("latin-1"), "is not UTF-8: it has byte 0xe9"),
        ("a.json", '[{"prompt": "é"}]'.encode("latin-1"), "is not UTF-8: it has byte 0xe9"),
        ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "is not UTF-8: it has a zero byte, as UTF-16 has"),
        ("a.csv", "prompt\na\n".encode("utf-16-le"), "is not UTF-8: .* `iconv -f LATIN1"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": "a"\n', "is unreadable: line 3: JSONDecodeError"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', "is unreadable: row 1 is a list, no object"),
        ("a.json", b'[{"prompt": "a"}', "is unreadable: JSONDecodeError"),
        ("a.json", b"[" * 100_000, "is unreadable: RecursionError"),
        ("a.csv", b"prompt,completion\na,b\na\n", "is unreadable: row 1 has not the header's 2 fields"),
        ("a.csv", b"prompt,completion\na,b,c\n", "is unreadable: row 0 has not the header's 2 fields"),
        ("a.csv", b'prompt,completion\na,"b\n', "is unreadable: Error: unexpected end of data"),
        ("a.parquet", b"PAR1", "is unreadable: ArrowInvalid.*Correct the file"),
    ],
)
def test_a_file_that_is_something_else_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}` {message}"):
        list(read_rows(tmp_path / name))


def test_no_file_of_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist. Allowed is a .jsonl, .json, .csv or .parquet file"):
        split_files(str(tmp_path / "none"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="holds no file of rows"):
        split_files(str(tmp_path))
