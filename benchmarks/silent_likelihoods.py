"""Likelihoods of a linear predictor twice: as Pyro distributions, and as densities in NumPy.

``core`` is the part of the log density that depends on the predictor, ``rest`` what does not. In both, values of the
auxiliary globals have enough dimensions behind that of the globals to broadcast; a vector keeps its own last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
from scipy.special import expit, gammaln, i0e
from silent_priors import Array, Ordered, Positive, Prior, Share, scale_prior

Aux = Mapping[str, Any]
TRIALS = 10


@dataclass(frozen=True)
class Likelihood:
    """Observations given a predictor.

    :param core: ``(eta (G, n, Q), z (n, 1), aux) -> (G, n, Q)``.
    :param rest: ``(z (n,), aux) -> (G, n)``.
    :param draw: ``(rng, eta (n,), aux) -> z (n,)``.
    :param pyro: ``(eta, aux) -> Distribution``, of tensors.
    :param aux: ``(rng, unit, family) -> priors by name``: of a scale, of the family that the model has for scales.
    :param loc: of the predictor, in the data.
    :param bool bounded: whether observations say nothing against scales without end.
    :param float period: of the predictor: another intercept, so far away, is as likely; 0 for none.
    :param smooth: stands for ``core`` where modes are searched, if that has kinks or is not concave.
    """

    core: Callable[[Array, Array, Aux], Array]
    rest: Callable[[Array, Aux], Array]
    draw: Callable[[np.random.Generator, Array, Aux], Array]
    pyro: Callable[[Any, Aux], Any]
    aux: Callable[[np.random.Generator, float, str], dict[str, Prior]] = lambda rng, unit, family: {}
    loc: float = 0.0
    bounded: bool = False
    period: float = 0.0
    smooth: Callable[[Array, Array, Aux], Array] | None = None


def softplus(x: Array) -> Array:
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))  # half the time of logaddexp


def _nothing(z: Array, aux: Aux) -> Array:
    return np.zeros((1, len(z)))


def _noise(rng: np.random.Generator, unit: float, family: str) -> dict[str, Prior]:
    return {"sigma": scale_prior(family, unit, rng, (0.3, 1.5))}


def _shape(rng: np.random.Generator, unit: float, family: str) -> dict[str, Prior]:
    return {"shape": scale_prior(family, 2.0, rng, (0.5, 2.0))}


def _gate(rng: np.random.Generator, unit: float, family: str) -> dict[str, Prior]:
    return {"gate": Share(2.0, 4.0)}


def _cuts(rng: np.random.Generator, unit: float, family: str) -> dict[str, Prior]:
    return {"cut": Ordered(2.0)}


def _direction(rng: np.random.Generator, unit: float, family: str) -> dict[str, Prior]:
    return {"kappa": Positive("Gamma", 2.0, 0.5, 1.0, (1.5, 8.0))}


def _beta_core(eta: Array, z: Array, aux: Aux) -> Array:
    mean = expit(eta)
    a, b = mean * aux["shape"], (1 - mean) * aux["shape"]
    return a * np.log(z) + b * np.log1p(-z) - gammaln(a) - gammaln(b)


def _beta_draw(rng: np.random.Generator, eta: Array, aux: Aux) -> Array:
    mean = expit(eta)
    return np.clip(rng.beta(mean * aux["shape"], (1 - mean) * aux["shape"]), 1e-3, 1 - 1e-3)


def _zip_core(eta: Array, z: Array, aux: Aux) -> Array:
    gate, rate = aux["gate"], np.exp(eta)
    seen = np.log1p(-gate) + z * eta - rate
    return np.where(z > 0, seen, np.logaddexp(np.log(gate), seen))


def _ordered_core(eta: Array, z: Array, aux: Aux) -> Array:
    answer = z[:, 0].astype(int)
    padded = np.concatenate([np.full((*aux["cut"].shape[:-1], 1), -np.inf), aux["cut"]], axis=-1)[:, 0, 0]
    padded = np.concatenate([padded, np.full((len(padded), 1), np.inf)], axis=-1)
    low, high = padded[:, answer, None], padded[:, answer + 1, None]
    with np.errstate(invalid="ignore"):
        between = high + np.log1p(-np.exp(low - high)) - eta - softplus(low - eta) - softplus(high - eta)
    return np.where(np.isinf(low), -softplus(eta - high), np.where(np.isinf(high), -softplus(low - eta), between))


def _ordered_draw(rng: np.random.Generator, eta: Array, aux: Aux) -> Array:
    return (rng.uniform(size=len(eta))[:, None] > expit(aux["cut"] - eta[:, None])).sum(1).astype(float)


def _negbin_rest(z: Array, aux: Aux) -> Array:
    r = aux["shape"]
    return gammaln(z + r) - gammaln(r) - z * np.log(r)


def _weibull_rest(z: Array, aux: Aux) -> Array:
    return np.log(aux["shape"]) + (aux["shape"] - 1) * np.log(z)


def _gamma_rest(z: Array, aux: Aux) -> Array:
    a = aux["shape"]
    return a * np.log(a) - gammaln(a) + (a - 1) * np.log(z)


LIKELIHOODS: dict[str, Likelihood] = {
    "Normal": Likelihood(
        lambda eta, z, aux: -(((z - eta) / aux["sigma"]) ** 2) / 2,
        lambda z, aux: -np.log(aux["sigma"]) + 0 * z,
        lambda rng, eta, aux: eta + aux["sigma"] * rng.normal(size=len(eta)),
        lambda eta, aux: dist.Normal(eta, aux["sigma"]),
        _noise,
    ),
    "StudentT": Likelihood(
        lambda eta, z, aux: -2.5 * np.log1p(((z - eta) / aux["sigma"]) ** 2 / 4),
        lambda z, aux: -np.log(aux["sigma"]) + 0 * z,
        lambda rng, eta, aux: eta + aux["sigma"] * rng.standard_t(4, size=len(eta)),
        lambda eta, aux: dist.StudentT(4.0, eta, aux["sigma"]),
        _noise,
        smooth=lambda eta, z, aux: -1.25 * np.sqrt(((z - eta) / aux["sigma"]) ** 2 + 1),
    ),
    "Laplace": Likelihood(
        lambda eta, z, aux: -np.abs(z - eta) / aux["sigma"],
        lambda z, aux: -np.log(aux["sigma"]) + 0 * z,
        lambda rng, eta, aux: rng.laplace(eta, aux["sigma"]),
        lambda eta, aux: dist.Laplace(eta, aux["sigma"]),
        _noise,
        smooth=lambda eta, z, aux: -np.sqrt(((z - eta) / aux["sigma"]) ** 2 + 0.3),
    ),
    "LogNormal": Likelihood(
        lambda eta, z, aux: -(((np.log(z) - eta) / aux["sigma"]) ** 2) / 2,
        lambda z, aux: -np.log(aux["sigma"]) + 0 * z,
        lambda rng, eta, aux: np.exp(eta + aux["sigma"] * rng.normal(size=len(eta))),
        lambda eta, aux: dist.LogNormal(eta, aux["sigma"]),
        _noise,
    ),
    "Bernoulli": Likelihood(
        lambda eta, z, aux: z * eta - softplus(eta),
        _nothing,
        lambda rng, eta, aux: (rng.uniform(size=len(eta)) < expit(eta)).astype(float),
        lambda eta, aux: dist.Bernoulli(logits=eta),
        bounded=True,
    ),
    "Binomial": Likelihood(
        lambda eta, z, aux: z * eta - TRIALS * softplus(eta),
        _nothing,
        lambda rng, eta, aux: rng.binomial(TRIALS, expit(eta)).astype(float),
        lambda eta, aux: dist.Binomial(total_count=TRIALS, logits=eta),
        loc=-0.5,
        bounded=True,
    ),
    "Poisson": Likelihood(
        lambda eta, z, aux: z * eta - np.exp(eta),
        _nothing,
        lambda rng, eta, aux: rng.poisson(np.exp(eta)).astype(float),
        lambda eta, aux: dist.Poisson(eta.exp()),
        loc=0.7,
    ),
    "NegativeBinomial": Likelihood(
        lambda eta, z, aux: z * eta - (z + aux["shape"]) * softplus(eta - np.log(aux["shape"])),
        _negbin_rest,
        lambda rng, eta, aux: rng.poisson(rng.gamma(aux["shape"], np.exp(eta) / aux["shape"])).astype(float),
        lambda eta, aux: dist.NegativeBinomial(total_count=aux["shape"], logits=eta - aux["shape"].log()),
        _shape,
        loc=1.2,
    ),
    "Gamma": Likelihood(
        lambda eta, z, aux: -aux["shape"] * (eta + z * np.exp(-eta)),
        _gamma_rest,
        lambda rng, eta, aux: np.maximum(rng.gamma(aux["shape"], np.exp(eta) / aux["shape"]), 1e-4),
        lambda eta, aux: dist.Gamma(aux["shape"], aux["shape"] * (-eta).exp()),
        _shape,
    ),
    "Exponential": Likelihood(
        lambda eta, z, aux: -eta - z * np.exp(-eta),
        _nothing,
        lambda rng, eta, aux: np.maximum(rng.exponential(np.exp(eta)), 1e-4),
        lambda eta, aux: dist.Exponential((-eta).exp()),
    ),
    "Weibull": Likelihood(
        lambda eta, z, aux: -aux["shape"] * eta - np.exp(aux["shape"] * (np.log(z) - eta)),
        _weibull_rest,
        lambda rng, eta, aux: np.maximum(np.exp(eta) * rng.weibull(aux["shape"], size=len(eta)), 1e-4),
        lambda eta, aux: dist.Weibull(eta.exp(), aux["shape"]),
        _shape,
    ),
    "Beta": Likelihood(
        _beta_core,
        lambda z, aux: gammaln(aux["shape"]) - np.log(z) - np.log1p(-z),
        _beta_draw,
        lambda eta, aux: dist.Beta(eta.sigmoid() * aux["shape"], (1 - eta.sigmoid()) * aux["shape"]),
        lambda rng, unit, family: {"shape": Positive("Gamma", 2.0, 0.2, 1.0, (4.0, 20.0))},
    ),
    "ZeroInflatedPoisson": Likelihood(
        _zip_core,
        _nothing,
        lambda rng, eta, aux: np.where(rng.uniform(size=len(eta)) < aux["gate"], 0.0, rng.poisson(np.exp(eta))),
        lambda eta, aux: dist.ZeroInflatedPoisson(eta.exp(), gate=aux["gate"]),
        _gate,
        loc=1.0,
    ),
    "OrderedLogistic": Likelihood(
        _ordered_core,
        _nothing,
        _ordered_draw,
        lambda eta, aux: dist.OrderedLogistic(eta, aux["cut"]),
        _cuts,
        bounded=True,
    ),
    "VonMises": Likelihood(
        lambda eta, z, aux: aux["kappa"] * (np.cos(z - eta) - 1),
        lambda z, aux: -np.log(i0e(aux["kappa"])) + 0 * z,
        lambda rng, eta, aux: rng.vonmises(eta, aux["kappa"]),
        lambda eta, aux: dist.VonMises(eta, aux["kappa"]),
        _direction,
        bounded=True,
        period=2 * np.pi,
    ),
    "Geometric": Likelihood(
        lambda eta, z, aux: -softplus(-eta) - z * softplus(eta),
        _nothing,
        lambda rng, eta, aux: (rng.geometric(expit(eta)) - 1).astype(float),
        lambda eta, aux: dist.Geometric(logits=eta),
        loc=-0.5,
    ),
}
