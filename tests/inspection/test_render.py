"""What `lori inspect` writes and shows: numbers, a page, pictures."""

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
from inspection.adapters import HOSTILE, matrices, write

from lori_trl.cli import main
from lori_trl.inspection import Inspection, inspect_adapters, inspection_sections, render_page, verdict
from lori_trl.inspection.statistics import TaskPair


@pytest.fixture(scope="module")
def written(tmp_path_factory, two_tasks) -> Path:
    """Everything the command can write, of an adapter of two tasks and one whose name means harm."""
    folder = tmp_path_factory.mktemp("out")
    hostile = write(folder / HOSTILE.replace("/", ""), matrices(2), base_model_name_or_path=f"/models/{HOSTILE}")
    targets = ["--html", folder / "page.html", "--json", folder / "numbers.json", "--save", folder / "all.png"]
    assert main(["inspect", str(two_tasks[0]), str(hostile), *map(str, targets)]) == 0
    assert main(["inspect", str(two_tasks[0]), "--save", str(folder / "pictures")]) == 0
    return folder


@pytest.mark.parametrize(
    ("cosine", "says"),
    [
        (None, "can't be read from their weights"),
        (-0.01, "don't interfere: the largest cosine between two deltas is -0.0100 (a | b). What"),
        (0.1, "interfere a little: the largest cosine between two deltas is +0.1000 (a | b), in the same direction."),
        (-0.5, "interfere: the largest cosine between two deltas is -0.5000 (a | b), against each other."),
    ],
)
def test_a_sentence_says_whether_tasks_interfere(cosine, says):
    pairs = [TaskPair("a", "b", False, cosine=cosine), TaskPair("a", "c", False)]
    assert says in verdict(Inspection([], [None] * 3, pairs, [], []))
    assert "one task" in verdict(Inspection([], [None], [], [], []))


def test_ten_adapters_stay_readable(tmp_path):
    """Pictures come first, long tables are closed, and the picture of pairs has ten of the 45."""
    inspection = inspect_adapters([write(tmp_path / f"task-{i}", matrices(i)) for i in range(10)])
    sections = inspection_sections(inspection)
    by_layer = next(section for section in sections if section.key == "cosine_by_layer")
    assert len(by_layer.table.rows) == 45 and by_layer.drawing.height < 6
    page = render_page(inspection, sections)
    assert page.count("<summary>45 rows</summary>") == 2  # the pairs by layer, and those of A
    assert page.rindex("<svg") < page.index('<section id="adapters"')
    assert page.index(verdict(inspection)[:40].replace("'", "&#39;")) < page.index("<nav")


def test_json_has_its_form(written, two_tasks):
    found = json.loads((written / "numbers.json").read_text(encoding="utf-8"))
    assert found["format_version"] == 1
    assert set(found) == {"format_version", "adapters", "tasks", "pairs", "projections", "notes"}
    assert [task["name"] for task in found["tasks"]] == ["safety", "math", HOSTILE]
    task = found["tasks"][0]
    assert set(task) == {
        "name", "adapter", "masked", "selected", "owned", "density", "norm", "cells", "magnitudes"
    }  # fmt: skip
    assert set(task["cells"][0]) == {"layer", "projection", "selected", "numel", "density", "norm"}
    assert len(task["cells"]) == 9
    magnitudes = task["magnitudes"]
    assert len(magnitudes["log10_edges"]) == len(magnitudes["counts"]) + 1 == len(magnitudes["squares"]) + 1
    assert sum(magnitudes["counts"]) + magnitudes["zeros"] == task["owned"]
    pair = found["pairs"][0]
    assert set(pair) == {"first", "second", "same_A", "overlap", "cosine", "cosine_by_layer", "undefined"}
    assert set(pair["overlap"]) == {"shares", "chance", "chance_by_matrix"}
    assert set(found["projections"][0]) == {"first", "second", "same", "mean", "chance", "max"}
    assert str(two_tasks[0].parent) not in json.dumps(found)


def test_json_alone_goes_to_the_standard_output(two_tasks, capsys):
    assert main(["inspect", str(two_tasks[0]), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["format_version"] == 1


def test_the_terminal_shows_names_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = write(tmp_path / "[red]\x1b[31mname", matrices(1))
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "[red]" in out and "\x1b[31m" not in out
    for title in ("Adapters", "Tasks", "Density by layer", "Norms of the deltas", "Entries by magnitude"):
        assert title in out
    assert out.endswith("There is one task, and nothing that it could interfere with.\n")
    assert "Overlap" not in out  # one task: nothing to compare


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]


def test_the_page_needs_no_network_and_no_script(written):
    text = (written / "page.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
        elif not name.startswith("xmlns"):
            assert not re.search(r"https?:|//|javascript:", value or ""), (tag, name, value[:60])
        assert not name.startswith("on")
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))


def test_names_are_escaped_in_the_page(written):
    text = (written / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text and "alert(1)<" not in text
    assert "&lt;script&gt;alert(1)&lt;$x^2$ &amp; &#34;q&#34;&gt;" in text


def test_every_picture_has_words_and_a_table(written):
    page = _Page()
    text = (written / "page.html").read_text(encoding="utf-8")
    page.feed(text)
    labels = [value for tag, name, value in page.attributes if tag == "figure" and name == "aria-label"]
    assert len(labels) == page.tags.count("svg") == 6 and all(len(label) > 30 for label in labels)
    assert page.tags.count("table") >= 9
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert "#010203" not in text and "currentColor" in text


def test_pictures_are_drawn_in_their_size(written):
    names = {file.stem for file in (written / "pictures").iterdir()}
    assert names == {"overlap", "cosine", "cosine_by_layer", "density", "norms", "magnitudes"}
    for file in (written / "pictures").iterdir():
        assert _size(file)[0] == 768  # 4.8 inches at 160 dots
        assert _size(file)[1] > 200
    assert _size(written / "all.png")[0] == 2 * 768


def _size(file: Path) -> tuple[int, int]:
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])
