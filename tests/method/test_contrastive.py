"""A from activations: the directions that a new task uses and protected rows do not."""

import pytest
import torch

from lori_trl.method import contrastive
from lori_trl.method.contrastive import contrastive_projection
from lori_trl.method.moments import Moments


def moments(tokens: torch.Tensor) -> Moments:
    taken = Moments(tokens.shape[1])
    for part in tokens.split(7):
        taken.add(part)
    return taken


def drawn(count: int, dimensions: int, seed: int) -> torch.Tensor:
    """Tokens of which every dimension has another energy."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(dimensions, generator=generator) ** 3 + 0.01
    return torch.randn(count, dimensions, generator=generator) * scales


def angle(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest angle between the subspaces of two matrices' rows."""
    bases = [torch.linalg.qr(matrix.double().T).Q for matrix in (first, second)]
    inside = bases[0].T @ bases[1]
    return torch.linalg.matrix_norm(bases[1] - bases[0] @ inside, ord=2).item()


def plain(new: torch.Tensor, protected: torch.Tensor, rank: int, epsilon: float) -> torch.Tensor:
    """The generalised eigenvectors, as a textbook has them: of the square root of C1 + eps I."""
    C2, C1 = (tokens.double().T @ tokens.double() / len(tokens) for tokens in (new, protected))
    C1 = C1 + epsilon * C1.trace() / len(C1) * torch.eye(len(C1), dtype=C1.dtype)
    values, vectors = torch.linalg.eigh(C1)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    return (root @ torch.linalg.eigh(root @ C2 @ root).eigenvectors[:, -rank:]).T


@pytest.mark.parametrize(("new", "protected"), [(400, 400), (30, 400), (400, 30), (30, 25)])
def test_rows_are_the_leading_generalised_eigenvectors(new, protected):
    """With as many tokens as dimensions, or fewer, where moments are kept by their factor."""
    first, second = drawn(new, 48, 1), drawn(protected, 48, 2)
    A = contrastive_projection(moments(first), moments(second), rank=6, epsilon=0.1)
    assert A.shape == (6, 48) and A.dtype == torch.float32
    assert angle(A, plain(first, second, 6, 0.1)) < 1e-5
    response = (first.double() @ A.double().T).square().mean(0)
    torch.testing.assert_close(
        response, (first.double().square().sum(1).mean() / (3 * 48)).expand(6), rtol=1e-5, atol=0
    )
    assert all(row[row.abs().argmax()] > 0 for row in A)


def test_protected_tokens_get_less_of_A_than_of_a_random_one():
    new, protected = drawn(4000, 48, 1), drawn(4000, 48, 2)
    A = contrastive_projection(moments(new[:400]), moments(protected[:400]), rank=6, epsilon=0.1)
    response = [(tokens[400:] @ A.T).square().sum() / tokens[400:].square().sum() for tokens in (new, protected)]
    assert response[1] < 0.05 * response[0]


@pytest.mark.parametrize("count", [30, 400])
def test_with_nothing_to_protect_rows_are_the_principal_directions(count):
    tokens = drawn(count, 48, 1)
    A = contrastive_projection(moments(tokens), rank=6, epsilon=0.1)
    assert angle(A, torch.linalg.svd(tokens.double()).Vh[:6]) < 1e-5


def test_iteration_finds_what_all_eigenvectors_give(monkeypatch):
    new, protected = moments(drawn(400, 48, 1)), moments(drawn(400, 48, 2))
    whole = contrastive_projection(new, protected, rank=6, epsilon=0.1)
    monkeypatch.setattr(contrastive, "_DENSE", 8)
    torch.testing.assert_close(
        contrastive_projection(new, protected, rank=6, epsilon=0.1), whole, rtol=1e-4, atol=1e-6
    )


def test_moments_are_carried_by_their_leading_part():
    """What is left out is spread over all directions, so that the mean of |x|² stays."""
    tokens = drawn(400, 48, 2)
    whole, carried = moments(tokens), Moments(48)
    carried.add_low_rank(whole.compress(20))
    assert carried.tokens == 400 and carried.energy == pytest.approx(whole.energy)
    assert 0 < 48 * carried.floor < 0.05 * whole.energy
    values = torch.linalg.eigvalsh(whole.matrix)
    torch.testing.assert_close(torch.linalg.eigvalsh(carried.matrix)[-20:], values[-20:], rtol=1e-4, atol=0)
    few = moments(tokens[:30])
    F = few.compress(64).factor
    torch.testing.assert_close(F.T @ F, few.matrix.float(), rtol=1e-4, atol=1e-6)
    both = moments(tokens[:200])
    both.add_low_rank(moments(tokens[200:]).compress(48))
    torch.testing.assert_close(both.matrix, whole.matrix, rtol=1e-4, atol=1e-6)
