"""Random block arrowheads as Hypothesis examples, their dense twins, and every operation done both ways.

The dense twin is put together block by block and worked on by ``torch.linalg`` alone; nothing of the package is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers.strategies import seeds
from laplace_amort.linalg.arrowhead import Arrowhead


class Blocks(NamedTuple):
    """Of an arrowhead: ``(*, d, d)``, ``(*, N, k, d)`` and ``(*, N, k, k)``."""

    head: Tensor
    border: Tensor
    tail: Tensor

    def symmetric(self) -> Blocks:
        """With head and tail symmetric, for derivatives in all of their elements."""
        return Blocks(_symmetric(self.head), self.border, _symmetric(self.tail))


class Vectors(NamedTuple):
    """Over the globals and over the units: ``(*, d)`` and ``(*, N, k)``."""

    global_: Tensor
    local: Tensor

    def joined(self) -> Tensor:
        """In one, ``(*, d + N k)``."""
        return join(*self)


@dataclass(frozen=True)
class ArrowheadCase:
    """A random positive definite arrowhead, from a few small numbers and a seed.

    Tails and Schur complement have condition numbers up to ``10 ** log_condition``; the size of the tails varies by as
    much again from unit to unit. No log-determinant is zero.
    """

    global_dim: int = 1
    num_units: int = 1
    local_dim: int = 1
    batch: tuple[int, ...] = ()
    log_condition: float = 0.0
    seed: int = 0

    def blocks(self, dtype: torch.dtype = torch.float64) -> Blocks:
        """The three of them, with the given Schur complement inside the head."""
        draw, (d, n, k) = self._normal(), (self.global_dim, self.num_units, self.local_dim)
        size = 2 * 10 ** (self.log_condition * torch.rand(*self.batch, n, 1, 1, generator=draw.generator))
        tail = size * self._positive_definite(draw, *self.batch, n, k)
        border = tail @ draw(*self.batch, n, k, d)
        schur = 3 * self._positive_definite(draw, *self.batch, d)
        head = schur + (border.mT @ torch.linalg.solve(tail, border)).sum(-3)
        return Blocks(*(block.to(dtype) for block in Blocks(head, border, tail).symmetric()))

    def arrowhead(self, dtype: torch.dtype = torch.float64) -> Arrowhead:
        """What is under test."""
        return Arrowhead(*self.blocks(dtype))

    def vectors(self, *samples: int, seed: int = 1) -> Vectors:
        """Standard normal ones, with leading dimensions of samples."""
        draw = self._normal(seed)
        return Vectors(
            draw(*samples, *self.batch, self.global_dim),
            draw(*samples, *self.batch, self.num_units, self.local_dim),
        )

    def _normal(self, stream: int = 0) -> _Normal:
        return _Normal(torch.Generator().manual_seed(2 * self.seed + stream))

    def _positive_definite(self, draw: _Normal, *shape: int) -> Tensor:
        *batch, n = shape
        vectors, _ = torch.linalg.qr(draw(*batch, n, n))
        values = 10 ** (self.log_condition * torch.rand(*batch, 1, n, generator=draw.generator))
        return (vectors * values) @ vectors.mT


class _Normal:
    """The next standard normal tensor of a shape."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def arrowhead_cases(
    max_log_condition: float = 2.0, max_local_dim: int = 5, max_units: int = 4
) -> st.SearchStrategy[ArrowheadCase]:
    """Without globals, units or batch now and then; k from 1 up, beyond what is unrolled."""
    return st.builds(
        ArrowheadCase,
        global_dim=st.integers(0, 5),
        num_units=st.integers(0, max_units),
        local_dim=st.integers(1, max_local_dim),
        batch=st.sampled_from([(), (), (2,), (1, 2), (0,)]),
        log_condition=st.floats(0, max_log_condition),
        seed=seeds,
    )


def dense(blocks: Blocks) -> Tensor:
    """The whole matrix ``(*, d + N k, d + N k)``, block by block."""
    *batch, n, k, _ = blocks.border.shape
    rows = [torch.cat([blocks.head, *(blocks.border[..., i, :, :].mT for i in range(n))], -1)]
    for i in range(n):
        zeros = [blocks.tail.new_zeros(*batch, k, k) for _ in range(n)]
        zeros[i] = blocks.tail[..., i, :, :]
        rows.append(torch.cat([blocks.border[..., i, :, :], *zeros], -1))
    return torch.cat(rows, -2)


def join(global_: Tensor, local: Tensor) -> Tensor:
    """In one vector ``(*, d + N k)``."""
    return torch.cat([global_, local.flatten(-2)], -1)


def units_of(matrix: Tensor, case: ArrowheadCase) -> Tensor:
    """The diagonal blocks of the units, ``(*, N, k, k)``."""
    d, n, k = case.global_dim, case.num_units, case.local_dim
    places = [slice(d + i * k, d + (i + 1) * k) for i in range(n)]
    blocks = [matrix[..., place, place] for place in places]
    return torch.stack(blocks, -3) if blocks else matrix.new_zeros(*case.batch, 0, k, k)


def lower_of_inverse(precision: Tensor) -> Tensor:
    """The lower triangular T with T T^T the inverse."""
    return torch.linalg.cholesky(_symmetric(torch.linalg.inv(precision)))


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def given_globals(matrix: Tensor, case: ArrowheadCase) -> Tensor:
    """The precision of all units given the globals, ``(*, N k, N k)``."""
    return matrix[..., case.global_dim :, case.global_dim :]


def regression(matrix: Tensor, case: ArrowheadCase) -> Tensor:
    """The coefficients of all units on the globals, with the sign turned, ``(*, N k, d)``."""
    return torch.linalg.solve(given_globals(matrix, case), matrix[..., case.global_dim :, : case.global_dim])


def mean_given_globals(matrix: Tensor, case: ArrowheadCase, global_: Tensor) -> Tensor:
    """Of the units, ``(*, N, k)``."""
    return apply(-regression(matrix, case), global_).unflatten(-1, (case.num_units, case.local_dim))


def schur_complement(matrix: Tensor, case: ArrowheadCase) -> Tensor:
    """That of all units, ``(*, d, d)``."""
    d = case.global_dim
    return matrix[..., :d, :d] - matrix[..., :d, d:] @ regression(matrix, case)


def local_part(joint: Tensor, case: ArrowheadCase) -> Tensor:
    """The units of a joint vector, ``(*, N, k)``."""
    return joint[..., case.global_dim :].unflatten(-1, (case.num_units, case.local_dim))


Twin = tuple[Callable[[Arrowhead, Vectors], Tensor], Callable[[Tensor, ArrowheadCase, Vectors], Tensor]]

# Each operation: by the arrowhead, and by its dense twin with the place of the globals known.
OPERATIONS: dict[str, Twin] = {
    "to_dense": (lambda a, v: a.to_dense(), lambda p, c, v: p),
    "log_det": (lambda a, v: a.log_det(), lambda p, c, v: torch.logdet(p)),
    "matvec": (lambda a, v: join(*a.matvec(*v)), lambda p, c, v: apply(p, v.joined())),
    "solve": (lambda a, v: join(*a.solve(*v)), lambda p, c, v: apply(torch.linalg.inv(p), v.joined())),
    "solve_tails": (
        lambda a, v: a.solve_tails(v.local).flatten(-2),
        lambda p, c, v: apply(torch.linalg.inv(given_globals(p, c)), v.local.flatten(-2)),
    ),
    "draw": (lambda a, v: join(*a.draw(*v)), lambda p, c, v: apply(lower_of_inverse(p), v.joined())),
    "draw_local": (
        lambda a, v: a.draw_local(*v),
        lambda p, c, v: (
            mean_given_globals(p, c, v.global_)
            + apply(lower_of_inverse(given_globals(p, c)), v.local.flatten(-2)).reshape(v.local.shape)
        ),
    ),
    "conditional_mean": (
        lambda a, v: a.conditional_mean(v.global_),
        lambda p, c, v: mean_given_globals(p, c, v.global_),
    ),
    "schur_complement": (lambda a, v: a.schur_complement, lambda p, c, v: schur_complement(p, c)),
    "regression": (lambda a, v: a.regression.flatten(-3, -2), lambda p, c, v: regression(p, c)),
    "global_scale_tril": (
        lambda a, v: a.global_scale_tril,
        lambda p, c, v: lower_of_inverse(p)[..., : c.global_dim, : c.global_dim],
    ),
    "local_scale_tril": (
        lambda a, v: a.local_scale_tril,
        lambda p, c, v: units_of(lower_of_inverse(given_globals(p, c)), replace(c, global_dim=0)),
    ),
    "global_covariance": (
        lambda a, v: a.global_covariance(),
        lambda p, c, v: torch.linalg.inv(p)[..., : c.global_dim, : c.global_dim],
    ),
    "global_variance": (
        lambda a, v: a.global_variance(),
        lambda p, c, v: torch.linalg.inv(p).diagonal(dim1=-2, dim2=-1)[..., : c.global_dim],
    ),
    "conditional_covariance": (
        lambda a, v: a.conditional_covariance(),
        lambda p, c, v: torch.linalg.inv(units_of(p, c)),
    ),
    "local_covariance": (lambda a, v: a.local_covariance(), lambda p, c, v: units_of(torch.linalg.inv(p), c)),
    "local_variance": (
        lambda a, v: a.local_variance(),
        lambda p, c, v: local_part(torch.linalg.inv(p).diagonal(dim1=-2, dim2=-1), c),
    ),
    "cross_covariance": (
        lambda a, v: a.cross_covariance().flatten(-3, -2),
        lambda p, c, v: torch.linalg.inv(p)[..., c.global_dim :, : c.global_dim],
    ),
}


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def derivatives(function: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 7) -> list[Tensor]:
    """The value, the gradient of a random projection of it, and the Hessian of that times a random direction."""
    generator = torch.Generator().manual_seed(seed)

    def projected(tensor: Tensor) -> Tensor:
        return (tensor * torch.randn(tensor.shape, generator=generator)).sum()

    leaves = [value.detach().requires_grad_() for value in inputs]
    value = function(*leaves)
    first = gradient(projected(value), leaves)
    return [value, first, gradient(projected(first), leaves)]


def gradient(output: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Of a scalar, in one vector."""
    if not output.requires_grad:
        return torch.zeros(sum(leaf.numel() for leaf in leaves))
    parts = torch.autograd.grad(output, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest element expected; NaN and missing graphs are infinitely wrong."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    largest = float(expected.detach().abs().max())
    error = float((actual - expected).detach().abs().max()) / (largest or 1.0)
    return math.inf if math.isnan(error) else error
