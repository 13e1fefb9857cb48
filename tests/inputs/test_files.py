"""A file is replaced whole or not at all."""

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
