r"""Conditional modes :math:`\hat y(\theta) = \arg\max_y \log p(\theta, y, z)` of all units, and their derivatives.

By the implicit function theorem :math:`d\hat y / d\theta = -U^{-1} C`, with the tails and borders of the observed
information. One Newton step, :math:`y \leftarrow y + U^{-1} \nabla_y f(\theta, y)`, taken at the solution with
:math:`U` as a constant, changes nothing but has that derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from laplace_amort.autodiff import local_information
from laplace_amort.errors import ModeNotFoundError
from laplace_amort.linalg import Repair, SoftAbs, blocks
from laplace_amort.types import Density
from laplace_amort.units.newton import ModeStatus, NewtonSearch, SearchResult, default_tolerance
from laplace_amort.units.newton_step import attached_gradient

__all__ = ["LISTED", "FreeMode", "Mode", "NewtonMode", "UnitDensity", "listed"]

Self = TypeVar("Self")

LISTED = 5  # units that a message describes one by one


class UnitDensity(Protocol):
    """What modes are found for: a log joint of globals ``(d,)`` and units ``(N, k)``, with names for messages."""

    @property
    def units(self) -> Tensor:
        """Index of each unit in the whole plate, ``(N,)``."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the model."""

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the model."""

    def log_joint(self, global_: Tensor, local: Tensor) -> Tensor:
        """Evaluate the log joint, a scalar; a unit that overflows is NaN or infinite and spoils no other's gradient."""

    def describe(self, unit: int) -> str:
        """Name a unit, by its position among ``units``."""

    def constrain_global(self, global_: Tensor) -> dict[str, Tensor]:
        """Return constrained values of the global sites, by name."""

    def unconstrain_local(self, values: Mapping[str, Tensor], global_: Tensor) -> Tensor:
        """Join constrained values of the local sites, by name, into ``(N, k)``."""

    def unit_axis(self, name: str) -> int:
        """Return the axis of the units in a value of a local site."""


@runtime_checkable
class Mode(Protocol):
    """How the modes of the units are found; any object with these two methods."""

    def prepare(self: Self, start: Tensor) -> Self:
        """Return what finds modes of the units ``start (N_full, k)``: itself if it keeps nothing, else a copy."""

    def find(self, problem: UnitDensity, global_: Tensor, start: Tensor) -> Tensor:
        """Return the modes ``(N, k)`` at globals ``(d,)``, attached to them; ``start (N, k)`` is a first guess."""


@dataclass(frozen=True)
class NewtonMode:
    r"""Find the modes by damped Newton steps, all units at once, and differentiate them implicitly.

    Do not use it where the mode has a closed form that is cheap: :class:`ClosedFormMode` evaluates the model less
    often. Nor for conditionals with a kink or with several modes that are about as high: the mode found is the one
    uphill from the start, and jumps where that changes.

    :param float tolerance: largest Newton decrement, in conditional standard deviations, at which a unit counts as
        converged. The result is one Newton step further, so its error is about the square of that; the relative error
        of its derivatives is about the decrement itself. By default the rounding error to the power 0.6: 4e-10 in
        float64, 7e-5 in float32.
    :param int max_steps: steps at most, refused ones included.
    :param int differentiable_steps: Newton steps that derivatives see. With 1 the first derivative is exact, all that
        the gradient of an ELBO needs; with 2 the first three are. Second derivatives with 1 are silently wrong.
    :param repair: of tails that are not positive definite on the way, so that steps lead uphill. The derivatives do not
        see it.
    :raises ValueError: if a number is out of its range.

    Example: the mode of :math:`-e^{y} + \theta y` is :math:`\log\theta`::

        >>> import torch
        >>> from types import SimpleNamespace
        >>> units = SimpleNamespace(log_joint=lambda theta, y: (theta * y - y.exp()).sum())
        >>> NewtonMode().find(units, torch.tensor([2.]), torch.zeros(3, 1)).detach()
        tensor([[0.6931],
                [0.6931],
                [0.6931]])

    References:

    [1] Griewank & Faure (2002), *Reduced functions, gradients and Hessians from fixed-point iterations for state
    equations*, Numerical Algorithms 30, https://doi.org/10.1023/A:1016051717120
    [2] Christianson (1994), *Reverse accumulation and attractive fixed points*, Optimization Methods and Software 3(4).
    """

    tolerance: float | None = None
    max_steps: int = 100
    differentiable_steps: int = 1
    repair: Repair = field(default_factory=SoftAbs)

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1 standard deviation, got {self.tolerance}")
        for name, least in (("max_steps", 0), ("differentiable_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def prepare(self, start: Tensor) -> NewtonMode:
        """Return itself, or a copy with its own repair where that has parameters."""
        repair = self.repair.prepare(start.shape[-1], start)
        return self if repair is self.repair else dataclasses.replace(self, repair=repair)

    def find(self, problem: UnitDensity, global_: Tensor, start: Tensor) -> Tensor:
        """Return the modes ``(N, k)`` at globals ``(d,)``.

        :param UnitDensity problem: has the log joint, and the names of the units.
        :param Tensor global_: ``(d,)``; the result is attached to it, and to whatever else the log joint depends on.
        :param Tensor start: ``(N, k)``, such as the modes at the last globals.
        :raises ModeNotFoundError: naming the units whose mode was not found.
        """
        attached = torch.is_grad_enabled()
        result = self.search(start.dtype)(problem.log_joint, global_ if attached else global_.detach(), start)
        _raise_unless_found(problem, result)
        return self._attach(problem.log_joint, global_, result) if attached else result.at.local + result.at.step

    def search(self, dtype: torch.dtype, max_steps: int | None = None) -> NewtonSearch:
        """Return the search for the modes, as it is for a dtype.

        :param torch.dtype dtype: of the units.
        :param int max_steps: for fewer steps than its own.
        """
        tolerance = default_tolerance(dtype) if self.tolerance is None else self.tolerance
        return NewtonSearch(tolerance, self.max_steps if max_steps is None else max_steps, self.repair)

    def _attach(self, log_joint: Density, global_: Tensor, result: SearchResult) -> Tensor:
        # The last evaluation of the search is the first of the steps: gradient and factor are at hand.
        gradient = attached_gradient(log_joint, global_, result.at.local, result.gradient)
        local = _newton_step(result.at.local, gradient, result.at.factor)
        for _ in range(self.differentiable_steps - 1):
            gradient, tail = local_information(log_joint, global_, local)
            local = _newton_step(local, gradient, blocks.cholesky(tail)[0])
        return local


def _newton_step(local: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
    return local + blocks.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)


def _raise_unless_found(problem: UnitDensity, result: SearchResult) -> None:
    failed = (result.status != ModeStatus.CONVERGED).nonzero().squeeze(-1).tolist()
    if not failed:
        return
    status = {unit: list(ModeStatus)[int(result.status[unit])] for unit in failed}

    def reason(unit: int) -> str:
        length = float(result.at.decrement[unit])
        step = f" (Newton's next step is {length:.3g} standard deviations long)" if length < torch.inf else ""
        return f"{status[unit]}{step}"

    raise ModeNotFoundError(
        f"the conditional mode was not found for {len(failed)} of {len(result.status)} units:\n"
        f"{listed(problem, failed, reason)}\n"
        "Did the globals run away? Lower the learning rate, or start elsewhere. If the mode has a closed form:\n"
        "    ClosedFormMode(lambda global_sites, *args: {'local site': ...})",
        units=problem.units[failed].tolist(),
        status=list(status.values()),
    )


def listed(problem: UnitDensity, units: list[int], reason: Callable[[int], str]) -> str:
    """Return one line for each of the first units, by position, and how many more there are."""
    lines = [f"    {problem.describe(unit)}: {reason(unit)}" for unit in units[:LISTED]]
    more = [f"    and {len(units) - LISTED} more"] if len(units) > LISTED else []
    return "\n".join(lines + more)


class FreeMode(nn.Module):
    """Do without amortization: the centers of the units are parameters, ``loc (N_full, k)``, fitted with the others.

    Do not use it for many units in small minibatches, or to predict for other units: each center is learned on its own.
    It is for conditionals without a mode that could be found, and to compare.

    :param Tensor loc: start of the parameter; :meth:`prepare` gives it.

    Example::

        >>> import torch
        >>> FreeMode().prepare(torch.zeros(3, 2)).loc.shape
        torch.Size([3, 2])
    """

    def __init__(self, loc: Tensor | None = None) -> None:
        super().__init__()
        self.loc = None if loc is None else nn.Parameter(loc.detach().clone())

    def prepare(self, start: Tensor) -> FreeMode:
        """Return a copy whose parameter is ``start (N_full, k)``."""
        return FreeMode(start)

    def find(self, problem: UnitDensity, global_: Tensor, start: Tensor) -> Tensor:
        """Return the centers of this run's units, ``(N, k)``, which do not depend on the globals.

        :raises ValueError: if there is no parameter yet, or none for a unit.
        """
        if self.loc is None:
            raise ValueError("FreeMode has no parameter yet: prepare(start) makes it, and AutoLaplaceFamily calls that")
        if len(problem.units) and int(problem.units.max()) >= len(self.loc):
            raise ValueError(
                f"FreeMode holds {len(self.loc)} units, and unit {int(problem.units.max())} is asked for. Centers that "
                "are parameters do not carry over to other units; amortized ones do: NewtonMode()"
            )
        return self.loc[problem.units]
