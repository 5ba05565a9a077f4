r"""Densities that torch and Pyro write with a kink or a jump where there is none, written without.

A zero-mean prior starts at logits of exactly zero. There autograd takes the slope of an absolute value for zero: the
Binomial of torch has no curvature. The values were right (of ``VonMises`` to seven digits), and are the same here;
derivatives are right to any order. ``tests/model/test_densities.py`` looks at all
distributions, at such points. Those that leave out what is NaN are written without a branch on it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions
import scipy.special
import torch
from torch import Tensor
from torch.distributions.utils import broadcast_all

__all__ = ["smooth"]

_Density = Callable[[Any, Tensor], Tensor]


def smooth(fn: Any) -> Any:
    """Return a distribution with the densities of this file in place of those of torch and Pyro.

    :param fn: a distribution; also one that is made of others, by ``to_event``, ``mask``, ``expand`` or as a mixture.
    :return: the same object where nothing is to be replaced, in it or in what it is made of.
    """
    density = _SMOOTH.get(getattr(type(fn), "log_prob", None))
    parts = {name: _smooth_part(value) for name, value in vars(fn).items()}
    changed = {name: part for name, part in parts.items() if part is not vars(fn)[name]}
    if density is None and not changed:
        return fn
    found = copy.copy(fn)
    vars(found).update(changed)
    if density is not None:
        vars(found)["log_prob"] = functools.partial(density, fn)  # in front of the method of the class
    return found


def _smooth_part(value: Any) -> Any:
    if isinstance(value, torch.distributions.Distribution):
        return smooth(value)
    if type(value) in (list, tuple):
        parts = [_smooth_part(part) for part in value]
        if any(part is not before for part, before in zip(parts, value, strict=True)):
            return type(value)(parts)
    return value


def _check(fn: Any, value: Tensor) -> None:
    """Refuse a value as the distribution itself does."""
    if fn._validate_args:
        fn._validate_sample(value)


# --------------------------------------------------------------------------------------------------------- densities


def _binomial(fn: Any, value: Tensor) -> Tensor:
    """Torch has max(logits, 0) and log1p(exp(-abs(logits))) apart, whose kinks autograd does not add up to none."""
    _check(fn, value)
    n = fn.total_count
    ways = torch.lgamma(n + 1) - torch.lgamma(value + 1) - torch.lgamma(n - value + 1)
    return value * fn.logits - n * _softplus(fn.logits) + ways


def _pyro_binomial(fn: Any, value: Tensor) -> Tensor:
    """The same, with the approximation of Pyro to the number of ways, if it was asked for."""
    if not fn.approx_log_prob_tol:
        return _binomial(fn, value)
    _check(fn, value)
    ways = pyro.ops.special.log_binomial(fn.total_count, value, tol=fn.approx_log_prob_tol)
    return value * fn.logits - fn.total_count * _softplus(fn.logits) + ways


def _extended_binomial(fn: Any, value: Tensor) -> Tensor:
    return _pyro_binomial(fn, value).masked_fill((value < 0) | (value > fn.total_count), -math.inf)


def _continuous_bernoulli(fn: Any, value: Tensor) -> Tensor:
    """Torch has a polynomial around one half, and beside it the difference of two logarithms that cancel."""
    _check(fn, value)
    logits, value = broadcast_all(fn.logits, value)
    return (value - 0.5) * logits - _log_sinhc(logits**2 / 4)


def _von_mises(fn: Any, value: Tensor) -> Tensor:
    """Torch has two polynomials for the Bessel function, which do not meet at 3.75."""
    _check(fn, value)
    log_bessel = torch.special.i0e(fn.concentration).log() + fn.concentration
    return fn.concentration * torch.cos(value - fn.loc) - math.log(2 * math.pi) - log_bessel


def _von_mises_3d(fn: Any, value: Tensor) -> Tensor:
    """Pyro has the norm of the concentration, which has no derivative at zero."""
    if fn._validate_args:  # by the density itself
        with torch.no_grad():
            type(fn).log_prob(fn, value)
    squared_norm = (fn.concentration**2).sum(-1)
    return (fn.concentration * value).sum(-1) - _log_sinhc(squared_norm) - math.log(4 * math.pi)


def _generalized_pareto(fn: Any, value: Tensor) -> Tensor:
    r"""Torch has the limit where the concentration c is zero, which has no derivative with respect to it.

    Of a scaled value z the density is :math:`z \cdot \log(1 + cz) / (cz) + \log(1 + cz)`, a power series in cz.
    """
    _check(fn, value)
    z = (value - fn.loc) / fn.scale
    near = (fn.concentration * z).abs() < 0.1
    x = torch.where(near, fn.concentration * z, 0.0)
    concentration = torch.where(near, 1.0, fn.concentration)  # of those that are not near
    power = 1 / concentration + 1
    far = torch.where(power == 0, power, power * torch.log1p(concentration * z))
    return -torch.as_tensor(fn.scale).log() - torch.where(near, z * _polynomial(_LOG1P_OF, x) + torch.log1p(x), far)


def _nan_masked_normal(fn: Any, value: Tensor) -> Tensor:
    """Pyro picks what is finite out and writes the densities of these in place."""
    seen = value.isfinite()
    densities = torch.distributions.Normal.log_prob(fn, torch.where(seen, value, 0.0))
    return torch.where(seen, densities, 0.0)


def _nan_masked_multivariate_normal(fn: Any, value: Tensor) -> Tensor:
    """Pyro takes each pattern of what is finite by itself.

    What is not gets a residual of zero and rows of the identity in the covariance, and so adds nothing to the quadratic
    form, nothing to the log determinant.
    """
    seen = value.isfinite()
    residual = torch.where(seen, value - fn.loc, 0.0)
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    identity = torch.eye(value.shape[-1], dtype=fn.loc.dtype, device=value.device)
    scale_tril = torch.linalg.cholesky(torch.where(both, fn.covariance_matrix, identity))
    whitened = torch.linalg.solve_triangular(scale_tril, residual.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * ((whitened**2).sum(-1) + seen.sum(-1) * math.log(2 * math.pi)) - log_det


# --------------------------------------------------------------------------------------------------------- functions

_LOG1P_OF = [(-1) ** n / (n + 1) for n in range(18)]  # log(1 + x) / x
# log(sinh(r) / r) in s = r^2: the product of sinh over its zeros, and the series of each logarithm.
_LOG_SINHC = [
    0.0,
    *((-1) ** (n + 1) * float(scipy.special.zeta(2 * n)) / (n * math.pi ** (2 * n)) for n in range(1, 18)),
]


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + e^x). What torch calls softplus is x from 20 on, to nine digits only."""
    return -torch.nn.functional.logsigmoid(-x)


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def _log_sinhc(s: Tensor) -> Tensor:
    r"""Return :math:`\log(\sinh(r) / r)` of :math:`s = r^2`, with all derivatives, also at zero."""
    near = s < 1
    r = torch.where(near, 1.0, s).sqrt()
    far = r - math.log(2) + torch.log1p(-torch.exp(-2 * r)) - r.log()
    return torch.where(near, _polynomial(_LOG_SINHC, torch.where(near, s, 0.0)), far)


# By the function that a class has, so that a subclass with a density of its own keeps it.
_SMOOTH: dict[Any, _Density] = {
    torch.distributions.Binomial.log_prob: _binomial,
    pyro.distributions.Binomial.log_prob: _pyro_binomial,
    pyro.distributions.ExtendedBinomial.log_prob: _extended_binomial,
    torch.distributions.ContinuousBernoulli.log_prob: _continuous_bernoulli,
    torch.distributions.VonMises.log_prob: _von_mises,
    pyro.distributions.VonMises3D.log_prob: _von_mises_3d,
    pyro.distributions.NanMaskedNormal.log_prob: _nan_masked_normal,
    pyro.distributions.NanMaskedMultivariateNormal.log_prob: _nan_masked_multivariate_normal,
}
if hasattr(torch.distributions, "GeneralizedPareto"):  # since torch 2.8
    _SMOOTH[torch.distributions.GeneralizedPareto.log_prob] = _generalized_pareto
