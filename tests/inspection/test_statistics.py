"""Magnitudes count every entry."""

import pytest
import torch

from lori_trl.inspection import Magnitudes


def test_magnitudes_count_every_entry():
    magnitudes = Magnitudes()
    magnitudes.add(torch.tensor([[0.01, -0.01], [10.0, 1e-30]], dtype=torch.float64))
    magnitudes.zeros += 1
    assert magnitudes.numel == 5 and int(magnitudes.counts.sum()) == 4
    assert float(magnitudes.squares.sum()) == pytest.approx(100.0002)
    assert magnitudes.top(0.2) == pytest.approx(100 / 100.0002)
    assert len(magnitudes.edges) == len(magnitudes.counts[magnitudes.span]) + 1
    alike = Magnitudes()
    alike.add(torch.full((100,), 0.5, dtype=torch.float64))
    assert alike.top(0.1) == pytest.approx(0.1)
