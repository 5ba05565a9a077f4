"""The models of ``laplace_amort.examples.ecological`` in NumPyro, non-centered, by NUTS. Needs numpyro, from PyPI."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import torch
from numpyro.infer import MCMC, NUTS
from torch import Tensor

WARMUP, DRAWS, CHAINS = 1000, 1000, 4


def _same_everywhere(shares: Any) -> tuple[Any, Any]:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0).expand([3, 2]).to_event(2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0).expand([3, 2]).to_event(2))
    return mu, sigma[..., None] * jnp.eye(2)


def _contextual(shares: Any) -> tuple[Any, Any]:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0).expand([3, 2]).to_event(2))
    gamma = numpyro.sample("gamma", dist.Normal(0.0, 1.0).expand([3, 2, 2]).to_event(3))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0).expand([2]).to_event(1))
    correlation = numpyro.sample("correlation", dist.LKJCholesky(2, 1.0))
    return mu + jnp.einsum("nk,rck->nrc", shares, gamma), sigma[:, None] * correlation


_PRIORS: dict[str, Callable[[Any], tuple[Any, Any]]] = {"same everywhere": _same_everywhere, "contextual": _contextual}


def nuts(label: str, voters: Tensor, votes: Tensor, seed: int = 0) -> tuple[Tensor, float, float]:
    """Sample the rates of three races and choices.

    :param str label: of the model, ``"same everywhere"`` or ``"contextual"``.
    :param Tensor voters: by race, ``(N, 3)``.
    :param Tensor votes: by choice, ``(N, 3)``.
    :param int seed: of the chains.
    :return: draws ``(S, N, 3, 3)``, seconds with compilation, and the least effective size of the rates of all voters.
    """
    jax.config.update("jax_enable_x64", True)
    n, z = jnp.array(voters.numpy()), jnp.array(votes.numpy())
    mixture = n / n.sum(1, keepdims=True)
    centered = (mixture - n.sum(0) / n.sum())[:, 1:]

    def model() -> None:
        mean, scale_tril = _PRIORS[label](centered)
        with numpyro.plate("precincts", len(n)):
            noise = numpyro.sample("noise", dist.Normal(jnp.zeros((3, 2)), 1.0).to_event(2))
            eta = mean + (scale_tril @ noise[..., None])[..., 0]
            rates = jax.nn.softmax(jnp.pad(eta, ((0, 0), (0, 0), (1, 0))), -1)
            numpyro.deterministic("rates", rates)
            numpyro.factor("votes", (z * jnp.log(jnp.einsum("nr,nrc->nc", mixture, rates))).sum(-1))
        numpyro.deterministic("overall", jnp.einsum("nr,nrc->rc", n, rates) / n.sum(0)[:, None])

    sampler = MCMC(
        NUTS(model, target_accept_prob=0.9),
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
    )
    start = time.perf_counter()
    sampler.run(jax.random.PRNGKey(seed))
    found = sampler.get_samples(group_by_chain=True)
    found["rates"].block_until_ready()
    seconds = time.perf_counter() - start
    least = float(numpyro.diagnostics.effective_sample_size(jnp.asarray(found["overall"])).min())
    rates = torch.tensor(jax.device_get(found["rates"])).flatten(0, 1)
    return rates[:: len(rates) // 1000], seconds, least
