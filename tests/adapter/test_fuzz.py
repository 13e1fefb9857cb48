"""A small part of fuzz.py: no bit may flip unnoticed, and no metadata may end in a traceback."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import flip_bits, mutate_metadata


@pytest.mark.parametrize("seed", range(2))
def test_no_flipped_bit_passes_any_reader(tmp_path, seed):
    results = list(flip_bits(tmp_path, 25, seed))
    assert len(results) == 25 * (4 + 4 + 1 + 2)
    assert {result for _, _, result in results} == {"refused"}


@pytest.mark.parametrize("seed", range(2))
def test_mutated_metadata_give_an_adapter_or_one_clear_error(tmp_path, seed):
    results = list(mutate_metadata(tmp_path, 25, seed))
    assert {result for _, _, result in results} == {"refused", "passed"}
    old = {result for file, _, result in results if file in ("masks, old checksum", "compact, old checksum")}
    assert old == {"refused"}
