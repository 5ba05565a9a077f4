"""Exact posteriors of the Poisson task by brute-force quadrature, to judge approximate ones against.

Run ``python benchmarks/exact.py``; ``--units 100 2000 100000`` and ``--seed 0`` choose.

The model is ``poisson`` of ``rivals/tasks.py``: for the counts z_ji, j = 1, ..., J, of each unit i,

    mu ~ N(0, 3),    log_tau ~ N(0, 1),    y_i ~ N(mu, exp(log_tau)),    z_ji ~ Poisson(exp(y_i)).

NumPy and SciPy only, so that nothing is shared with the package under test. Given mu and log_tau a unit's y has a grid
of its own: equal steps over all that is within ``DROP`` nats of the mode, where the trapezoid rule converges faster
than any power of the step. Units of the same sum of counts have the same likelihood up to a constant, so that there are
as many integrals as distinct sums, some 100 whatever the number of units. The grid of log_tau has equal steps over all
that matters, found by zooming in from where the prior has mass. Each log_tau has a grid of mu of its own, placed by the
mean and the standard deviation given log_tau: the posterior of few units is a funnel, but mu is log-concave given
log_tau.

The check is the same again with twice the steps on every axis, and over more of mu and of log_tau: what changes is the
error.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tabulate
from numpy.typing import NDArray
from rivals.tasks import simulate_poisson
from scipy.special import gammaln, logsumexp, wrightomega

Array = NDArray[np.float64]

PRIOR_SD = np.array([3.0, 1.0])  # of mu and log_tau, whose prior means are zero
LOCAL_STEPS = 80  # over the window of a unit's y
MU_STEPS = 40  # over that of mu given log_tau
LOG_TAU_STEPS = 60
DROP = 40.0  # nats below its mode at which the density of y is cut off
MAX_CELLS = 50_000  # of arrays at a time


@dataclass(frozen=True)
class Reference:
    """A posterior, by the names ``mu``, ``log_tau`` and ``y``.

    :param dict mean: posterior means: of shape ``()``, ``()`` and ``(N,)``.
    :param dict sd: posterior standard deviations, alike.
    :param float log_evidence: log density of the data, with all constants.
    """

    mean: dict[str, Array]
    sd: dict[str, Array]
    log_evidence: float


def poisson_posterior(z: Array, resolution: int = 1, grouped: bool = True) -> Reference:
    """The posterior given counts.

    :param z: counts of each unit, ``(J, N)``.
    :param int resolution: multiplies the numbers of steps of all grids; those of mu and log_tau cover more as well.
    :param bool grouped: whether units of the same sum share their integrals. It saves time and changes nothing.
    :return: means, standard deviations and log evidence.
    """
    z = np.asarray(z, dtype=np.float64)
    totals = z.sum(0)
    if grouped:
        sums, group, sizes = np.unique(totals, return_inverse=True, return_counts=True)
    else:
        sums, group, sizes = totals, np.arange(len(totals)), np.ones(len(totals), dtype=np.intp)
    units = _Units(sums, sizes.astype(np.float64), len(z), LOCAL_STEPS * resolution)

    log_tau = _window(units, 20.0 + 10.0 * resolution, LOG_TAU_STEPS * resolution)
    centre, sd, _ = _mu_laplace(units, log_tau)
    for _ in range(10):
        old, old_sd = centre, sd
        mu, value, _ = _grid(units, log_tau, centre, sd, 1)
        weight = np.exp(value - logsumexp(value, axis=1, keepdims=True))
        centre, sd = _moments(mu, weight, axis=1)
        if max(np.abs((centre - old) / sd).max(), np.abs(np.log(sd / old_sd)).max()) < 0.01:
            break
    mu, value, y = _grid(units, log_tau, centre, sd, resolution)
    log_total = logsumexp(value)
    weight = np.exp(value - log_total)
    mu_moments, log_tau_moments = _moments(mu, weight), _moments(log_tau[:, None], weight)
    y_mean = weight.ravel() @ y.mean
    y_sd = np.sqrt(weight.ravel() @ (y.variance + (y.mean - y_mean) ** 2))
    return Reference(
        {"mu": mu_moments[0], "log_tau": log_tau_moments[0], "y": y_mean[group]},
        {"mu": mu_moments[1], "log_tau": log_tau_moments[1], "y": y_sd[group]},
        float(log_total - gammaln(z + 1).sum()),
    )


def largest_change(one: Reference, other: Reference) -> float:
    """The largest difference of a mean or a standard deviation, in standard deviations of ``other``."""
    return max(
        float(np.max(np.abs(of_one[name] - of_other[name]) / other.sd[name]))
        for of_one, of_other in ((one.mean, other.mean), (one.sd, other.sd))
        for name in other.sd
    )


class _Units(NamedTuple):
    """Groups of units: their sums ``(S,)`` and sizes ``(S,)``, the counts of a unit, and the steps over a window."""

    sums: Array
    sizes: Array
    num_counts: int
    steps: int


class _Conditional(NamedTuple):
    """Given globals: log normalizer, mean and variance of y, each ``(G, S)``."""

    log_normalizer: Array
    mean: Array
    variance: Array


def _conditional(units: _Units, theta: Array) -> _Conditional:
    """Integrals over y.

    :param theta: globals ``(G, 2)``.
    """
    chunk = max(1, MAX_CELLS // (len(units.sums) * (units.steps + 1)))
    parts = [_conditional_chunk(units, theta[i : i + chunk]) for i in range(0, len(theta), chunk)]
    return _Conditional(*map(np.concatenate, zip(*parts, strict=True)))


def _conditional_chunk(units: _Units, theta: Array) -> _Conditional:
    s, j = units.sums, units.num_counts
    mu, tau = theta[:, :1], np.exp(theta[:, 1:])
    # The mode solves (y - mu) / tau^2 + J exp(y) = s, which is an equation of the Wright omega function.
    y0 = mu + tau**2 * s
    mode = y0 - wrightomega(y0 + np.log(j * tau**2))
    rate = j * np.exp(mode)
    slope = s - rate - (mode - mu) / tau**2  # zero but for rounding

    def log_density(u: Array, slope: Array, rate: Array, tau: Array) -> Array:
        return slope * u - rate * (np.expm1(u) - u) - (u / tau) ** 2 / 2  # at mode + u, less that at the mode

    # Curvature grows with y. It is that of the mode at least on the right, and 1 / tau^2 at least on the left, where
    # Newton steps narrow the window: the log density is concave, so that they stay outside the point they aim at.
    right = np.minimum(np.sqrt(2 * DROP / (rate + tau**-2)), np.maximum(2.0, np.log(2 * DROP / rate)))
    left = -np.sqrt(2 * DROP) * tau + 0 * right
    for _ in range(6):
        left -= (log_density(left, slope, rate, tau) + DROP) / (slope - rate * np.expm1(left) - left / tau**2)
    step = (right - left) / units.steps
    u = left[..., None] + step[..., None] * np.arange(units.steps + 1)
    weight = np.exp(log_density(u, slope[..., None], rate[..., None], tau[..., None]))
    total = weight.sum(-1)
    mean = (weight * u).sum(-1) / total
    variance = (weight * (u - mean[..., None]) ** 2).sum(-1) / total
    at_mode = s * mode - rate - ((mode - mu) / tau) ** 2 / 2 - np.log(tau) - np.log(2 * np.pi) / 2
    return _Conditional(at_mode + np.log(total * step), mode + mean, variance)


def _log_posterior(units: _Units, theta: Array) -> tuple[Array, _Conditional]:
    """Log joint density of globals and data, but for the log factorials: ``(G,)``, and y."""
    y = _conditional(units, theta)
    log_prior = -((theta / PRIOR_SD) ** 2).sum(1) / 2 - np.log(2 * np.pi * PRIOR_SD.prod())
    return log_prior + y.log_normalizer @ units.sizes, y


def _mu_laplace(units: _Units, log_tau: Array) -> tuple[Array, Array, Array]:
    """Of mu given each log_tau ``(L,)``: near its mode, a standard deviation, and the Laplace approximation of log_tau.

    :raises RuntimeError: if Newton's method does not get near a mode.
    """
    mean_count = units.sums @ units.sizes / (units.sizes.sum() * units.num_counts)
    mu = np.full_like(log_tau, np.log(mean_count + 0.1))
    tau2 = np.exp(2 * log_tau)
    for _ in range(100):
        value, y = _log_posterior(units, np.stack([mu, log_tau], axis=-1))
        # By the identities of Fisher and Louis, from moments of the gradient of log N(y; mu, tau).
        slope = ((y.mean - mu[:, None]) @ units.sizes) / tau2 - mu / PRIOR_SD[0] ** 2
        curvature = ((1 - y.variance / tau2[:, None]) @ units.sizes) / tau2
        sd = (np.maximum(curvature, 0.0) + PRIOR_SD[0] ** -2) ** -0.5
        if np.all(np.abs(slope) * sd < 0.1):
            return mu, sd, value + np.log(sd) + np.log(2 * np.pi) / 2
        mu = mu + np.clip(slope * sd**2, -1.0, 1.0)
    raise RuntimeError("Newton's method did not find the mode of mu given log_tau")


def _window(units: _Units, drop: float, steps: int) -> Array:
    """Equal steps over the log_tau whose log density is within ``drop`` of the highest."""
    low, high = -9.0 * PRIOR_SD[1], 9.0 * PRIOR_SD[1]
    while True:
        log_tau = np.linspace(low, high, 41)
        density = _mu_laplace(units, log_tau)[2]
        (kept,) = np.nonzero(density > density.max() - drop)
        first, last = max(kept[0] - 1, 0), min(kept[-1] + 1, 40)
        low, high = log_tau[first], log_tau[last]
        if last - first > 30:
            return np.linspace(low, high, steps + 1)


def _grid(
    units: _Units, log_tau: Array, centre: Array, sd: Array, resolution: int
) -> tuple[Array, Array, _Conditional]:
    """The mu for each log_tau, and the log weights of all pairs, each ``(L, M)``; and the y given them."""
    half_width = 6.0 + resolution
    x, step = np.linspace(-half_width, half_width, MU_STEPS * resolution + 1, retstep=True)
    mu = centre[:, None] + sd[:, None] * x
    theta = np.stack(np.broadcast_arrays(mu, log_tau[:, None]), axis=-1)
    value, y = _log_posterior(units, theta.reshape(-1, 2))
    cell = step * sd * (log_tau[1] - log_tau[0])
    return mu, value.reshape(mu.shape) + np.log(cell)[:, None], y


def _moments(x: Array, weight: Array, axis: int | None = None) -> tuple[Array, Array]:
    """Mean and standard deviation, along an axis or of all; the weights sum to one."""
    mean = np.asarray((weight * x).sum(axis))
    off = x - (mean if axis is None else np.expand_dims(mean, axis))
    return mean, np.asarray(np.sqrt((weight * off**2).sum(axis)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--units", type=int, nargs="+", default=[100, 2000, 100_000], metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the data: simulate_poisson(N, default_rng(seed))")
    chosen = parser.parse_args()
    rows = []
    for num_units in chosen.units:
        z = simulate_poisson(num_units, np.random.default_rng(chosen.seed))["z"]
        start = time.perf_counter()
        found = poisson_posterior(z)
        elapsed = time.perf_counter() - start
        finer = poisson_posterior(z, resolution=2)
        globals_ = [float(part[name]) for name in ("mu", "log_tau") for part in (found.mean, found.sd)]
        errors = largest_change(found, finer), abs(found.log_evidence - finer.log_evidence)
        rows.append((num_units, *globals_, found.log_evidence, *errors, elapsed))
    columns = ("N", "mu", "sd", "log_tau", "sd", "log evidence", "error / sd", "of log evidence", "seconds")
    formats = ("d", ".6f", ".6f", ".6f", ".6f", ".6f", ".1e", ".1e", ".2f")
    print(tabulate.tabulate(rows, columns, floatfmt=formats))
    print("error: of any mean or sd of mu, log_tau or a y, from all resolutions doubled; seconds: without that check")


if __name__ == "__main__":
    main()
