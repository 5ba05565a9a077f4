r"""44 sites with Student-t effects, whose conditional modes are roots of a cubic; and a guide written by hand.

Site ``j`` of an experiment reports an estimated ``effect`` with standard error ``se``. The true effects scatter around
:math:`\mu` with heavy tails,

.. math:: \text{effect}_j \sim N(\mu + t_j, \text{se}_j), \qquad t_j \sim \text{StudentT}(\nu, 0, s),

where the scale :math:`s = 1.9 \max_j \text{se}_j + e^{\text{log\_raw\_scale}}` stays above the measurement errors and
:math:`\nu = 2.5 + e^{\text{log\_raw\_df}}`. So each site's :math:`t_j` has one conditional mode, in closed form.

To fit it::

    effect, se = data()
    result = fit(model, effect, se)
    print(result)
    draws = result.posterior.sample(1000)

The closed form saves the search for the modes, and changes nothing else::

    fit(model, effect, se, guide=AutoLaplaceFamily(model, ClosedFormMode(closed_form_mode)))

:class:`AmortizedGuide` is the same family written out: a pattern for guides that no automatic one covers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from laplace_amort import (
    AutoLaplaceFamily,
    ClosedFormMode,
    LogJoint,
    SoftAbs,
    check_paths,
    dual_path_param,
    observed_information,
)
from laplace_amort.examples import datasets

__all__ = ["AmortizedGuide", "check_case", "closed_form_mode", "cubic_root", "data", "model"]

GLOBALS = "mu", "log_raw_scale", "log_raw_df"  # first in the model, so first in the packed vector


def data() -> tuple[Tensor, Tensor]:
    """Return the arguments of the model: ``effect (44,)`` and ``se (44,)``."""
    columns = datasets.load("effects_errors")
    return columns["effect"], columns["se"]


def scale_and_df(log_raw_scale: Tensor, log_raw_df: Tensor, se: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and degrees of freedom of the true effects."""
    return 1.9 * se.max() + log_raw_scale.exp(), 2.5 + log_raw_df.exp()


def model(effect: Tensor, se: Tensor) -> None:
    """A plain Pyro model; nothing in it knows about the guide.

    :param Tensor effect: estimated effect of each site, ``(N,)``.
    :param Tensor se: its standard error, ``(N,)``.
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 20.0))
    log_raw_scale = pyro.sample("log_raw_scale", dist.Normal(0.0, 2.0))
    log_raw_df = pyro.sample("log_raw_df", dist.Normal(1.0, 1.5))
    scale, df = scale_and_df(log_raw_scale, log_raw_df, se)
    with pyro.plate("sites", len(effect)):
        t = pyro.sample("t", dist.StudentT(df, 0.0, scale))
        pyro.sample("effect", dist.Normal(mu + t, se), obs=effect)


def closed_form_mode(global_: Mapping[str, Tensor], effect: Tensor, se: Tensor) -> dict[str, Tensor]:
    r"""Return the conditional mode of every site's ``t`` given the globals.

    With :math:`r = \text{effect} - \mu`, :math:`A = \nu s^2` and :math:`e = \text{se}`, the slope of the conditional
    log density of :math:`t` vanishes where

    .. math:: \frac{r - t}{e^2} = \frac{(\nu + 1)\, t}{A + t^2}
              \quad\Longleftrightarrow\quad
              t^3 - r t^2 + \big(A + (\nu + 1) e^2\big) t - r A = 0.

    That root is unique, because the conditional is strictly log-concave. Minus the second derivative of the Student-t
    log density is :math:`(\nu + 1)(A - t^2) / (A + t^2)^2`, smallest at :math:`t^2 = 3A`, where it is
    :math:`-(\nu + 1) / (8 \nu s^2)`. The measurement adds :math:`1 / e^2`, so the sum is positive wherever
    :math:`s^2 > e^2 (\nu + 1) / (8 \nu)`; here :math:`s \ge 1.9 e` and :math:`\nu > 2.5`, so that
    :math:`s^2 \ge 3.61 e^2` against :math:`0.175 e^2`.

    :param global_: the globals by name, scalars.
    :param Tensor effect: ``(N,)``.
    :param Tensor se: ``(N,)``.
    :return: ``t``, ``(N,)``, by its name; differentiable to any order.

    Example: a site that reports exactly ``mu`` has its mode at 0::

        >>> zero = torch.zeros(())
        >>> globals_ = {"mu": zero, "log_raw_scale": zero, "log_raw_df": zero}
        >>> closed_form_mode(globals_, torch.tensor([0., 1.]), torch.tensor([0.2, 0.2]))
        {'t': tensor([0.0000, 0.9769])}
    """
    scale, df = scale_and_df(global_["log_raw_scale"], global_["log_raw_df"], se)
    r, a = effect - global_["mu"], df * scale**2
    return {"t": cubic_root(r, a, b=a + (df + 1) * se**2)}


def cubic_root(r: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Return the one real root of :math:`t^3 - r t^2 + b t - r a`, for :math:`0 < a \le b < 1.39\, a`.

    With :math:`t = x + r/3` it reads :math:`x^3 + p x + q = 0`. Cardano's two cube roots cancel where ``q`` is small
    beside ``p``, and at 0 have no derivative; there

    .. math:: x = -2 \sqrt{p/3}\, \sinh\big(\tfrac13 \operatorname{asinh} z\big), \qquad
              z = \frac{3q}{2p} \sqrt{\frac{3}{p}}

    has neither flaw. Elsewhere (``p`` near 0 or negative: an effect many standard errors from ``mu``), the larger of
    the cube roots is well away from 0, and the other follows from it.

    :param Tensor r: any shape.
    :param Tensor a: broadcasts against it.
    :param Tensor b: broadcasts against it.
    :return: the common shape.
    """
    p, q = b - r**2 / 3, -r * ((a - b / 3) + 2 * r**2 / 27)
    # q^2 / 4 + p^3 / 27, multiplied out: far from the data those two cancel, while no term is negative here.
    discriminant = (4 * a * r**4 + (27 * a**2 - 18 * a * b - b**2) * r**2 + 4 * b**3) / 108
    hyperbolic = 400 * p.clamp(min=0) ** 3 >= 27 * q**2  # p > 0 and abs(z) <= 10
    # Each formula is fed harmless numbers where the other one is wanted: a NaN there would leak into the gradient even
    # though the last `where` discards the value.
    root = (torch.where(hyperbolic, p, 3.0) / 3).sqrt()
    by_sinh = -2 * root * torch.sinh(torch.asinh(torch.where(hyperbolic, q, 0.0) / (2 * root**3)) / 3)

    safe_q = torch.where(hyperbolic, 1.0, q)
    larger = safe_q.abs() / 2 + torch.where(hyperbolic, 1.0, discriminant).sqrt()
    cube_root = -safe_q.sign() * larger ** (1 / 3)
    by_cardano = cube_root - torch.where(hyperbolic, 0.0, p) / (3 * cube_root)
    return torch.where(hyperbolic, by_sinh, by_cardano) + r / 3


class AmortizedGuide:
    """The amortized Laplace family by hand: a dense Hessian, and as only parameter where the three globals stand.

    It is the same Gaussian as that of ``AutoLaplaceFamily``, which costs less: linear in the number of sites.
    """

    def __init__(self, effect: Tensor, se: Tensor) -> None:
        self.log_joint = LogJoint(model, effect, se)  # finds the sites once, not in every call of the guide

    def __call__(self, effect: Tensor, se: Tensor) -> dict[str, Tensor]:
        """Sample every latent site of the model."""
        log_joint = self.log_joint.given(effect, se)
        theta = dual_path_param("theta", lambda: log_joint.initial()[: len(GLOBALS)])
        y_hat = closed_form_mode(dict(zip(GLOBALS, theta.mean, strict=True)), effect, se)["t"]
        check_paths(theta, y_hat)
        precision, _ = SoftAbs()(observed_information(log_joint, theta.curvature, y_hat))
        normal = dist.MultivariateNormal(torch.cat([theta.mean, y_hat]), precision_matrix=precision)
        return log_joint.sample_sites(pyro.sample("joint", normal, infer={"is_auxiliary": True}))


def check_case() -> tuple[Callable[..., None], AutoLaplaceFamily, tuple[Tensor, ...]]:
    """Return model, guide and arguments, for ``laplace-amort check laplace_amort.examples.multisite:check_case``."""
    return model, AutoLaplaceFamily(model, ClosedFormMode(closed_form_mode)), data()
