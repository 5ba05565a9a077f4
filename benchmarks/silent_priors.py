"""Priors of globals twice: as Pyro distributions and as densities in NumPy, with coordinates of their own.

Nothing of the package is used here, so that what is judged does not judge itself. Every class has

- ``torch()``: the distribution as people write it;
- ``log_density(x)``: of constrained values ``(G, *shape)``, up to a constant, ``(G,)``;
- ``constrain(y)``: from unconstrained coordinates ``(G, size)`` to values, with the log Jacobian;
- ``draw(rng)``: a truth that data are made with, from the middle of the prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy.special import expit

Array = NDArray[np.float64]

SCALE_PRIORS = ("HalfNormal", "HalfCauchy", "Exponential", "LogNormal", "Uniform", "Gamma", "InverseGamma")


class Constrained(NamedTuple):
    """Values ``(G, *shape)`` and the log Jacobian ``(G,)`` of the map to them."""

    value: Array
    log_jacobian: Array


def _total(x: Array) -> Array:
    """Sum over all but the first axis."""
    return x.reshape(len(x), -1).sum(1)


@dataclass(frozen=True)
class Real:
    """Normal, or Student-t with three degrees of freedom, of a number or a vector of them.

    :param float scale: of the prior.
    :param float loc: of the prior.
    :param size: number of elements of a vector; None for a number.
    :param bool heavy: Student-t.
    """

    scale: float
    loc: float = 0.0
    size: int | None = None
    heavy: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.size is None else (self.size,)

    @property
    def dim(self) -> int:
        return self.size or 1

    def torch(self) -> Any:
        one = dist.StudentT(3.0, self.loc, self.scale) if self.heavy else dist.Normal(self.loc, self.scale)
        return one if self.size is None else one.expand([self.size]).to_event(1)

    def log_density(self, x: Array) -> Array:
        square = ((x - self.loc) / self.scale) ** 2
        return _total(-2 * np.log1p(square / 3) if self.heavy else -square / 2)

    def constrain(self, y: Array) -> Constrained:
        return Constrained(y.reshape(-1, *self.shape), np.zeros(len(y)))

    def unconstrain(self, x: Array) -> Array:
        return np.reshape(x, -1)

    def draw(self, rng: np.random.Generator) -> Array:
        return self.loc + min(self.scale, 1.0) * 0.6 * rng.normal(size=self.shape)


@dataclass(frozen=True)
class Positive:
    """A scale or a shape with one of seven priors, or a vector of them.

    :param str family: a name of ``SCALE_PRIORS``.
    :param first: parameter of the prior.
    :param second: parameter of the prior, where it has two.
    :param unit: what values are multiples of in the data.
    :param truths: between which the logarithm of a truth is uniform, in units.
    :param size: number of elements of a vector; None for a number.
    """

    family: str
    first: float
    second: float = 0.0
    unit: float = 1.0
    truths: tuple[float, float] = (0.3, 1.2)
    size: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.size is None else (self.size,)

    @property
    def dim(self) -> int:
        return self.size or 1

    def torch(self) -> Any:
        two = self.family in ("LogNormal", "Uniform", "Gamma", "InverseGamma")
        one = getattr(dist, self.family)(*((self.first, self.second) if two else (self.first,)))
        return one if self.size is None else one.expand([self.size]).to_event(1)

    def log_density(self, x: Array) -> Array:
        a, b = self.first, self.second
        with np.errstate(divide="ignore"):
            log = np.log(x)
        found = {
            "HalfNormal": lambda: -((x / a) ** 2) / 2,
            "HalfCauchy": lambda: -np.log1p((x / a) ** 2),
            "Exponential": lambda: -a * x,
            "LogNormal": lambda: -(((log - a) / b) ** 2) / 2 - log,
            "Uniform": lambda: np.where((x > a) & (x < b), 0.0, -np.inf),
            "Gamma": lambda: (a - 1) * log - b * x,
            "InverseGamma": lambda: -(a + 1) * log - b / x,
        }[self.family]()
        return _total(found)

    def constrain(self, y: Array) -> Constrained:
        if self.family == "Uniform":
            p = expit(y)
            with np.errstate(divide="ignore"):
                jacobian = np.log(p) + np.log1p(-p)
            return Constrained((self.second * p).reshape(-1, *self.shape), _total(jacobian))
        return Constrained(np.exp(y).reshape(-1, *self.shape), _total(y))

    def unconstrain(self, x: Array) -> Array:
        x = np.reshape(x, -1)
        return np.log(x) - np.log(self.second - x) if self.family == "Uniform" else np.log(x)

    def draw(self, rng: np.random.Generator) -> Array:
        low, high = np.log(self.truths)
        return self.unit * np.exp(rng.uniform(low, high, size=self.shape))


@dataclass(frozen=True)
class Share:
    """A number between 0 and 1 with a Beta prior."""

    a: float
    b: float
    shape: tuple[int, ...] = ()
    dim: int = 1

    def torch(self) -> Any:
        return dist.Beta(self.a, self.b)

    def log_density(self, x: Array) -> Array:
        return (self.a - 1) * np.log(x) + (self.b - 1) * np.log1p(-x)

    def constrain(self, y: Array) -> Constrained:
        p = expit(y[:, 0])
        return Constrained(p, np.log(p) + np.log1p(-p))

    def unconstrain(self, x: Array) -> Array:
        return np.reshape(np.log(x) - np.log1p(-x), -1)

    def draw(self, rng: np.random.Generator) -> Array:
        return np.asarray(rng.uniform(0.15, 0.4))


@dataclass(frozen=True)
class Ordered:
    """Cut points: normal numbers in increasing order, as ``OrderedTransform`` has them."""

    scale: float
    size: int = 3

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def dim(self) -> int:
        return self.size

    def torch(self) -> Any:
        base = dist.Normal(0.0, self.scale).expand([self.size]).to_event(1)
        return dist.TransformedDistribution(base, dist.transforms.OrderedTransform())

    def log_density(self, x: Array) -> Array:
        steps = np.log(np.diff(x, axis=1))  # the base has a normal density of the first, and of the log steps
        base = np.concatenate([x[:, :1], steps], axis=1)
        return -_total((base / self.scale) ** 2) / 2 - steps.sum(1)

    def constrain(self, y: Array) -> Constrained:
        steps = np.exp(y[:, 1:])
        return Constrained(np.cumsum(np.concatenate([y[:, :1], steps], axis=1), axis=1), y[:, 1:].sum(1))

    def unconstrain(self, x: Array) -> Array:
        return np.concatenate([x[:1], np.log(np.diff(x))])

    def draw(self, rng: np.random.Generator) -> Array:
        return np.sort(rng.uniform(-1.5, 1.5, size=1)) + np.cumsum(rng.uniform(0.5, 1.3, size=self.size)) - 1.5


@dataclass(frozen=True)
class Correlation:
    """The Cholesky factor of a correlation matrix, of two or three rows, with the LKJ density."""

    size: int
    concentration: float = 2.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size)

    @property
    def dim(self) -> int:
        return self.size * (self.size - 1) // 2

    def torch(self) -> Any:
        return dist.LKJCholesky(self.size, self.concentration)

    def log_density(self, x: Array) -> Array:
        rows = np.arange(1, self.size)
        powers = self.size - (rows + 1) + 2 * self.concentration - 2
        return np.log(x[:, rows, rows]) @ powers

    def constrain(self, y: Array) -> Constrained:
        z = np.tanh(y)  # partial correlations
        value = np.zeros((len(y), *self.shape))
        value[:, 0, 0] = 1.0
        jacobian = np.log1p(-(z**2)).sum(1)
        next_ = 0
        for row in range(1, self.size):
            left = np.ones(len(y))
            for column in range(row):
                value[:, row, column] = z[:, next_] * np.sqrt(left)
                jacobian = jacobian + np.log(left) / 2
                left = left * (1 - z[:, next_] ** 2)
                next_ += 1
            value[:, row, row] = np.sqrt(left)
        return Constrained(value, jacobian)

    def unconstrain(self, x: Array) -> Array:
        found = []
        for row in range(1, self.size):
            left = 1.0
            for column in range(row):
                z = x[row, column] / math.sqrt(left)
                found.append(np.arctanh(z))
                left *= 1 - z**2
        return np.array(found)

    def draw(self, rng: np.random.Generator) -> Array:
        return self.constrain(0.5 * rng.normal(size=(1, self.dim))).value[0]


Prior = Real | Positive | Share | Ordered | Correlation


def scale_prior(
    family: str, unit: float, rng: np.random.Generator, truths: tuple[float, float], size: int | None = None
) -> Positive:
    """A prior of a scale as people choose them, for data whose standard deviations are some ``unit``."""
    wide = float(rng.choice([1.0, 2.0, 5.0]))
    first, second = {
        "HalfNormal": (wide * unit, 0.0),
        "HalfCauchy": (wide * unit, 0.0),
        "Exponential": (1 / (min(wide, 2.0) * unit), 0.0),
        "LogNormal": (math.log(0.7 * unit), 1.0 if wide > 1 else 0.5),
        "Uniform": (0.0, max(5.0, 2 * wide) * unit),
        "Gamma": (2.0, 2.0 / unit),
        "InverseGamma": (2.0, unit),
    }[family]
    return Positive(family, first, second, unit, truths, size)


def as_torch(x: Array) -> torch.Tensor:
    """A tensor of torch's default dtype."""
    return torch.as_tensor(np.asarray(x), dtype=torch.get_default_dtype())
