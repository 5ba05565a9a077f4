"""A Pyro parameter and its two paths in one call, for hand-written guides."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from torch import Tensor
from torch.distributions import constraints

from laplace_amort.autodiff import DualPath, dual_path

__all__ = ["dual_path_param"]


def dual_path_param(
    name: str,
    init: Tensor | Callable[[], Tensor] | None = None,
    constraint: constraints.Constraint = constraints.real,
    event_dim: int | None = None,
    *,
    mean_gain: float = 1.0,
    curvature_gain: float = 1.0,
) -> DualPath[Tensor]:
    r"""Declare ``pyro.param(name, ...)`` and split its value by :func:`~laplace_amort.dual_path`.

    Both copies hold the *constrained* value. A Gaussian guide lives in unconstrained space, so there leave the
    constraint ``real`` and let :class:`~laplace_amort.LogJoint` do the constraining. The parameter itself, for the
    optimizer or ``pyro.get_param_store()``, is found under its name as always.

    :param str name: name of the parameter.
    :param init: initial constrained value, or a function that makes it; as in ``pyro.param``.
    :param constraint: support of the parameter; as in ``pyro.param``.
    :param int event_dim: rightmost dimensions of one element inside plates; as in ``pyro.param``.
    :param float mean_gain: see :func:`~laplace_amort.dual_path`.
    :param float curvature_gain: see :func:`~laplace_amort.dual_path`.
    :return: :class:`~laplace_amort.DualPath` of two tensors of the shape of the parameter.
    :raises TypeError: if the parameter is not floating-point or complex.
    :raises ValueError: if a gain is not a finite real number.

    Example::

        >>> import pyro, torch
        >>> pyro.clear_param_store()
        >>> theta = dual_path_param("theta", torch.zeros(2))
        >>> (theta.mean + 2 * theta.curvature).sum().backward()
        >>> pyro.param("theta").grad
        tensor([3., 3.])
    """
    checked = None if init is None else lambda: _checked_init(name, init() if callable(init) else init)
    value: Tensor = pyro.param(name, checked, constraint=constraint, event_dim=event_dim)
    return dual_path(value, mean_gain=mean_gain, curvature_gain=curvature_gain)


def _checked_init(name: str, init: Tensor) -> Tensor:
    """Refuse what carries no gradient by its name, before the store has half an entry for it."""
    if not (init.is_floating_point() or init.is_complex()):
        raise TypeError(
            f"the initial value of parameter '{name}' has dtype {init.dtype}, which carries no gradient:\n"
            f"    dual_path_param('{name}', init.to(torch.get_default_dtype()))"
        )
    return init
