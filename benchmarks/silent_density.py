"""The density of a hierarchy in NumPy: globals, normal units, and observations of a linear predictor.

    eta_j = X_j beta + Z_j u_g(j),    u_i ~ N(0, L L^T),    z_j ~ likelihood(eta_j, aux)

where beta, L and aux are of the globals. A site of a model may be some columns of u, moved by elements of beta, or
divided by its scale. The package and Pyro are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from silent_likelihoods import LIKELIHOODS, Likelihood
from silent_priors import Array, Prior

Values = Mapping[str, Array]


class UnitSite(NamedTuple):
    """How a site of the model comes of u.

    :param columns: of u, one for a site of numbers, all for a site of vectors.
    :param fixed: element of the globals that the site is centered at, as ``("mu", None)``; None for zero.
    :param bool standard: whether the site is u divided by its scale.
    """

    columns: tuple[int, ...]
    fixed: tuple[str, int | None] | None = None
    standard: bool = False


@dataclass(frozen=True)
class Hierarchy:
    """A density.

    :param dict priors: of all globals, by name, in the order of the coordinates.
    :param tuple fixed: what stands for beta: an element of the globals for each column of X.
    :param tuple scales: element of the globals for each column of Z.
    :param correlation: name of the Cholesky factor of a correlation matrix; None for independent columns.
    :param str family: name of the likelihood.
    :param Array x: ``(n, P)``, rows in order of their units.
    :param Array w: ``(n, k)``, what is Z above.
    :param Array z: ``(n,)``.
    :param group: unit of each row, ``(n,)``.
    :param int num_units: some may have no rows.
    :param dict sites: how the sites of units come of u.
    """

    priors: dict[str, Prior]
    fixed: tuple[tuple[str, int | None], ...]
    scales: tuple[tuple[str, int | None], ...]
    correlation: str | None
    family: str
    x: Array
    w: Array
    z: Array
    group: NDArray[np.intp]
    num_units: int
    sites: dict[str, UnitSite]

    @property
    def dim(self) -> int:
        """Number of coordinates of the globals."""
        return sum(prior.dim for prior in self.priors.values())

    @property
    def likelihood(self) -> Likelihood:
        return LIKELIHOODS[self.family]

    def constrain(self, y: Array) -> tuple[dict[str, Array], Array]:
        """Return values of globals at unconstrained coordinates ``(G, d)``, and the log Jacobian ``(G,)``."""
        values, jacobian, begin = {}, np.zeros(len(y)), 0
        for name, prior in self.priors.items():
            values[name], part = prior.constrain(y[:, begin : begin + prior.dim])
            jacobian, begin = jacobian + part, begin + prior.dim
        return values, jacobian

    def unconstrain(self, values: Values) -> Array:
        """Return the coordinates ``(d,)`` of values of one point."""
        return np.concatenate([prior.unconstrain(values[name]) for name, prior in self.priors.items()])

    def log_prior(self, values: Values) -> Array:
        """Return the log density of values ``(G, *shape)``, ``(G,)``."""
        return np.sum([prior.log_density(values[name]) for name, prior in self.priors.items()], axis=0)

    def beta(self, values: Values) -> Array:
        """Return ``(G, P)``."""
        return np.stack([element(values, one) for one in self.fixed], axis=-1)

    def scale(self, values: Values) -> Array:
        """Return scales of the columns of u, ``(G, k)``."""
        return np.stack([element(values, one) for one in self.scales], axis=-1)

    def root(self, values: Values) -> Array:
        """Return L, ``(G, k, k)``."""
        scale = self.scale(values)
        if self.correlation is None:
            return scale[:, :, None] * np.eye(scale.shape[1])
        return scale[:, :, None] * values[self.correlation]

    def core(self, eta: Array, values: Values) -> Array:
        """Return the part of the log likelihood of rows that depends on the predictor ``(G, n, Q)``."""
        return self.likelihood.core(eta, self.z[:, None], self._aux(values, 2))

    def smooth(self, eta: Array, values: Values) -> Array:
        """Return the same, or what stands for it in a search for modes."""
        return (self.likelihood.smooth or self.likelihood.core)(eta, self.z[:, None], self._aux(values, 2))

    def rest(self, values: Values) -> Array:
        """Return the sum over rows of the other part, ``(G,)``."""
        return self.likelihood.rest(self.z, self._aux(values, 1)).sum(1)

    def log_joint(self, values: Values, u: Array) -> float:
        """Return the log density of all at one point, the globals ``(1, *shape)`` and u ``(N, k)``: up to a constant.

        Of u as it is: a site that is u divided by its scale has a Jacobian.
        """
        eta = self.x @ self.beta(values)[0] + (self.w * u[self.group]).sum(1)
        root = self.root(values)[0]
        standard = np.linalg.solve(root, u.T)
        units = -(standard**2).sum() / 2 - len(u) * np.log(np.diag(root)).sum()
        found = self.core(eta[None, :, None], values).sum() + self.rest(values)[0] + self.log_prior(values)[0] + units
        return float(found)

    def _aux(self, values: Values, axes: int) -> dict[str, Array]:
        """Values of the globals with axes behind the first."""
        return {name: value.reshape(len(value), *[1] * axes, *value.shape[1:]) for name, value in values.items()}


def element(values: Values, one: tuple[str, int | None]) -> Array:
    """Return an element of the globals, ``(G,)``."""
    name, index = one
    return values[name] if index is None else values[name][:, index]
