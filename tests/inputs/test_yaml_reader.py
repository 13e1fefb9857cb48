"""YAML that means harm or nothing: one error with the place, before it costs anything."""

import math

import pytest

from lori_trl.inputs.yaml_reader import MAX_BYTES, read_mapping

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (BOMB, "line 2, column 10: an alias is not allowed"),
        (MERGES, "an alias is not allowed"),
        ("a: &a [*a]", "an alias is not allowed"),
        ("a: !!timestamp foo", "line 1, column 4: a tag is not allowed"),
        ("a: !!bool foo", "a tag is not allowed"),
        ("a: !!int ''", "a tag is not allowed"),
        ("a: !!python/object/apply:os.system [ls]", "a tag is not allowed"),
        ("a: " + "[" * 100, "more than 16 levels is not allowed"),
        ("a: " + "[" * 5000, "line 1, column"),
        ("a:\n" + "".join(" " * n + "-\n" for n in range(1, 100)), "more than 16 levels is not allowed"),
        ("a: " + "9" * 400, "line 1, column 4: a number of more than 40 characters"),
        ("a: 0x" + "f" * 5000, "a number of more than 40 characters"),
        ("? [a]\n: 1", "found unhashable key"),
        ("a: =", "could not determine a constructor"),
        ("a: 1\n---\nb: 1", "line 2, column 1"),
        ("a: [1", "line"),
        ("\x00", "character 0 is not allowed in YAML"),
        ("- a\n- b", "it holds a list"),
        ("", "it holds a NoneType"),
        ("a: " + "x" * MAX_BYTES, f"it has more than {MAX_BYTES:,} bytes"),
    ],
    ids=lambda text: text[:20],
)
def test_refused(text, fault, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match="is no recipe: .*Correct it, or pass another") as error:
        read_mapping(tmp_path / "mine.yaml")
    assert fault in str(error.value) and len(str(error.value)) < 400


def test_an_error_tells_the_place_and_not_what_the_file_holds(tmp_path):
    for content in (b"secret \xff", "secret: caf\u00e9".encode("latin-1"), b"secret: [1\nsecret", b"\xff\xfes\x00"):
        (tmp_path / "mine.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=r"byte \d+ is not UTF-8|line 3, column 1") as error:
            read_mapping(tmp_path / "mine.yaml")
        assert "secret" not in str(error.value)


def test_a_date_is_text_and_repeated_keys_are_told(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 2001-99-99\nb: 5e-4\nc: 5.0e-4\na: [true, null, .inf, 1_000]\n")
    mapping, repeated = read_mapping(tmp_path / "mine.yaml")
    assert mapping == {"a": [True, None, float("inf"), "1_000"], "b": 5e-4, "c": 5e-4}
    assert repeated == {"a": [1, 4]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0100", 100),
        ("-007", -7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("0b11", "0b11"),
        ("0x_", "0x_"),
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("+1", 1),
        ("1.2.3", "1.2.3"),
        ("-", [None]),
        (".", "."),
        ("'0100'", "0100"),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text, value, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"a:\n  {text}\nb: .nan")
    mapping, _ = read_mapping(tmp_path / "mine.yaml")
    assert mapping["a"] == value and type(mapping["a"]) is type(value) and math.isnan(mapping["b"])
