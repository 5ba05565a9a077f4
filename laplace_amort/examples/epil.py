r"""Seizure counts of 59 patients: a hand-written guide whose conditional mode is found by Newton steps.

Patient ``i`` has ``y`` seizures in each of four periods, a Poisson log-normal model with a random intercept,

.. math:: y_{ip} \sim \text{Poisson}\big(e^{x_{ip} \cdot \beta + u_i}\big), \qquad u_i \sim N(0, \sigma), \qquad
          \beta_k \sim N(0, 5), \qquad \sigma \sim \text{HalfNormal}(1),

with :math:`x` = (1, log(base / 4), treatment, their product, log age, fourth period), both logarithms centered. The
conditional mode of :math:`u_i` has no closed form, but the conditional is strictly log-concave, and Newton's method
from the right side of the root cannot fail.

Fit it as :mod:`laplace_amort.examples.multisite`. The scale of a hierarchy is what a joint Gaussian gets least right:
compare the posterior of ``sigma`` with the reference that ``laplace-amort demo epil`` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from laplace_amort import (
    LogJoint,
    RepairReport,
    SoftAbs,
    check_paths,
    datasets,
    dual_path_param,
    observed_information,
)
from laplace_amort.testing import CheckSettings

__all__ = ["AmortizedGuide", "UnamortizedGuide", "check_case", "conditional_mode", "data", "model"]

NUM_GLOBALS = 7  # six coefficients and log sigma: first in the model, so first in the packed vector

# The information is indefinite where a fit starts, and an eigenvalue on its way through zero gives the guide a standard
# deviation of 1 / sqrt(floor) there. The default floor makes that 10 units of log sigma, an ELBO so low that fits stay
# on the wrong side; 1.4 units are no such barrier. At the optimum no eigenvalue is near the floor: the report says so.
REPAIR = SoftAbs(floor=0.5)


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


def conditional_mode(theta: Tensor, x: Tensor, y: Tensor, max_steps: int = 100) -> Tensor:
    r"""Return the conditional mode of every patient's ``u`` given the globals.

    With :math:`Y = \sum_p y_p` and :math:`E = \sum_p e^{x_p \cdot \beta}`, the slope of the conditional log density is
    :math:`g(u) = Y - E e^u - u / \sigma^2`: decreasing and concave, so that Newton steps from the right of its root
    decrease to the root and never pass it. The root lies between 0 and :math:`\log(Y / E)`, so the larger of the two is
    to its right.

    The steps to convergence leave no graph. Two more, which move nothing, are differentiated: the first makes the first
    derivative of the root exact, the second those up to order three.

    :param Tensor theta: the globals in unconstrained space, coefficients and log sigma, ``(7,)``.
    :param Tensor x: ``(N, 4, 6)``.
    :param Tensor y: ``(N, 4)``.
    :param int max_steps: bound on the Newton steps.
    :return: ``(N,)``, differentiable three times.
    :raises RuntimeError: if the steps did not converge; the message names the patients.

    Example: with one expected and one counted seizure in each period, no random effect is called for::

        >>> conditional_mode(torch.zeros(7), torch.zeros(1, 4, 6), torch.ones(1, 4))
        tensor([0.])
    """
    total, precision = y.sum(-1), (-2 * theta[-1]).exp()
    expected = (x @ theta[:-1]).exp().sum(-1)

    def newton_step(u: Tensor) -> Tensor:
        rate = expected * u.exp()
        return (total - rate - precision * u) / (rate + precision)

    with torch.no_grad():
        u = (total / expected).log().clamp(min=0)
        tolerance = torch.finfo(u.dtype).eps ** 0.5  # squared by the two steps that follow
        for _ in range(max_steps):
            step = newton_step(u)
            u = u + step
            if (converged := step.abs() <= tolerance * (1 + u.abs())).all():
                break
        else:
            patients = (~converged).nonzero().flatten().tolist()
            raise RuntimeError(
                f"the mode of u did not converge in {max_steps} Newton steps for patients {patients}; their last steps "
                f"were {step[~converged].tolist()}. Is theta finite? It is {theta.tolist()}."
            )
    for _ in range(2):
        u = u + newton_step(u)
    return u


class AmortizedGuide:
    """The amortized Laplace family by hand: its only parameter is where the seven globals stand.

    ``report`` tells what the last call had to repair.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.log_joint = LogJoint(model, x, y)  # finds the sites once, not in every call of the guide
        self.report: RepairReport | None = None

    def gaussian(self, x: Tensor, y: Tensor) -> dist.MultivariateNormal:
        """Return the guide's density in unconstrained space, all latents in one vector."""
        log_joint = self.log_joint.given(x, y)
        theta = dual_path_param("theta", lambda: log_joint.initial()[:NUM_GLOBALS])
        y_hat = conditional_mode(theta.mean, x, y)
        check_paths(theta, y_hat)
        information = observed_information(log_joint, theta.curvature, y_hat)
        precision, self.report = REPAIR(information)
        return dist.MultivariateNormal(torch.cat([theta.mean, y_hat]), precision_matrix=precision)

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Sample every latent site of the model."""
        joint = pyro.sample("joint", self.gaussian(x, y), infer={"is_auxiliary": True})
        return self.log_joint.given(x, y).sample_sites(joint)


class UnamortizedGuide(AmortizedGuide):
    """The same Gaussian with the patients' modes as parameters of their own, so that there is no path to hide."""

    def gaussian(self, x: Tensor, y: Tensor) -> dist.MultivariateNormal:
        """Return the guide's density in unconstrained space, all latents in one vector."""
        log_joint = self.log_joint.given(x, y)
        theta = pyro.param("theta", lambda: log_joint.initial()[:NUM_GLOBALS])
        y_hat = pyro.param("y_hat", lambda: log_joint.initial()[NUM_GLOBALS:])
        precision, self.report = REPAIR(observed_information(log_joint, theta, y_hat))
        return dist.MultivariateNormal(torch.cat([theta, y_hat]), precision_matrix=precision)


def check_case() -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Return model, guide, arguments and settings, for ``laplace-amort check laplace_amort.examples.epil:check_case``.

    The check compares precisions after repair, so it must know of a repair that is not the default one.
    """
    args = data()
    return model, AmortizedGuide(*args), args, {"settings": CheckSettings(repair=REPAIR)}
