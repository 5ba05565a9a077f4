"""Modes by a function of the user's: what it returns is checked, and once, whether it is the mode at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laplace_amort.errors import ModeNotFoundError, ModeWarning
from laplace_amort.linalg import SoftAbs
from laplace_amort.units.modes import LISTED, UnitDensity, listed
from laplace_amort.units.newton import ModeStatus
from laplace_amort.units.newton_step import evaluate, newton_point

__all__ = ["ClosedFormMode"]


_NOTICEABLE = 0.05  # conditional standard deviations by which a closed form may miss the mode


@dataclass
class ClosedFormMode:
    r"""Compute the modes by a function of the user's.

    Where the function is used first, it is checked that it returns the mode *in unconstrained space*: for a positive
    site :math:`x = e^y` the maximum of the density of :math:`y`, which has the factor :math:`|dx/dy|`. Do not use it
    for an approximation: the guide would be centered elsewhere; :class:`NewtonMode` is exact.

    :param fn: a function of the constrained values of the global sites, by name, and of the model's arguments. It
        returns constrained values of the local sites, by name, each of the shape that the site has in the model.

    Example: units :math:`y_i \sim N(\mu, 1)`, observations :math:`z_i \sim N(y_i, 1)`::

        >>> mode = ClosedFormMode(lambda sites, z: {"y": (sites["mu"] + z) / 2})
    """

    fn: Callable[..., Mapping[str, Tensor]]
    _checked: bool = field(default=False, init=False, repr=False, compare=False)

    def prepare(self, start: Tensor) -> ClosedFormMode:
        """Return a copy, which will check the function once."""
        return ClosedFormMode(self.fn)

    def find(self, problem: UnitDensity, global_: Tensor, start: Tensor) -> Tensor:
        """Return the modes ``(N, k)`` at globals ``(d,)``; of ``start (N, k)`` only the shape matters.

        :raises TypeError: if the function does not return tensors by name.
        :raises ValueError: if they have another number of elements than the local sites.
        :raises ModeNotFoundError: naming the units where they are NaN or infinite.
        """
        sites = problem.constrain_global(global_)
        _check_overflow(sites)
        values = self.fn(sites, *problem.args, **problem.kwargs)
        _check_values(values)
        _check_finite(problem, values, start)
        local = problem.unconstrain_local(values, global_)
        _check_local(problem, local, start)
        if not self._checked:
            self._checked = True
            _warn_unless_mode(problem, global_.detach(), local.detach(), self.fn)
        return local


def _check_overflow(sites: Mapping[str, Tensor]) -> None:
    """Refuse globals that a fit has sent too far, before the closed form makes anything of them."""
    for name, value in sites.items():
        if not value.isfinite().all():
            raise ModeNotFoundError(
                f"global site '{name}' overflows: it is {_few(value.flatten())}", units=[], status=[]
            )


def _check_values(values: object) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(
            f"the closed form returned {type(values).__name__}, not a dict of the local sites by name. For instance:\n"
            "    ClosedFormMode(lambda global_sites, *args: {'y': ...})"
        )
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the closed form returned {type(value).__name__} for site '{name}', not a tensor")


def _check_finite(problem: UnitDensity, values: Mapping[str, Tensor], start: Tensor) -> None:
    """Refuse constrained values that are NaN or infinite, while it is known which site and unit each is of."""
    for name, value in values.items():
        failed = ~value.isfinite()
        if not failed.any():
            continue
        axis = problem.unit_axis(name)
        if axis >= value.dim() or value.shape[axis] != len(start):
            continue  # of another shape than its site, which is refused next
        # One row for each unit.
        rows, parts = failed.movedim(axis, 0).reshape(len(start), -1), value.movedim(axis, 0).reshape(len(start), -1)
        units = rows.any(-1).nonzero().squeeze(-1).tolist()
        found = {unit: f"'{name}' is {_few(parts[unit])}" for unit in units[:LISTED]}
        _raise_not_finite(problem, units, len(start), found.__getitem__)


def _few(values: Tensor) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:LISTED].tolist())
    return shown if len(values) == 1 else f"[{shown}{', ...' if len(values) > LISTED else ''}]"


def _raise_not_finite(problem: UnitDensity, units: list[int], num_units: int, reason: Callable[[int], str]) -> None:
    raise ModeNotFoundError(
        f"the closed form is not finite for {len(units)} of {num_units} units:\n{listed(problem, units, reason)}\n"
        "Is a value outside its support, or did it overflow?",
        units=problem.units[units].tolist(),
        status=[ModeStatus.NOT_FINITE] * len(units),
    )


def _check_local(problem: UnitDensity, local: Tensor, start: Tensor) -> None:
    if local.shape != start.shape:
        raise ValueError(
            f"the closed form gave units of shape {tuple(local.shape)}, expected {tuple(start.shape)}; each value must "
            "have the shape that its site has in the model: value.expand(num_units)"
        )
    failed = (~local.isfinite().all(-1)).nonzero().squeeze(-1).tolist()
    if failed:
        _raise_not_finite(problem, failed, len(local), lambda unit: f"{local[unit].tolist()} in unconstrained space")


def _follows(problem: UnitDensity, global_: Tensor, fn: Callable[..., Mapping[str, Tensor]]) -> bool:
    """Whether any value of a closed form has a derivative in the globals."""
    with torch.enable_grad():
        values = fn(problem.constrain_global(global_.clone().requires_grad_()), *problem.args, **problem.kwargs)
    return any(value.requires_grad for value in values.values())


def _warn_unless_mode(
    problem: UnitDensity, global_: Tensor, local: Tensor, fn: Callable[..., Mapping[str, Tensor]]
) -> None:
    gradient, tail = evaluate(problem.log_joint, global_, local)
    at = newton_point(local, gradient.detach(), tail, SoftAbs())
    missed = (~at.concave | (at.decrement > _NOTICEABLE)).nonzero().squeeze(-1).tolist()
    if not missed:
        return

    def reason(unit: int) -> str:
        bend = "" if at.concave[unit] else ", and the log joint curves upwards"
        return f"Newton's step from there is {float(at.decrement[unit]):.3g} standard deviations long{bend}"

    constant = "It does not depend on the globals at all, and a mode does: is it a constant, or was a value detached?\n"
    warnings.warn(
        f"the closed form is not the mode of {len(missed)} of {len(local)} units:\n"
        f"{listed(problem, missed, reason)}\n{'' if _follows(problem, global_, fn) else constant}"
        "A mode is that of the density in unconstrained space, log-Jacobian included. To search for it instead:\n"
        "    NewtonMode()",
        ModeWarning,
        stacklevel=3,
    )
