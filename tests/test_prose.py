"""What can be counted of good prose, page by page. It fails on gross lapses alone; the rest is judged by reading."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# results.md is written by a program, api.md by the docstrings.
PAGES = {file.name: file for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
PAGES = {name: file for name, file in PAGES.items() if name not in ("results.md", "api.md")}


@dataclass
class Prose:
    """A page without its code, tables and addresses."""

    sentences: list[str]  # in order; an item of a list is one or more
    headings: int  # below the title
    words: int  # of the sentences

    @classmethod
    def of(cls, text: str) -> "Prose":
        text = re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"^(    |\|).*$", "", text, flags=re.MULTILINE)
        headings = len(re.findall(r"^##+ ", text, flags=re.MULTILINE))
        text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
        text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"`[^`]*`", "CODE", text).replace("**", "")
        paragraphs = re.split(r"\n\s*\n|^- |^\d\. ", text, flags=re.MULTILINE)
        sentences = [
            part for each in paragraphs for part in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", " ".join(each.split()))
        ]
        sentences = [sentence for sentence in sentences if sentence]
        return cls(sentences, headings, sum(len(sentence.split()) for sentence in sentences))

    def a_thousand_words(self, count: int) -> float:
        return 1000 * count / max(self.words, 1)


def numbers(sentence: str) -> int:
    """Count the figures of a sentence; what is part of a name (`Llama-3-8B`, `r = 32`) is none."""
    return len(re.findall(r"(?<![\w.=-])(?<!r = )[+-]?\d[\d.,]*(?![\w-])", sentence))


@pytest.fixture(params=sorted(PAGES))
def prose(request) -> Prose:
    return Prose.of(PAGES[request.param].read_text(encoding="utf-8"))


def test_sentences_are_not_packed_with_numbers(prose):
    assert not [sentence for sentence in prose.sentences if numbers(sentence) > 6]
    packed = [sentence for sentence in prose.sentences if numbers(sentence) > 2]
    assert len(packed) <= 0.1 * len(prose.sentences) + 1, packed


def test_sentences_end(prose):
    assert not [sentence for sentence in prose.sentences if len(sentence.split()) > 100]
    assert prose.words / len(prose.sentences) < 24


def test_a_reader_finds_headings_and_is_spoken_to(prose):
    assert prose.a_thousand_words(prose.headings) >= 3.5
    spoken_to = sum(
        len(re.findall(r"\b(you|your|we|us|our)\b", sentence, re.IGNORECASE)) for sentence in prose.sentences
    )
    assert prose.words < 150 or prose.a_thousand_words(spoken_to) >= 1


def test_what_is_counted():
    page = (
        "# Title\n\nTake 3 of `4`. You see [5](http://x/6):\n\n## Next\n\n| 7 |\n\n- One 8, Llama-3-8B.\n```\n9\n```\n"
    )
    prose = Prose.of(page)
    assert prose.sentences == ["Take 3 of CODE.", "You see 5:", "One 8, Llama-3-8B."] and prose.headings == 1
    assert [numbers(sentence) for sentence in prose.sentences] == [1, 1, 1]
