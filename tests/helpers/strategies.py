"""Hypothesis strategies for random log joints with a mode function, symmetric matrices and nested structures.

Every example is a few small choices and a seed: it shrinks towards low dimensions, few terms and seed 0, and its repr
is enough to build it again.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softplus

# ------------------------------------------------------------------------------------------------- random log joints

Coefficients = Callable[..., Tensor]  # the next random tensor of a shape
Term = Callable[[Coefficients, int], Callable[[Tensor], Tensor]]


def _linear(draw: Coefficients, rows: int, size: int, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    weight, offset = scale * draw(rows, size) / size**0.5, scale * draw(rows)
    return lambda v: weight.to(v) @ v + offset.to(v)


def _quadratic(draw: Coefficients, size: int, least: float = 0.3) -> Callable[[Tensor], Tensor]:
    root, center = draw(size, size) / size**0.5, draw(size)
    matrix = root @ root.mT + least * torch.eye(size, dtype=root.dtype)
    return lambda v: -(v - center.to(v)) @ matrix.to(v) @ (v - center.to(v)) / 2


def _mixture(draw: Coefficients, size: int) -> Callable[[Tensor], Tensor]:
    parts = [_quadratic(draw, size) for _ in range(2)]
    return lambda v: torch.logsumexp(torch.stack([part(v) for part in parts]), dim=0)


def _log_cosh(draw: Coefficients, size: int) -> Callable[[Tensor], Tensor]:
    linear = _linear(draw, size + 1, size)
    return lambda v: -(linear(v) + softplus(-2 * linear(v))).sum()


def _poisson(draw: Coefficients, size: int) -> Callable[[Tensor], Tensor]:
    linear = _linear(draw, 2, size, scale=0.3)
    return lambda v: (linear(v) - linear(v).exp()).sum()


def _logit(draw: Coefficients, size: int) -> Callable[[Tensor], Tensor]:
    linear = _linear(draw, 3, size)
    return lambda v: -softplus(linear(v)).sum()


def _heavy_tail(draw: Coefficients, size: int) -> Callable[[Tensor], Tensor]:
    linear = _linear(draw, 2, size)
    return lambda v: -3 * torch.log1p(linear(v) ** 2).sum()


def _scaled(draw: Coefficients, size: int) -> Callable[[Tensor], Tensor]:
    """A normal density with a latent scale, the hierarchy in small: this couples the arguments."""
    log_scale, residual = _linear(draw, 1, size, scale=0.5), _linear(draw, 2, size)
    return lambda v: -(residual(v) ** 2 * torch.exp(-log_scale(v)) / 2).sum() - log_scale(v).sum()


TERMS: dict[str, Term] = {
    "log_cosh": _log_cosh,
    "poisson": _poisson,
    "heavy_tail": _heavy_tail,
    "mixture": _mixture,
    "scaled": _scaled,
}
BENDS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "sin": torch.sin, "softplus": softplus}


@dataclass
class Problem:
    """A smooth log joint of theta and y with a closed-form mode function, a point and fixed noise, from a seed.

    The mode function is smooth and nonlinear but not the maximum of the log joint: nothing under test may rely on that.
    """

    theta_shape: tuple[int, ...] = (1,)
    y_shape: tuple[int, ...] = (1,)
    terms: tuple[str, ...] = ()
    bend: str = "tanh"
    num_particles: int = 1
    floor: float = 0.5
    seed: int = 0

    # Drawn at once: torch.func allows no random draws inside its transforms.
    theta: Tensor = field(init=False, repr=False)
    noise: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Draw the point ``theta``, the ``noise`` of shape ``(num_particles, size)`` and all coefficients."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        rows, columns = torch.Size(self.y_shape).numel(), torch.Size(self.theta_shape).numel()
        self.theta = draw(*self.theta_shape)
        self.noise = draw(self.num_particles, self.size)
        self._affine, self._inner = _linear(draw, rows, columns, 0.5), _linear(draw, rows, columns)
        # The first two keep it bounded above, and its third derivative away from zero.
        terms = [partial(_quadratic, least=0.1), _logit] + [TERMS[term] for term in self.terms]
        self._density = [term(draw, self.size) for term in terms]

    @property
    def size(self) -> int:
        """Number of elements of theta and y together."""
        return torch.Size(self.theta_shape).numel() + torch.Size(self.y_shape).numel()

    def log_joint(self, theta: Tensor, y: Tensor) -> Tensor:
        """A scalar."""
        flat = torch.cat([theta.reshape(-1), y.reshape(-1)])
        return torch.stack([term(flat) for term in self._density]).sum()

    def mode(self, theta: Tensor) -> Tensor:
        """The closed form of y as a function of theta."""
        flat = theta.reshape(-1)
        return (self._affine(flat) + BENDS[self.bend](self._inner(flat))).reshape(self.y_shape)


seeds = st.integers(0, 2**20)
shapes = st.sampled_from([(1,), (), (2,), (3,), (2, 2), (1, 3)])
gains = st.sampled_from([1.0, 0.0, 0.5, -1.0, 2.0]) | st.floats(-3, 3)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.complex128])
floors = st.sampled_from([0.5, 0.1, 1.0])


def problems() -> st.SearchStrategy[Problem]:
    """Random problems; the information at the point is positive definite in most, not in all."""
    return st.builds(
        Problem,
        theta_shape=shapes,
        y_shape=shapes,
        terms=st.lists(st.sampled_from(sorted(TERMS)), max_size=3).map(tuple),
        bend=st.sampled_from(sorted(BENDS)),
        num_particles=st.sampled_from([1, 2, 5]),
        floor=floors,
        seed=seeds,
    )


# ------------------------------------------------------------------------------------------------ symmetric matrices


@dataclass(frozen=True)
class Spectrum:
    """A symmetric matrix of given eigenvalues in a random orthogonal basis; seed 0 leaves it diagonal."""

    eigenvalues: tuple[float, ...]
    seed: int = 0

    @property
    def matrix(self) -> Tensor:
        """``(n, n)``, exactly symmetric."""
        basis = orthogonal(len(self.eigenvalues), self.seed)
        matrix = (basis * torch.tensor(self.eigenvalues, dtype=torch.float64)) @ basis.mT
        return (matrix + matrix.mT) / 2


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, the identity for seed 0."""
    if seed == 0:
        return torch.eye(size, dtype=torch.float64)
    return torch.linalg.qr(standard_normal(size, size, seed=seed))[0]


def standard_normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draws that depend on nothing but shape, seed and dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Drawing eigenvalues from a short list makes repeated, nearly repeated, zero and negative ones common.
_POOL = [1.0, 2.0, 0.0, -1.0, 1 + 1e-13, 1 + 1e-9, 1 + 1e-6, 1 + 1e-3, -1 - 1e-8, 1e-3, -1e-3, 1e-12, 30.0, 100.0]
_WELL_CONDITIONED = [20.0, 20 + 1e-9, 13.0, 13 + 1e-4, 100.0, 1000.0]


def _eigenvalues(pool: list[float], size: int) -> st.SearchStrategy[tuple[float, ...]]:
    one = st.sampled_from(pool) | st.floats(min(pool), max(pool))
    return st.lists(one, min_size=size, max_size=size).map(tuple)


def spectra(pool: list[float] = _POOL, max_size: int = 5) -> st.SearchStrategy[Spectrum]:
    """Symmetric matrices, indefinite or with coinciding eigenvalues more often than not."""
    eigenvalues = st.integers(1, max_size).flatmap(lambda size: _eigenvalues(pool, size))
    return st.builds(Spectrum, eigenvalues, seeds)


def well_conditioned() -> st.SearchStrategy[Spectrum]:
    """Positive definite matrices whose eigenvalues are all above 12."""
    return spectra(_WELL_CONDITIONED)


def batches(max_size: int = 4) -> st.SearchStrategy[Tensor]:
    """Stacks ``(B, n, n)`` of symmetric matrices, B >= 1."""
    members = st.integers(1, max_size).flatmap(
        lambda size: st.lists(st.builds(Spectrum, _eigenvalues(_POOL, size), seeds), min_size=1, max_size=4)
    )
    return members.map(lambda spectrums: torch.stack([spectrum.matrix for spectrum in spectrums]))


# -------------------------------------------------------------------------------------------------- nested structures

Pair = collections.namedtuple("Pair", ["first", "second"])


def structures() -> st.SearchStrategy[object]:
    """Dicts, lists, tuples and named tuples of tensors, nested, with empty ones among them."""
    tensor_shapes = st.sampled_from([(), (1,), (3,), (2, 2), (0,)])
    leaf = st.builds(
        lambda shape, dtype, seed: standard_normal(*shape, seed=seed, dtype=dtype), tensor_shapes, dtypes, seeds
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from(["mu", "tau", "b"]), inner, max_size=3),
            st.builds(Pair, inner, inner),
        ),
        max_leaves=6,
    )
