"""Plain data crosses the pipe unchanged."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from lori_trl.evaluation.sandbox.wire import pack, unpack

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@given(PLAIN)
@settings(max_examples=50, deadline=None)
def test_plain_data_crosses_unchanged(value):
    (back,) = unpack(json.loads(json.dumps(pack([value], []))), [])
    assert back == value and repr(back) == repr(value)
