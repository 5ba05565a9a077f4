"""Gold: the posterior of the globals of a hierarchy, by quadrature over units and importance sampling of the globals.

In NumPy and SciPy, from the density of ``silent_density.py``. Units are integrated over by Gauss-Hermite rules around
their modes, with more points until the log marginal density settles; the integrals are then checked against draws from
a wide proposal, which would find a mode that the rules have missed. The globals are drawn from mixtures of Student-t
distributions that are fitted to what was found, several times; two halves of the draws, with quasi-random sequences of
their own, tell the error. A gold that is not accurate enough says why in ``dropped``, and judges nothing.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import gammaln, logsumexp, ndtri
from scipy.stats import qmc
from silent_density import Hierarchy, element
from silent_priors import Array

NODES = {1: (7, 11, 17, 61, 121, 241), 2: (5, 7, 11, 17, 27, 39), 3: (5, 7, 9, 13, 17)}
MOST_HERMITE, REACH = 39, 9.0  # nodes of a Gauss-Hermite rule; beyond, equal steps over so many standard deviations
# Standard deviation over the posterior by which a finer rule may move the log marginal density: in nats, and so by how
# many standard deviations it may move a mean, at most. The first is aimed at; more than the second is no gold.
SETTLED, SETTLED_FAIRLY = 0.005, 0.02
NEWTON = 40  # steps for the mode of a unit, at most
CELLS = 400_000  # of an array at a time
DF = 5.0
LEAST_ROUNDS, ROUNDS, ROUND, HALF, MOST_HALVES = 3, 8, 1024, 2048, 8
ENOUGH = 2500  # effective draws, for a standard error of a mean of 0.02 standard deviations
COMPONENTS, ATTEMPTS = 8, 3
UNITS = 40  # whose moments are kept, at most
PROBABILITIES = (0.05, 0.5, 0.95)
AROUND = (0.02, 0.04, 0.02)  # of a probability that a quantile may miss its own by


# -------------------------------------------------------------------------------------------------------------- units


class _Start(NamedTuple):
    """Where modes are about: a linear function of coordinates less a center, ``(d + 1, N k)``."""

    center: Array
    coefficients: Array

    def at(self, y: Array, k: int) -> Array:
        found = self.coefficients[0] + (y - self.center) @ self.coefficients[1:]
        return np.nan_to_num(found).clip(-8.0, 8.0).reshape(len(y), -1, k)


class Integrals(NamedTuple):
    """Of units at points: log integrals ``(G, N)``; means ``(G, N, k)`` and covariances of u; the modes of e."""

    log: Array
    mean: Array
    cov: Array
    mode: Array


class Units:
    """Integrals over the units of a hierarchy, at many points of the globals at a time.

    Units are e = L^-1 u, standard normal given the globals.
    """

    def __init__(self, density: Hierarchy):
        self.density = density
        self.present, self.group = np.unique(density.group, return_inverse=True)
        self.starts = np.searchsorted(self.group, np.arange(len(self.present)))
        self.k = density.w.shape[1]
        self.start = _Start(np.zeros(density.dim), np.zeros((density.dim + 1, len(self.present) * self.k)))

    def log_posterior(self, y: Array, nodes: int) -> Array:
        """Return the log density of the globals at coordinates ``(G, d)``, up to a constant; minus infinity for NaN."""
        return np.concatenate([self._log_posterior(part, nodes) for part in self._chunks(y, nodes)])

    def integrals(self, y: Array, nodes: int) -> Integrals:
        """Return the integrals at coordinates, with the moments of all units, those without rows as well."""
        parts = [self._integrals(part, self.density.constrain(part)[0], nodes, True) for part in self._chunks(y, nodes)]
        return Integrals(*map(np.concatenate, zip(*parts, strict=True)))

    def sampled(self, y: Array, draws: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Return the log integrals at one point ``(d,)`` by importance sampling, and their errors, each ``(N,)``.

        Half of the draws are from the prior of a unit, half from a Student-t distribution at its mode.
        """
        values, _ = self.density.constrain(y[None])
        eta0, w = self._predictor(values)
        mode, root = self._modes(y[None], values, eta0, w)
        mode, root, k, n = mode[0], root[0], self.k, len(self.present)
        normal = rng.normal(size=(n, draws, k))
        t = normal[:, ::2] / np.sqrt(rng.chisquare(DF, size=(n, (draws + 1) // 2, 1)) / DF)
        e = normal.copy()
        e[:, ::2] = mode[:, None] + np.einsum("nij,nqj->nqi", root, t)
        standard = np.linalg.solve(root[:, None], (e - mode[:, None])[..., None])[..., 0]
        constant = gammaln((DF + k) / 2) - gammaln(DF / 2) - k / 2 * np.log(DF / 2)  # against (2 pi)^(-k/2)
        log_t = constant - (DF + k) / 2 * np.log1p((standard**2).sum(-1) / DF)
        log_t -= np.log(np.abs(np.linalg.det(root)))[:, None]
        log_prior = -(e**2).sum(-1) / 2
        eta = eta0[0][:, None] + (w[0][:, None, :] * e[self.group]).sum(-1)
        core = np.add.reduceat(self.density.core(eta[None], values)[0], self.starts, axis=0)
        log_ratio = log_prior + core - np.logaddexp(log_t, log_prior) + np.log(2.0)
        top = log_ratio.max(1, keepdims=True)
        weight = np.exp(log_ratio - top)
        mean = weight.mean(1)
        return top[:, 0] + np.log(mean), weight.std(1) / np.sqrt(draws) / mean

    def remember(self, y: Array) -> None:
        """Start the search for modes from a linear function of the globals that is fitted at ``(G, d)``."""
        values, _ = self.density.constrain(y)
        modes = self._modes(y, values, *self._predictor(values))[0].reshape(len(y), -1)
        center = y.mean(0)
        design = np.concatenate([np.ones((len(y), 1)), y - center], axis=1)
        ridge = 1e-6 * len(y) * np.eye(design.shape[1])
        self.start = _Start(center, np.linalg.solve(design.T @ design + ridge, design.T @ modes))

    def _chunks(self, y: Array, nodes: int) -> list[Array]:
        size = max(1, CELLS // (len(self.density.z) * nodes**self.k))
        return [y[i : i + size] for i in range(0, len(y), size)]

    def _log_posterior(self, y: Array, nodes: int) -> Array:
        with np.errstate(all="ignore"):
            values, jacobian = self.density.constrain(y)
            parts = self._integrals(y, values, nodes, False).log.sum(1), self.density.rest(values)
            found = self.density.log_prior(values) + jacobian + parts[0] + parts[1]
        return np.where(np.isnan(found), -np.inf, found)

    def _predictor(self, values: dict[str, Array]) -> tuple[Array, Array]:
        """The predictor without units ``(G, n)``, and what e is multiplied by, ``(G, n, k)``."""
        return self.density.beta(values) @ self.density.x.T, self.density.w @ self.density.root(values)

    def _summed(self, x: Array) -> Array:
        return np.add.reduceat(x, self.starts, axis=1)

    def _modes(self, y: Array, values: dict[str, Array], eta0: Array, w: Array) -> tuple[Array, Array]:
        """Modes of e ``(G, N, k)``, and square roots of the covariance there ``(G, N, k, k)``: both nearly."""
        e = self.start.at(y, self.k)
        information = np.empty((*e.shape, self.k))
        active = np.arange(len(e))
        for _ in range(NEWTON):
            some = {name: value[active] for name, value in values.items()}
            step, information[active] = self._newton_step(e[active], some, eta0[active], w[active])
            size = np.abs(step).max(-1, keepdims=True)
            e[active] = np.nan_to_num(e[active] + step * np.minimum(1.0, 2.0 / np.maximum(size, 1e-9)))
            active = active[(size > 0.02).any((1, 2))]
            if not len(active):
                break
        return e, np.linalg.inv(np.linalg.cholesky(information)).swapaxes(-1, -2)

    def _newton_step(self, e: Array, values: dict[str, Array], eta0: Array, w: Array) -> tuple[Array, Array]:
        """The step and the information, by differences of the likelihood of each row."""
        shift = np.array([-1e-4, 0.0, 1e-4])
        eta = eta0 + np.einsum("gnk,gnk->gn", w, e[:, self.group])
        low, middle, high = np.moveaxis(self.density.smooth(eta[..., None] + shift, values), -1, 0)
        slope = np.nan_to_num((high - low) / 2e-4, posinf=1e8, neginf=-1e8)
        curvature = np.nan_to_num(-(high - 2 * middle + low) / 1e-8, posinf=1e8, neginf=0.0).clip(0.0, 1e8)
        gradient = np.stack([self._summed(slope * w[..., i]) for i in range(self.k)], axis=-1) - e
        information = np.empty((*e.shape, self.k))
        for i, j in itertools.combinations_with_replacement(range(self.k), 2):
            information[..., i, j] = self._summed(curvature * w[..., i] * w[..., j]) + (i == j)
            information[..., j, i] = information[..., i, j]
        return np.linalg.solve(information, gradient[..., None])[..., 0], information

    def _integrals(self, y: Array, values: dict[str, Array], nodes: int, moments: bool) -> Integrals:
        eta0, w = self._predictor(values)
        mode, root = self._modes(y, values, eta0, w)
        x, log_weight = _rule(nodes, self.k)
        eta = eta0 + np.einsum("gnk,gnk->gn", w, mode[:, self.group])
        eta = eta[..., None] + np.einsum("gni,gnij->gnj", w, root[:, self.group]) @ x.T
        e = mode[:, :, None] + np.einsum("gnij,qj->gnqi", root, x)
        log = self._summed(self.density.core(eta, values)) - (e**2).sum(-1) / 2 + log_weight
        log = np.where(np.isnan(log), -np.inf, log)
        total = logsumexp(log, axis=-1)
        log_integral = total + np.log(np.abs(np.linalg.det(root)))
        if not moments:
            return Integrals(log_integral, mode, mode, mode)
        share = np.exp(log - total[..., None])
        mean = np.einsum("gnq,gnqi->gni", share, e)
        off = e - mean[:, :, None]
        cov = np.einsum("gnq,gnqi,gnqj->gnij", share, off, off)
        scale = self.density.root(values)
        full_mean = np.zeros((len(mean), self.density.num_units, self.k))
        full_cov = np.broadcast_to(np.eye(self.k), (*full_mean.shape, self.k)).copy()
        full_mean[:, self.present], full_cov[:, self.present] = mean, cov
        u_cov = scale[:, None] @ full_cov @ scale[:, None].swapaxes(-1, -2)
        return Integrals(log_integral, np.einsum("gij,gnj->gni", scale, full_mean), u_cov, mode)


def _rule(nodes: int, k: int) -> tuple[Array, Array]:
    """Points ``(Q, k)`` and log weights of an integral against a flat measure, over (2 pi)^(k/2)."""
    if nodes > MOST_HERMITE:
        x, step = np.linspace(-REACH, REACH, nodes, retstep=True)
        log_weight = np.full(nodes, np.log(step / np.sqrt(2 * np.pi)))
    else:
        x, weight = np.polynomial.hermite_e.hermegauss(nodes)
        log_weight = np.log(weight) + x**2 / 2 - np.log(2 * np.pi) / 2
    points = np.array(list(itertools.product(x, repeat=k)))
    return points, np.array([sum(one) for one in itertools.product(log_weight, repeat=k)])


# ------------------------------------------------------------------------------------------------------------ globals


class _Mixture(NamedTuple):
    """Student-t distributions: ``(M,)`` shares, ``(M, d)`` centers, ``(M, d, d)`` square roots of the scale."""

    share: Array
    loc: Array
    root: Array

    def draw(self, number: int, rng: np.random.Generator) -> Array:
        d = self.loc.shape[1]
        uniform = qmc.Sobol(d + 2, seed=rng).random(number).clip(1e-12, 1 - 1e-12)
        normal = ndtri(uniform[:, :d])
        stretch = np.sqrt(DF / _chi_square(uniform[:, d]))
        which = np.searchsorted(self.share.cumsum(), uniform[:, d + 1]).clip(max=len(self.share) - 1)
        return self.loc[which] + np.einsum("sij,sj->si", self.root[which], normal * stretch[:, None])

    def log_density(self, y: Array) -> Array:
        d = self.loc.shape[1]
        parts = []
        for share, loc, root in zip(self.share, self.loc, self.root, strict=True):
            square = (np.linalg.solve(root, (y - loc).T) ** 2).sum(0)
            constant = gammaln((DF + d) / 2) - gammaln(DF / 2) - d / 2 * np.log(DF * np.pi)
            log_det = np.log(np.abs(np.linalg.det(root)))
            parts.append(np.log(share) + constant - log_det - (DF + d) / 2 * np.log1p(square / DF))
        return logsumexp(parts, axis=0)


def _chi_square(uniform: Array) -> Array:
    from scipy.special import gammaincinv

    return 2 * gammaincinv(DF / 2, uniform)


def _around(loc: Array, root: Array, shares: dict[float, float]) -> _Mixture:
    """One center at several scales."""
    scales = np.array(list(shares))
    number = len(scales)
    return _Mixture(np.array(list(shares.values())), np.tile(loc, (number, 1)), scales[:, None, None] * root)


def _together(one: _Mixture, other: _Mixture, share: float) -> _Mixture:
    """Both, the other with a share."""
    shares = np.concatenate([one.share * (1 - share), other.share * share])
    return _Mixture(shares, np.concatenate([one.loc, other.loc]), np.concatenate([one.root, other.root]))


def _mode(units: Units, start: Array, nodes: int) -> tuple[Array, Array, float]:
    """Return a mode of the globals, a square root of the covariance there, and the log density."""
    d = len(start)
    eye = np.eye(d)

    def value_and_gradient(y: Array) -> tuple[float, Array]:
        found = units.log_posterior(np.concatenate([y[None], y + 1e-4 * eye, y - 1e-4 * eye]), nodes)
        found = np.where(np.isfinite(found), found, -1e10)
        return -found[0], -(found[1 : d + 1] - found[d + 1 :]) / 2e-4

    best = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": 200, "gtol": 1e-3})
    gradients = [value_and_gradient(best.x + sign * 1e-2 * row)[1] for row in eye for sign in (1, -1)]
    hessian = (np.array(gradients[::2]) - np.array(gradients[1::2])) / 2e-2
    level, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    return best.x, vectors / np.sqrt(np.clip(level, 0.05, None)), -float(best.fun)


def _fitted(y: Array, log_weight: Array) -> tuple[Array, Array]:
    """Mean and a square root of the covariance of weighted draws."""
    # Weights are cut so that a few draws do not make the covariance singular.
    cut = np.minimum(log_weight, logsumexp(log_weight) - np.log(3 * y.shape[1] + 10))
    weight = np.exp(cut - logsumexp(cut))
    mean = weight @ y
    cov = (weight[:, None] * (y - mean)).T @ (y - mean)
    level, vectors = np.linalg.eigh(cov)
    return mean, vectors * np.sqrt(np.clip(level, 1e-10 * level.max(), None))


def _clusters(y: Array, loc: Array, root: Array, rng: np.random.Generator) -> _Mixture:
    """A mixture fitted to draws of equal weights by the EM algorithm, in coordinates where their covariance is one."""
    d = len(loc)
    x = np.linalg.solve(root, (y - loc).T).T
    centers, covs = x[rng.choice(len(x), size=COMPONENTS)], np.tile(0.3 * np.eye(d), (COMPONENTS, 1, 1))
    share = np.full(COMPONENTS, 1 / COMPONENTS)
    for _ in range(20):
        off = x[:, None] - centers
        square = np.einsum("smi,mij,smj->sm", off, np.linalg.inv(covs), off)
        level = np.log(share) - square / 2 - np.linalg.slogdet(covs)[1] / 2
        member = np.exp(level - logsumexp(level, axis=1, keepdims=True))
        size = member.sum(0) + 1e-3
        centers = (member.T @ x) / size[:, None]
        off = x[:, None] - centers
        covs = (np.einsum("sm,smi,smj->mij", member, off, off) + 10 * 0.2 * np.eye(d)) / (size + 10)[:, None, None]
        share = size / size.sum()
    return _Mixture(share, loc + centers @ root.T, root @ np.linalg.cholesky(1.1 * covs))


@dataclass
class Gold:
    """Moments of the posterior, by element of the globals such as ``beta[1]``.

    :param int seed: of the case.
    :param str dropped: why this is no gold; empty if it is.
    :param list names: of the elements.
    :param list mean: of each.
    :param list sd: of each.
    :param list heavy: whether the second moment may not exist, so that quantiles are to be compared.
    :param list quantiles: for each element and each of ``PROBABILITIES`` the lowest and the highest that is right.
    :param float k_hat: shape of the tail of the weights.
    :param float effective: number of draws.
    :param float error: half the difference of two halves of the draws, of any mean in standard deviations, or of any
        standard deviation as a share: the largest, of some ten numbers each with a standard error of about half of it.
    :param int nodes: of the rule, along each dimension.
    :param float settled: standard deviation over the posterior by which a finer rule moves the log density.
    :param float missed: the largest difference of a log integral from draws, in nats beyond four standard errors.
    :param dict units: mean and standard deviation by site, of the first units, flat.
    :param float log_evidence: up to the constants that the density leaves out.
    :param float checksum: sum of the observations, so that other data are noticed.
    :param float seconds: of CPU.
    """

    seed: int
    dropped: str = ""
    names: list[str] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    sd: list[float] = field(default_factory=list)
    heavy: list[bool] = field(default_factory=list)
    quantiles: list[list[list[float]]] = field(default_factory=list)
    k_hat: float = np.nan
    effective: float = 0.0
    error: float = np.nan
    nodes: int = 0
    settled: float = np.nan
    missed: float = np.nan
    units: dict[str, list[list[float]]] = field(default_factory=dict)
    log_evidence: float = np.nan
    checksum: float = np.nan
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it with six digits, for a file."""
        return _short(asdict(self))


def _short(x: Any) -> Any:
    if isinstance(x, float):
        return float(f"{x:.6g}") if np.isfinite(x) else None
    if isinstance(x, dict):
        return {key: _short(value) for key, value in x.items()}
    return [_short(one) for one in x] if isinstance(x, list | tuple) else x


def gold(seed: int, density: Hierarchy, truth: dict[str, Array]) -> Gold:
    """Return the gold of a density, searched from the truth that its data were made with."""
    begun = time.process_time()
    found = Gold(seed, checksum=float(density.z.sum()))
    try:
        _fill(found, density, truth)
    except (np.linalg.LinAlgError, ValueError, FloatingPointError) as error:
        found.dropped = f"{type(error).__name__}: {error}"
    found.seconds = time.process_time() - begun
    return found


def _fill(found: Gold, density: Hierarchy, truth: dict[str, Array]) -> None:
    units, rng = Units(density), np.random.default_rng(found.seed)
    proposal = _first_proposal(units, density.unconstrain({name: value[0] for name, value in truth.items()}), rng)
    for _ in range(ATTEMPTS):
        found.nodes, proposal = _rounds(units, proposal, rng, found.nodes or NODES[units.k][0])
        halves = [_half(units, proposal, rng, found.nodes) for _ in range(2)]
        while _effective(np.concatenate([one[1] for one in halves])) < 1.2 * ENOUGH and len(halves) < MOST_HALVES:
            halves += [_half(units, proposal, rng, found.nodes) for _ in range(2)]
        if _k_hat(np.concatenate([one[1] for one in halves])) < 0.45:
            break
    y, log_weight = (np.concatenate(part) for part in zip(*halves, strict=True))
    found.log_evidence = float(logsumexp(log_weight) - np.log(len(y)))
    weight = np.exp(log_weight - logsumexp(log_weight))
    found.effective, found.k_hat = _effective(log_weight), _k_hat(log_weight)
    some = y[rng.choice(len(y), size=60 if units.k == 1 else 24, p=weight)]
    finer = [nodes for nodes in NODES[units.k] if nodes > found.nodes]
    found.settled = _change(units, some, found.nodes, finer[0] if finer else found.nodes + 4)
    found.missed = _missed(units, some[:4], found.nodes, rng)
    values = _elements(density, y)
    found.names = list(values)
    moments = [[_moments(one[part], log_weight[part]) for one in values.values()] for part in _parts(len(y))]
    both = [_moments(one, log_weight) for one in values.values()]
    for (name, one), (mean, sd) in zip(values.items(), both, strict=True):
        found.mean.append(mean)
        found.sd.append(sd)
        found.heavy.append(_is_heavy(density, name, one, mean, log_weight))
        found.quantiles.append(_right_quantiles(one, weight))
    light = ~np.array(found.heavy)
    off = [max(abs(a - b) / c[1], abs(s - t) / c[1]) for (a, s), (b, t), c in zip(*moments, both, strict=True)]
    found.error = float(np.max(np.array(off)[light], initial=0.0) / 2)
    found.units = _unit_moments(density, units, y[rng.choice(len(y), size=400, p=weight)], found.nodes)
    found.dropped = _reason(found)


def _reason(found: Gold) -> str:
    if not found.settled < SETTLED_FAIRLY:
        return f"the integrals over units do not settle: {found.settled:.2g} nats"
    if not found.missed < 0.1:
        return f"the integral of a unit is another by draws: {found.missed:.2g} nats"
    if not found.k_hat < 0.5:
        return f"k-hat {found.k_hat:.2f}"
    if not found.effective > ENOUGH:
        return f"{found.effective:.0f} draws"
    return f"error {found.error:.3f}" if not found.error < 0.035 else ""


def _first_proposal(units: Units, truth: Array, rng: np.random.Generator) -> _Mixture:
    """Around the modes found from the truth, from two points beside it, and from other periods of the intercept."""
    period = units.density.likelihood.period
    others = [truth + period * turns * (np.arange(len(truth)) == 0) for turns in (-2, -1, 1, 2) if period]
    starts = [truth, *(truth + rng.normal(size=(2, len(truth)))), *others]
    modes = [_mode(units, start, NODES[units.k][0]) for start in starts]
    top = max(level for *_, level in modes)
    proposals: list[_Mixture] = []
    for loc, root, level in sorted(modes, key=lambda one: -one[2]):
        if level > top - 12 and not any(_is_known(loc, one) for one in proposals):
            proposals.append(_around(loc, root, {1.0: 0.6, 2.0: 0.3, 4.0: 0.1}))
    units.remember(proposals[0].loc[:1])
    loc, root = (np.concatenate([getattr(one, name) for one in proposals]) for name in ("loc", "root"))
    return _Mixture(np.tile(proposals[0].share / len(proposals), len(proposals)), loc, root)


def _is_known(loc: Array, proposal: _Mixture) -> bool:
    off = [np.linalg.solve(root, loc - center) for center, root in zip(proposal.loc, proposal.root, strict=True)]
    return bool(min(np.abs(one).max() for one in off) < 0.5)


def _rounds(units: Units, first: _Mixture, rng: np.random.Generator, nodes: int) -> tuple[int, _Mixture]:
    """Fit the proposal to what it finds, several times, and see which rule settles there."""
    proposal, drawn = first, []
    for number in range(ROUNDS):
        y = proposal.draw(ROUND, rng)
        drawn.append((y, units.log_posterior(y, nodes), proposal))
        all_y = np.concatenate([one[0] for one in drawn])
        mixed = logsumexp([one[2].log_density(all_y) for one in drawn], axis=0) - np.log(len(drawn))
        log_weight = np.concatenate([one[1] for one in drawn]) - mixed
        loc, root = _fitted(all_y, log_weight)
        wide = _together(_around(loc, root, {1.2: 0.4, 2.0: 0.4, 4.0: 0.2}), first, 0.3)
        weight = np.exp(log_weight - logsumexp(log_weight))
        proposal = _together(_clusters(all_y[rng.choice(len(all_y), size=1500, p=weight)], loc, root, rng), wide, 0.4)
        if (
            number + 1 >= LEAST_ROUNDS
            and _k_hat(log_weight[-ROUND:]) < 0.4
            and 2 * _effective(log_weight[-ROUND:]) > ROUND
        ):
            break
        if number == 0:
            units.remember(all_y[rng.choice(len(all_y), size=100 + 20 * len(loc), p=weight)])
            nodes = _settling(units, all_y[rng.choice(len(all_y), size=30, p=weight)])
    return nodes, proposal


def _settling(units: Units, y: Array) -> int:
    """The fewest nodes that the next finer rule does not move."""
    rules = NODES[units.k]
    values = units.log_posterior(y, rules[0])
    for coarse, fine in itertools.pairwise(rules):
        finer = units.log_posterior(y, fine)
        if np.std(finer - values) < SETTLED:
            return coarse
        values = finer
    return rules[-1]


def _change(units: Units, y: Array, coarse: int, fine: int) -> float:
    return float(np.std(units.log_posterior(y, fine) - units.log_posterior(y, coarse)))


def _missed(units: Units, y: Array, nodes: int, rng: np.random.Generator) -> float:
    worst = 0.0
    for one in y:
        log, error = units.sampled(one, 4000, rng)
        worst = max(worst, float((np.abs(log - units.integrals(one[None], nodes).log[0]) - 4 * error).max()))
    return worst


def _effective(log_weight: Array) -> float:
    return float(np.exp(2 * logsumexp(log_weight) - logsumexp(2 * log_weight)))


def _half(units: Units, proposal: _Mixture, rng: np.random.Generator, nodes: int) -> tuple[Array, Array]:
    y = proposal.draw(HALF, rng)
    return y, units.log_posterior(y, nodes) - proposal.log_density(y)


def _parts(number: int) -> tuple[slice, slice]:
    return slice(None, number // 2), slice(number // 2, None)


def _moments(x: Array, log_weight: Array) -> tuple[float, float]:
    weight = np.exp(log_weight - logsumexp(log_weight))
    mean = weight @ x
    return float(mean), float(np.sqrt(weight @ (x - mean) ** 2))


def _elements(density: Hierarchy, y: Array) -> dict[str, Array]:
    """Values of all elements of the globals, those that are constants left out."""
    values, _ = density.constrain(y)
    found = {}
    for name, value in values.items():
        flat = value.reshape(len(value), -1)
        for place, index in enumerate(np.ndindex(value.shape[1:])):
            if np.ptp(flat[:, place]) > 0:
                found[name + (f"[{', '.join(map(str, index))}]" if index else "")] = flat[:, place]
    return found


def _k_hat(log_weight: Array) -> float:
    """Shape of the generalized Pareto distribution of the largest weights (Zhang and Stephens, 2009)."""
    size = int(min(0.2 * len(log_weight), 3 * np.sqrt(len(log_weight))))
    weight = np.sort(np.exp(log_weight - log_weight.max()))
    tail = weight[-size:] - weight[-size - 1]
    if tail[-1] <= 0 or np.ptp(tail) == 0:
        return -np.inf
    number = 30 + int(np.sqrt(size))
    b = 1 / tail[-1] + (1 - np.sqrt(number / (np.arange(1, number + 1) - 0.5))) / (3 * tail[int(size / 4 + 0.5) - 1])
    k = np.array([np.log1p(-one * tail).mean() for one in b])
    with np.errstate(all="ignore"):
        level = size * (np.log(-b / k) - k - 1)
    share = np.exp(level - logsumexp(level))
    center = (b * share).sum()
    return float(np.log1p(-center * tail).mean())


def _is_heavy(density: Hierarchy, name: str, x: Array, mean: float, log_weight: Array) -> bool:
    """Whether the second moment may not exist: by the prior where data cannot tell, or by the draws."""
    prior = density.priors[name.split("[")[0]]
    if density.likelihood.bounded and getattr(prior, "family", "") in ("HalfCauchy", "InverseGamma"):
        return True
    with np.errstate(divide="ignore"):
        return bool(_k_hat(log_weight + 2 * np.log(np.abs(x - mean))) > 0.5)


def _right_quantiles(x: Array, weight: Array) -> list[list[float]]:
    order = np.argsort(x)
    share = np.cumsum(weight[order])
    bounds = [(p - off, p + off) for p, off in zip(PROBABILITIES, AROUND, strict=True)]
    return [[float(x[order][np.searchsorted(share, p).clip(max=len(x) - 1)]) for p in pair] for pair in bounds]


def _unit_moments(density: Hierarchy, units: Units, y: Array, nodes: int) -> dict[str, list[list[float]]]:
    """Means and standard deviations of the sites of units, from draws of the globals."""
    values, _ = density.constrain(y)
    given = units.integrals(y, nodes)
    found = {}
    for name, site in density.sites.items():
        columns: NDArray[np.intp] = np.array(site.columns)
        mean = given.mean[:, :, columns]
        variance = np.diagonal(given.cov, axis1=-2, axis2=-1)[:, :, columns]
        if site.standard:
            scale = density.scale(values)[:, None, columns]
            mean, variance = mean / scale, variance / scale**2
        if site.fixed is not None:
            mean = mean + element(values, site.fixed)[:, None, None]
        sd = np.sqrt(variance.mean(0) + mean.var(0))
        found[name] = [part[:UNITS].ravel().tolist() for part in (mean.mean(0), sd)]
    return found
