"""Orthogonal matrices: the identities that define them."""

from __future__ import annotations

import pytest
import torch

from llmquant.tune.orthogonal import hadamard, make_orthogonal

# Paley I (12 = 11 + 1), Paley II (36 = 2 (17 + 1)), powers of two, their products, widths of real models.
ORDERS = [1, 2, 4, 12, 16, 20, 28, 36, 44, 60, 84, 180, 576, 896, 2304]


@pytest.mark.parametrize("order", ORDERS)
def test_a_hadamard_matrix_has_signs_and_orthogonal_rows(order: int) -> None:
    found = hadamard(order)
    assert found is not None and found.matrix.shape == (order, order)
    assert found.matrix.abs().eq(1).all()
    assert torch.equal(found.matrix @ found.matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_what_was_built_is_named() -> None:
    found = hadamard(576)
    assert found is not None and found.name == "Hadamard matrix of order 576, doubled from Paley's of order 72"
    assert hadamard(64).name == "Hadamard matrix of order 64"  # type: ignore[union-attr]


@pytest.mark.parametrize("order", [3, 6, 9, 52])
def test_where_none_is_known_there_is_none(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("size", [1, 2, 9, 52, 64, 72])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_orthogonal(kind: str, size: int, keep_mean: bool) -> None:
    found = make_orthogonal(kind, size, 3, keep_mean=keep_mean).matrix  # type: ignore[arg-type]
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64), atol=1e-13, rtol=0)
    if keep_mean:
        torch.testing.assert_close(found.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-12, rtol=0)


def test_an_odd_part_without_hadamard_matrix_is_random_and_says_so() -> None:
    found = make_orthogonal("hadamard", 52, 0)
    assert "order 4 x random orthogonal matrix of order 13" in found.name
    assert found.matrix.abs().max() < 0.6  # no row is left where it was


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_the_seed_decides(kind: str) -> None:
    first, again, other = (make_orthogonal(kind, 64, seed).matrix for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert torch.equal(first, again) and not torch.equal(first, other)
