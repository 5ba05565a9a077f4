"""Models whose densities are symmetric about where a fit starts, so that the gradient across is zero there."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

_RANDOM = torch.Generator().manual_seed(3)


def _normal(*shape):
    return torch.randn(*shape, generator=_RANDOM, dtype=torch.float64)


KIND = torch.arange(40) % 2
MIXED = torch.where(KIND == 0, -2.0, 2.0)[:, None] + 0.5 * _normal(40, 1) + 0.5 * _normal(40, 3)


def mixture(y):
    """Units of two kinds that can change places: both begin at the same mean."""
    center = pyro.sample("center", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("units", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        level = center.unsqueeze(-2) + (tau * u).unsqueeze(-1)
        seen = dist.Normal(level.unsqueeze(-2), 0.5).log_prob(y.unsqueeze(-1)).sum(-2)
        pyro.factor("y", (seen - 0.6931471805599453).logsumexp(-1))


LOADING = torch.tensor([1.0, -0.8, 1.2], dtype=torch.float64)
SCORES = _normal(60, 1) * LOADING + 0.5 * _normal(60, 3)


def factor(y):
    """Loadings whose sign, together with that of all scores, is free: they begin at zero."""
    loading = pyro.sample("loading", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0))
    with pyro.plate("units", len(y)):
        score = pyro.sample("score", dist.Normal(0.0, 1.0))
        mean = score.unsqueeze(-1) * loading.unsqueeze(-2)
        pyro.sample("y", dist.Normal(mean, sigma[..., None, None]).to_event(1), obs=y)
