r"""Radon in 919 homes of 85 counties, with an intercept and a slope of each county's own: two latents a unit.

Home ``n`` lies in county :math:`c(n)` and was measured in the basement (``floor`` 0) or on the ground floor (1),

.. math:: \text{log\_radon}_n \sim N(\alpha_{c(n)} + \beta_{c(n)}\, \text{floor}_n,\; \sigma_y), \qquad
          \alpha_c \sim N(\mu_\alpha, \sigma_\alpha), \qquad \beta_c \sim N(\mu_\beta, \sigma_\beta),

both means :math:`N(0, 10)`, the three scales :math:`\text{HalfNormal}(1)`. Counties hold from 1 to 116 homes, so the
homes are in a plate of their own and point to their county: a fit needs to know nothing of that.

To fit it::

    result = fit(model, *data())
    print(result)
    print(result.posterior.quantiles([0.05, 0.5, 0.95])["sigma_alpha"])

25 counties have no home that was measured on the ground floor, and 25 have one: the data say little of
:math:`\sigma_\beta`. Compare what the family makes of it, and what its posterior is: ``laplace-amort demo radon``.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Tensor

from laplace_amort import AutoLaplaceFamily
from laplace_amort.examples import datasets

__all__ = ["check_case", "data", "model"]


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments of the model: ``county``, ``floor`` and ``log_radon``, ``(919,)`` each."""
    columns = datasets.load("radon_mn")
    return columns["county"].long(), columns["floor"], columns["log_radon"]


def model(county: Tensor, floor: Tensor, log_radon: Tensor) -> None:
    """A plain Pyro model; nothing in it knows about the guide.

    :param Tensor county: index of each home's county, from 0, ``(H,)``.
    :param Tensor floor: 0 for the basement, 1 for the ground floor, ``(H,)``.
    :param Tensor log_radon: measured in each home, ``(H,)``.
    """
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    mu_beta = pyro.sample("mu_beta", dist.Normal(0.0, 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_beta = pyro.sample("sigma_beta", dist.HalfNormal(1.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("counties", int(county.max()) + 1):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = pyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    with pyro.plate("homes", len(log_radon)):
        mean = alpha[..., county] + beta[..., county] * floor
        pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=log_radon)


def check_case() -> tuple[Callable[..., None], AutoLaplaceFamily, tuple[Tensor, ...]]:
    """Return model, guide and arguments, for ``laplace-amort check laplace_amort.examples.radon:check_case``."""
    return model, AutoLaplaceFamily(model), data()
