"""The NumPyro models, parallel to the Pyro models of ``tasks.py``."""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array


def poisson(z: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    log_tau = numpyro.sample("log_tau", dist.Normal(0.0, 1.0))
    with numpyro.plate("units", z.shape[-1], dim=-1):
        y = numpyro.sample("y", dist.Normal(mu, jnp.exp(log_tau)))
        with numpyro.plate("counts", z.shape[-2], dim=-2):
            numpyro.sample("z", dist.Poisson(jnp.exp(y)), obs=z)


def bernoulli(x: Array, z: Array) -> None:
    beta = numpyro.sample("beta", dist.Normal(0.0, 5.0).expand([4]).to_event(1))
    log_tau = numpyro.sample("log_tau", dist.Normal(0.0, 1.0))
    with numpyro.plate("units", z.shape[-1], dim=-1):
        u = numpyro.sample("u", dist.Normal(0.0, jnp.exp(log_tau)))
        with numpyro.plate("answers", z.shape[-2], dim=-2):
            numpyro.sample("z", dist.Bernoulli(logits=beta[0] + x @ beta[1:] + u), obs=z)


def radon(county: Array, floor: Array, log_radon: Array) -> None:
    mu_alpha = numpyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    mu_beta = numpyro.sample("mu_beta", dist.Normal(0.0, 10.0))
    sigma_alpha = numpyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_beta = numpyro.sample("sigma_beta", dist.HalfNormal(1.0))
    sigma_y = numpyro.sample("sigma_y", dist.HalfNormal(1.0))
    with numpyro.plate("counties", int(county.max()) + 1):
        alpha = numpyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = numpyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    with numpyro.plate("homes", len(log_radon)):
        numpyro.sample("log_radon", dist.Normal(alpha[county] + beta[county] * floor, sigma_y), obs=log_radon)


def eight_schools(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", y.shape[-1], dim=-1):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


MODELS = {"poisson": poisson, "bernoulli": bernoulli, "radon": radon, "eight_schools": eight_schools}
