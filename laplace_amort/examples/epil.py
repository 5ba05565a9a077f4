r"""Seizure counts of 59 patients: a Poisson log-normal model, whose conditional modes are found by Newton's method.

Patient ``i`` has ``y`` seizures in each of four periods, with a random intercept,

.. math:: y_{ip} \sim \text{Poisson}\big(e^{x_{ip} \cdot \beta + u_i}\big), \qquad u_i \sim N(0, \sigma), \qquad
          \beta_k \sim N(0, 5), \qquad \sigma \sim \text{HalfNormal}(1),

with :math:`x` = (1, log(base / 4), treatment, their product, log age, fourth period), both logarithms centered. The
conditional mode of :math:`u_i` has no closed form; the guide finds it for all patients at once.

To fit it::

    x, y = data()
    result = fit(model, x, y)
    print(result)
    draws = result.posterior.sample(1000)

The scale of a hierarchy is what a Gaussian gets least right: compare the posteriors of ``sigma`` that ``laplace-amort
demo epil`` prints.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from laplace_amort import AutoLaplaceFamily
from laplace_amort.examples import datasets

__all__ = ["check_case", "data", "model"]


def data() -> tuple[Tensor, Tensor]:
    """Return the arguments of the model: ``x (59, 4, 6)`` and ``y (59, 4)``."""
    columns = datasets.load("epil")
    log_base4, log_age = (columns["base"] / 4).log(), columns["age"].log()
    log_base4_c, log_age_c = log_base4 - log_base4.mean(), log_age - log_age.mean()
    trt, v4 = columns["trt"], (columns["period"] == 4).to(columns["y"])
    x = torch.stack([torch.ones_like(trt), log_base4_c, trt, trt * log_base4_c, log_age_c, v4], dim=-1)
    return x.reshape(59, 4, 6), columns["y"].reshape(59, 4)


def model(x: Tensor, y: Tensor) -> None:
    """A plain Pyro model; nothing in it knows about the guide.

    :param Tensor x: covariates of each patient and period, ``(N, 4, 6)``.
    :param Tensor y: counts, ``(N, 4)``.
    """
    beta = pyro.sample("beta", dist.Normal(0.0, 5.0).expand([x.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("patients", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        log_rate = (x @ beta.unsqueeze(-1)).squeeze(-1) + u.unsqueeze(-1)
        pyro.sample("y", dist.Poisson(log_rate.exp()).to_event(1), obs=y)


def check_case() -> tuple[Callable[..., None], AutoLaplaceFamily, tuple[Tensor, ...]]:
    """Return model, guide and arguments, for ``laplace-amort check laplace_amort.examples.epil:check_case``."""
    return model, AutoLaplaceFamily(model), data()
