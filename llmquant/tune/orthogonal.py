"""Orthogonal matrices that spread every channel over all others.

A Hadamard matrix has entries +1 and -1 and orthogonal rows. Sylvester's doubling [[H, H], [H, -H]] makes one of twice
the order; Paley's two constructions (R. Paley, "On orthogonal matrices", 1933) make those of order q + 1 for a prime
q = 3 mod 4, and of order 2 (q + 1) for a prime q = 1 mod 4.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["hadamard", "random"]


_TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


class Orthogonal(NamedTuple):
    """matrix [n, n] float64, orthogonal, and in words how it was made."""

    matrix: Tensor
    name: str


def make_orthogonal(kind: Kind, size: int, seed: int, *, keep_mean: bool = False) -> Orthogonal:
    """A random orthogonal matrix [size, size] float64.

    Args:
        kind: `hadamard`: a Hadamard matrix over sqrt(size), rows with random signs; where none is known, blocks of one
            random orthogonal matrix stand in for its odd part. `random`: uniform over all orthogonal matrices.
        size: its order.
        seed: of signs and random matrices.
        keep_mean: whether the vector of ones has to stay as it is, so that the mean of a vector does, too. A reflection
            sees to that.
    """
    generator = torch.Generator().manual_seed(seed)
    found = _random(size, generator) if kind == "random" else _hadamard(size, generator)
    if not keep_mean:
        return found
    return Orthogonal(_keeping_ones(found.matrix), f"{found.name}, reflected so that means stay")


def hadamard(order: int) -> Orthogonal | None:
    """A Hadamard matrix [order, order] float64 of +1 and -1, or None where no construction here makes one."""
    base = order if order & (order - 1) else min(order, 2)
    while (found := _paley(base)) is None:
        if base % 2:
            return None
        base //= 2
    doubled = f", doubled from Paley's of order {base}" if 2 < base < order else ""
    while len(found) < order:
        found = torch.kron(_TWO, found)
    return Orthogonal(found, f"Hadamard matrix of order {order}{doubled}")


def _paley(order: int) -> Tensor | None:
    """Those of order 1 and 2, and Paley's."""
    if order <= 2:
        return _TWO[:order, :order]
    if order % 4 == 0 and _is_prime(order - 1):
        return _bordered(order - 1) + torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and (order // 2) % 4 == 2 and _is_prime(order // 2 - 1):
        # Each +-1 of the symmetric conference matrix becomes +-[[1, 1], [1, -1]], each 0 becomes [[1, -1], [-1, -1]].
        border, zero = _bordered(order // 2 - 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(border, _TWO) + torch.kron(torch.eye(len(border), dtype=torch.float64), zero)
    return None


def _bordered(prime: int) -> Tensor:
    """Paley's conference matrix of order q + 1: squares modulo q, 0 on the diagonal; symmetric for q = 1 mod 4."""
    residues = torch.arange(prime)
    character = -torch.ones(prime, dtype=torch.float64)
    character[residues.square() % prime] = 1
    character[0] = 0
    found = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    found[1:, 1:] = character[(residues[:, None] - residues) % prime]
    found[0, 1:] = 1
    found[1:, 0] = 1 if prime % 4 == 1 else -1
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _hadamard(size: int, generator: torch.Generator) -> Orthogonal:
    signs = (torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1).double()
    found = hadamard(size) or _with_random_block(size, generator)
    return Orthogonal(signs * found.matrix / size**0.5, f"{found.name}, random signs")


def _with_random_block(size: int, generator: torch.Generator) -> Orthogonal:
    """A Hadamard matrix for the power of two in `size`, a random matrix of the same norm for the odd rest."""
    even = size & -size
    power, rest = hadamard(even), _random(size // even, generator)
    assert power is not None
    return Orthogonal(
        torch.kron(power.matrix, rest.matrix * (size // even) ** 0.5), f"Hadamard matrix of order {even} x {rest.name}"
    )


def _random(size: int, generator: torch.Generator) -> Orthogonal:
    """Uniform (Haar) by QR of a normal matrix, signs set by R (F. Mezzadri, arXiv:math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return Orthogonal((q * r.diagonal().sign()).contiguous(), f"random orthogonal matrix of order {size}")


def _keeping_ones(matrix: Tensor) -> Tensor:
    """Householder's reflection that takes matrix @ 1 back to 1, after the matrix."""
    ones = torch.ones(len(matrix), dtype=matrix.dtype)
    difference = matrix @ ones - ones
    if difference.norm() < 1e-9:
        return matrix
    unit = difference / difference.norm()
    return matrix - 2 * torch.outer(unit, unit @ matrix)
