"""A file is replaced whole or not at all."""

import time
from pathlib import Path

import pytest

from lori_trl.inputs.files import replacing


def test_a_file_is_replaced_at_the_end_and_only_without_an_error(tmp_path):
    file = tmp_path / "results.json"
    for text in ("first", "second"):
        with replacing(file) as partial:
            partial.write_text(text)
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text
    with pytest.raises(OSError, match="disk full"), replacing(file) as partial:
        partial.write_text("half of the thi")
        raise OSError("disk full")
    assert file.read_text() == "second" and list(tmp_path.iterdir()) == [file]


def test_where_no_file_can_be_made_that_is_said_at_once(tmp_path):
    """And not that another process writes there, after a minute."""
    begun = time.monotonic()
    for place in (tmp_path / "nowhere" / "file", Path("/proc/file")):
        with pytest.raises(OSError) as caught, replacing(place) as partial:
            partial.write_text("x")
        assert not isinstance(caught.value, FileExistsError)
    assert time.monotonic() - begun < 10
