"""The models that ``step_cost.py`` has of its own, with data of any number of units."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

_EACH = 3  # observations of a unit


def poisson(num_units: int) -> tuple[Any, tuple[Tensor, ...]]:
    """Return a hierarchy of Poisson counts, three for each unit."""
    y = 0.5 + 0.7 * torch.randn(num_units)
    return _poisson, (torch.poisson(y.exp().expand(_EACH, -1)),)


def logistic(num_units: int) -> tuple[Any, tuple[Tensor, ...]]:
    """Return a hierarchy of yes and no, with a covariate, three for each unit."""
    x = torch.randn(_EACH, num_units)
    logits = 0.5 + torch.randn(num_units) - x
    return _logistic, (x, torch.bernoulli(logits.sigmoid()))


def normal(num_units: int) -> tuple[Any, tuple[Tensor, ...]]:
    """Return a hierarchy of normal measurements, three for each unit."""
    y = 0.5 + 0.7 * torch.randn(num_units)
    return _normal, (y + torch.randn(_EACH, num_units),)


def _hierarchy() -> tuple[Tensor, Tensor]:
    return pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))


def _poisson(counts: Tensor) -> None:
    mu, tau = _hierarchy()
    with pyro.plate("units", counts.shape[-1], dim=-1):
        y = pyro.sample("y", dist.Normal(mu, tau))
        with pyro.plate("each", _EACH, dim=-2):
            pyro.sample("counts", dist.Poisson(y.exp()), obs=counts)


def _logistic(x: Tensor, yes: Tensor) -> None:
    mu, tau = _hierarchy()
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("units", x.shape[-1], dim=-1):
        y = pyro.sample("y", dist.Normal(mu, tau))
        with pyro.plate("each", _EACH, dim=-2):
            pyro.sample("yes", dist.Bernoulli(logits=y + slope * x), obs=yes)


def _normal(z: Tensor) -> None:
    mu, tau = _hierarchy()
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("units", z.shape[-1], dim=-1):
        y = pyro.sample("y", dist.Normal(mu, tau))
        with pyro.plate("each", _EACH, dim=-2):
            pyro.sample("z", dist.Normal(y, sigma), obs=z)


BUILT_IN = {"poisson": poisson, "logistic": logistic, "normal": normal}
