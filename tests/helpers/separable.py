"""Log joints of several units in plain torch: random ones, and ones whose mode is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers.strategies import TERMS, Problem, seeds, standard_normal


@dataclass
class Separable:
    """A random smooth log joint of units that are independent given the globals, and a point, from a seed.

    The point is no mode, and the tails there need not be positive definite.
    """

    global_dim: int = 1
    num_units: int = 1
    local_dim: int = 1
    terms: tuple[str, ...] = ()
    seed: int = 0

    global_: Tensor = field(init=False, repr=False)
    local: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Draw a unit after another."""
        shapes = {"theta_shape": (self.global_dim,), "y_shape": (self.local_dim,)}
        self.units = [Problem(**shapes, terms=self.terms, seed=self.seed + i) for i in range(self.num_units)]
        self.global_ = standard_normal(self.global_dim, seed=self.seed)
        self.local = standard_normal(self.num_units, self.local_dim, seed=self.seed + 1)

    @property
    def point(self) -> tuple[Tensor, Tensor]:
        return self.global_, self.local

    def log_joint(self, global_: Tensor, local: Tensor) -> Tensor:
        prior = -(global_**2).sum() / 2
        return prior + sum(unit.log_joint(global_, y) for unit, y in zip(self.units, local.unbind(0), strict=True))


def separable(max_global: int = 3, max_local: int = 3) -> st.SearchStrategy[Separable]:
    return st.builds(
        Separable,
        global_dim=st.integers(1, max_global),
        num_units=st.integers(1, 3),
        local_dim=st.integers(1, max_local),
        terms=st.lists(st.sampled_from(sorted(TERMS)), max_size=2).map(tuple),
        seed=seeds,
    )


def lambert_w(x: Tensor) -> Tensor:
    """The solution w of w + log w = x, that is W(exp x), by Newton's method; the last steps have its derivatives."""
    w = torch.where(x > 1, x, x.exp()).detach()
    for _ in range(8):
        w = w * (1 + x.detach() - w.log()) / (1 + w)
    for _ in range(3):  # exact to seventh order
        w = w * (1 + x - w.log()) / (1 + w)
    return w


@dataclass
class KnownMode:
    r"""Units :math:`y_i = A u_i + b(\theta)` whose :math:`u_{ij}` are independent and have their mode in closed form.

    :math:`u_{ij}` is normal given the globals, its mean and log precision linear in them. ``normal`` data have a
    precision that depends on the globals; ``poisson`` data are counts with log rate u.
    """

    family: str = "poisson"
    global_dim: int = 2
    num_units: int = 3
    local_dim: int = 2
    seed: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Draw coefficients, data and a point."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        n, k, d = self.num_units, self.local_dim, self.global_dim
        self.loading = torch.eye(k, dtype=torch.float64) + 0.3 * draw(k, k) / k
        self.mean, self.log_precision, self.shift = (0.4 * draw(n, k, d) for _ in range(3))
        self.data = draw(n, k) if self.family == "normal" else torch.poisson(draw(n, k).exp(), generator=generator)
        self.global_ = draw(d)

    def log_joint(self, global_: Tensor, local: Tensor) -> Tensor:
        u = torch.linalg.solve(self.loading, (local - self._shifted(global_)).unsqueeze(-1)).squeeze(-1)
        mean, precision, z = self.mean @ global_, (self.log_precision @ global_).exp(), self.data
        prior = precision.log() / 2 - precision * (u - mean) ** 2 / 2
        poisson, normal = z * u - u.exp(), precision.log() - precision**2 * (z - u) ** 2 / 2
        data = normal if self.family == "normal" else poisson
        return -(global_**2).sum() / 2 + self.weight * (prior + data).sum()

    def mode(self, global_: Tensor) -> Tensor:
        mean, precision, z = self.mean @ global_, (self.log_precision @ global_).exp(), self.data
        if self.family == "normal":
            u = (mean + precision * z) / (1 + precision)
        else:
            u = mean + z / precision - lambert_w(mean + z / precision - precision.log())
        return u @ self.loading.mT + self._shifted(global_)

    def unit(self, index: int) -> KnownMode:
        """One unit alone, without a weight."""
        other = replace(self, num_units=1, weight=1.0)
        for name in ("mean", "log_precision", "shift", "data"):
            setattr(other, name, getattr(self, name)[index : index + 1])
        other.loading, other.global_ = self.loading, self.global_
        return other

    def _shifted(self, global_: Tensor) -> Tensor:
        return (self.shift @ global_).sin()


def known_modes(max_global: int = 4, max_local: int = 3) -> st.SearchStrategy[KnownMode]:
    return st.builds(
        KnownMode,
        family=st.sampled_from(["poisson", "normal"]),
        global_dim=st.integers(1, max_global),
        num_units=st.integers(1, 3),
        local_dim=st.integers(1, max_local),
        seed=seeds,
        weight=st.sampled_from([1.0, 4.0, 2.5]),
    )


def dense_information(log_joint: Callable[[Tensor, Tensor], Tensor], global_: Tensor, local: Tensor) -> Tensor:
    """The negative Hessian ``(d + N k, d + N k)`` by torch.func."""

    def flat(values: Tensor) -> Tensor:
        return log_joint(values[: len(global_)], values[len(global_) :].reshape(local.shape))

    return -torch.func.hessian(flat)(torch.cat([global_, local.reshape(-1)]))


def assemble(head: Tensor, border: Tensor, tail: Tensor) -> Tensor:
    """The blocks as one matrix, slowly; torch.func may differentiate it."""
    border = border.reshape(-1, len(head))
    return torch.cat([torch.cat([head, border.mT], 1), torch.cat([border, torch.block_diag(*tail)], 1)])
