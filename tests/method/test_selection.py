"""Selection: exact, whatever the ties, zeros, dtypes and sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_trl.method.selection import select_largest
from lori_trl.method.sparsity import num_to_select


def by_sorting(tensors, k, exclude=None):
    """The same by a plain stable sort over a concatenation: largest first, then lowest position; zeros never."""
    names = sorted(tensors)
    flat = torch.cat([tensors[name].reshape(-1).float().abs() for name in names])
    if exclude:
        flat[torch.cat([exclude[name].reshape(-1) for name in names])] = 0
    order = torch.sort(flat, descending=True, stable=True).indices[: min(k, int(flat.count_nonzero()))]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order] = True
    parts = mask.split([tensors[name].numel() for name in names])
    return {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}


def assert_same(masks, expected):
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=5),
    levels=st.integers(1, 6),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    excluded=st.booleans(),
)
def test_equals_a_sort_with_many_ties(sizes, levels, share, seed, dtype, excluded):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"m{i}": (torch.randint(-levels, levels + 1, size, generator=generator) / 3).to(dtype)
        for i, size in enumerate(sizes)
    }
    exclude = (
        {name: torch.rand(t.shape, generator=generator) < 0.3 for name, t in tensors.items()} if excluded else None
    )
    k = round(share * sum(tensor.numel() for tensor in tensors.values()))
    masks, threshold = select_largest(tensors, k, exclude)
    assert_same(masks, by_sorting(tensors, k, exclude))
    chosen = torch.cat([tensors[name][masks[name]].float().abs() for name in tensors])
    assert threshold == (chosen.min().item() if chosen.numel() else 0.0)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-42, 1e30])
def test_equals_a_sort_across_chunks_and_magnitudes(scale):
    torch.manual_seed(0)
    tensors = {name: torch.randn(700, 400) * scale for name in "cabd"}  # a chunk ends between two of them
    tensors["bb"] = torch.randn(1200, 1000) * scale  # more than a chunk
    k = 184_001
    assert_same(select_largest(tensors, k)[0], by_sorting(tensors, k))


def test_ties_go_to_the_lowest_position_in_sorted_order():
    tensors = {"b": torch.ones(2, 2), "a": torch.tensor([[0.0, 1.0], [1.0, 2.0]])}
    masks, threshold = select_largest(tensors, 4)
    assert masks["a"].tolist() == [[False, True], [True, True]]
    assert masks["b"].tolist() == [[True, False], [False, False]]
    assert threshold == 1.0


def test_zeros_are_never_selected():
    masks, threshold = select_largest({"a": torch.tensor([[0.0, -0.0, 3.0]])}, 3)
    assert masks["a"].tolist() == [[False, False, True]] and threshold == 3.0
    masks, threshold = select_largest({"a": torch.zeros(2, 2)}, 3)
    assert not masks["a"].any() and threshold == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("nan")])
def test_what_is_not_finite_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"in 1 tensors: broken\..*Lower `calibration_learning_rate`"):
        select_largest({"fine": torch.ones(3), "broken": torch.tensor([1.0, bad])}, 1)


@pytest.mark.parametrize(
    ("sparsity", "numel", "k"), [(0.9, 1000, 100), (0.9, 999, 99), (0.99, 1000, 10), (0.0, 7, 7), (0.3, 10, 7)]
)
def test_k_is_decimal(sparsity, numel, k):
    assert num_to_select(sparsity, numel) == k
