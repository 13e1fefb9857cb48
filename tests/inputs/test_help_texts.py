"""A field is described once, in the docstring."""

import doctest
from dataclasses import dataclass, field, fields

import pytest

from lori_trl import LoriArguments, LoriDPOConfig, LoriRewardConfig, LoriSFTConfig
from lori_trl.inputs import help_texts
from lori_trl.inputs.help_texts import help_from_docstring


def helps(config):
    return {each.name: each.metadata.get("help") for each in fields(config)}


def test_the_example_in_the_docstring():
    assert doctest.testmod(help_texts).failed == 0


def test_entries_notes_and_what_is_inherited():
    @dataclass
    class Theirs:
        inherited: int = field(default=1, metadata={"help": "theirs"})
        rate: float = field(default=1.0, metadata={"help": "theirs"})

    @help_from_docstring
    @dataclass
    class Ours(Theirs):
        """
        Settings.

        > [!NOTE]
        > - `rate`: How fast, in
        >   steps. Defaults to `2` instead of `1`.
        > - `inherited`: Not to be told here.

        Parameters:
            size (`int`, *optional*, defaults to `3`):
                How many
                there are: 5 %.

                More of it is told on the page.
            untold (`int`):
                Some.
        """

        rate: float = 2.0
        size: int = field(default=3, metadata={"choices": [3, 4]})
        plain: int = 0

    assert helps(Ours) == {
        "inherited": "theirs",
        "rate": "How fast, in steps.",
        "size": "How many there are: 5 %%.",
    } | {"plain": None}
    assert helps(Theirs) == {"inherited": "theirs", "rate": "theirs"}
    assert {each.name: each.metadata.get("choices") for each in fields(Ours)}["size"] == [3, 4]


@pytest.mark.parametrize("config", [LoriSFTConfig, LoriDPOConfig, LoriRewardConfig])
def test_every_field_of_ours_has_a_help_of_one_paragraph(config):
    ours = {name for each in config.__mro__ if each.__module__.startswith("lori_trl") for name in each.__annotations__}
    assert {each.name for each in fields(LoriArguments)} <= ours
    for name in ours & {each.name for each in fields(config)}:
        text = helps(config)[name]
        assert text and text.endswith(".") and len(text) < 250, name
