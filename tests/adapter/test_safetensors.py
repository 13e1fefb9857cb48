"""A file written tensor by tensor is the library's, byte for byte."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lori_trl.adapter.safetensors import SafetensorsWriter


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(st.text(min_size=1, max_size=12), st.lists(st.integers(0, 5), max_size=3), max_size=6),
    cut=st.integers(0, 5),
)
def test_a_streamed_file_is_the_librarys_byte_for_byte(tmp_path, tensors, cut):
    tensors = {name: torch.randn(shape) for name, shape in tensors.items() if name.isprintable()}
    tensors.pop("__metadata__", None)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "ours", shapes, {"format": "pt"}) as writer:
        for name in reversed(tensors):  # in any order
            writer.write(name, tensors[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_streamed_file_with_a_hole_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="1 tensors were not written, e.g. b"):
        with SafetensorsWriter(tmp_path / "x", {"a": (2,), "b": (3,)}) as writer:
            writer.write("a", torch.ones(2))
    with SafetensorsWriter(tmp_path / "x", {"a": (2,)}) as writer:
        with pytest.raises(ValueError, match=r"announced as \[2\]"):
            writer.write("a", torch.ones(3))
        writer.write("a", torch.ones(2))
