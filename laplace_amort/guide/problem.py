"""What a fit works on: a guide at given data, its parameters as one vector, and the model recorded for many runs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from laplace_amort.autodiff import (
    Gradients,
    SeparableDensity,
    arrowhead_information,
    values_and_gradients,
)
from laplace_amort.errors import ModelError, RecordingError, ResumeError
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.gaussian import LaplaceGaussian
from laplace_amort.guide.heads import Head
from laplace_amort.guide.kinks import Kink, curvature_beside, find_kink
from laplace_amort.guide.precision import OwnNumbers, numbers_of
from laplace_amort.guide.vector import set_vector, to_vector
from laplace_amort.linalg import Arrowhead, repair_tails
from laplace_amort.model import (
    SubsampledPlate,
    UnitModel,
    prior_for_parameter,
    simulated_units,
    takes_particles,
    unit_terms,
    with_data_completed,
)
from laplace_amort.types import Vector
from laplace_amort.units import FreeMode, Mode, NewtonMode, UnitIntegrals

__all__ = ["Problem"]


class Problem:
    """A guide, and the model at given data as a function of two tensors.

    Where the model subsamples, one minibatch stands for all.

    :param AutoLaplaceFamily guide: it is set up if it has not been called yet.
    :param tuple args: arguments of the model.
    :param dict kwargs: keyword arguments of the model.

    It computes in double precision whatever that of guide and model is, on numbers of its own: the guide moves in
    :meth:`hand_back`. What cannot be run so is computed as it is written; ``numbers.reason`` says why.

    Attributes: ``unit_model``, recorded where that is possible; ``not_recorded``, the reason if it is not, and
    ``not_at_once``, why it is not even run for many points at once; ``given``, the model in its own precision; and
    ``first_loc``, where the globals stood first, ``(d,)``.
    """

    def __init__(self, guide: AutoLaplaceFamily, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.guide = guide
        self.given = guide.unit_model(*args, **kwargs)
        self.given.density.check_data()  # set-up has done so for the data of the first call alone
        self.numbers = numbers_of(guide, self.given)
        self.unit_model = self.numbers.of(self.given)
        self._first, self.first_loc = self.memory(), self.loc.clone()
        self.not_recorded = self.not_at_once = ""
        self._integrals: tuple[UnitModel, UnitIntegrals] | None = None
        try:
            self.unit_model = self.unit_model.recorded(self.loc, self.start)
        except RecordingError as error:
            self._do_without(str(error))

    def __repr__(self) -> str:
        model: Any = self.guide.model
        name = getattr(model, "__name__", type(model).__name__)
        return f"Problem({name}, {self.unit_model.sizes()}{', not recorded' if self.not_recorded else ''})"

    def _do_without(self, reason: str) -> None:
        """Run the model as it is, since it is not recorded: for many points at once, where it takes them."""
        self.unit_model, self.not_recorded = self.unit_model.live(), reason
        try:
            self.unit_model = self.unit_model.at_once(self.loc, self.start)
        except RecordingError as error:
            self.not_at_once = str(error)

    @property
    def loc(self) -> Tensor:
        """Where the globals stand, ``(d,)``, without a graph."""
        return torch.as_tensor(self.numbers.family.loc).detach()

    @property
    def dtype(self) -> torch.dtype:
        """That of the guide, in which results are given back."""
        loc: Any = self.guide.loc
        return torch.as_tensor(loc).dtype

    @property
    def is_as_given(self) -> bool:
        """Whether it computes in the precision of the guide, on the numbers of the guide."""
        return isinstance(self.numbers, OwnNumbers)

    def rounded(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values by site in the precision in which results are given back."""
        return dict(values) if self.is_as_given else {name: value.to(self.dtype) for name, value in values.items()}

    def hand_back(self) -> None:
        """Put the guide, and parameters of the model, where this problem stands, in their own precision."""
        self.numbers.hand_back()

    def as_given(self) -> Problem:
        """Return the same problem in the precision of the guide, which moves with it, and not recorded."""
        if self.is_as_given:
            return self
        other = copy.copy(self)
        other.numbers = OwnNumbers(self.guide, self.given.density.parameters())
        other.unit_model, other._first, other._integrals = self.given, other.memory(), None
        return other

    def globals_(self) -> list[Tensor]:
        """The parameter that holds the globals, alone in a list."""
        # The second is its name once a user has assigned to it.
        return [leaf for name, leaf in self.numbers.family.named_parameters() if name in ("loc_unconstrained", "loc")]

    @property
    def model_parameters(self) -> list[Tensor]:
        """Parameters of the model itself (``pyro.param``, weights of modules), listed once."""
        return list(self.numbers.model_parameters.values())

    def parameters(self) -> list[Tensor]:
        """All parameters there are, of guide and model, the globals first."""
        leaves = [*self.globals_(), *self.numbers.family.parameters(), *self.model_parameters]
        return list({id(leaf): leaf for leaf in leaves}.values())

    @property
    def completed_model(self) -> Callable[..., Any]:
        """The model for an ELBO of Pyro's to run, which takes data as they are: possible where a mask hides them."""
        return with_data_completed(self.guide.model)

    def takes_particles(self, num_particles: int) -> bool:
        """Whether the model can run in a plate of particles, as vectorized ELBOs of Pyro have it."""
        return takes_particles(self.unit_model.density, num_particles)

    def place(self, start: Tensor) -> None:
        """Put the globals at a start ``(d,)``, and forget the modes found elsewhere."""
        set_vector(self.globals_(), start.double().cpu().numpy())
        self.recall()

    def move(self, point: Vector) -> None:
        """Put the globals at a point ``(d,)``, or all parameters at a point ``(P,)``."""
        set_vector(self.globals_() if len(point) == len(self.loc) else self.parameters(), point)

    def state(self) -> tuple[Vector, tuple[Tensor, Tensor]]:
        """Return where all parameters stand, and what the guide remembers of modes."""
        return to_vector(self.parameters()), self.memory()

    def restore(self, state: tuple[Vector, tuple[Tensor, Tensor] | None]) -> None:
        """Bring back what :meth:`state` returned, as the first start; of modes, None for what is known now.

        :raises ResumeError: if it is of other parameters.
        """
        vector, memory = state
        first = self._first if memory is None else memory
        sizes = len(vector), first[0].shape
        if sizes != (sum(p.numel() for p in self.parameters()), self.memory()[0].shape):
            raise ResumeError(
                f"the saved fit has {sizes[0]} parameters and units {tuple(sizes[1])}, and this guide has others. Was "
                "it made for other data or by other settings? Start anew:\n    fit(model, *args)"
            )
        self._first = first
        set_vector(self.parameters(), vector)
        self.first_loc = self.loc.clone()
        self.recall()

    def center_units(self, keep: Callable[[str, Callable[[], Tensor]], Tensor]) -> None:
        """Put centers that are parameters of the guide at the modes of the units.

        :param keep: calls a function, as :meth:`Journal.call` does, which keeps the result under a label.
        """
        mode: Any = self.numbers.family.mode
        if isinstance(mode, FreeMode):
            with torch.no_grad():
                modes = keep("centers", lambda: self.mode.find(self.unit_model, self.loc, self.start))
                set_vector([mode.get_parameter("loc_unconstrained")], to_vector([modes]))

    # What is remembered of the modes of the units.

    @property
    def start(self) -> Tensor:
        """A first guess of the modes of the units there, ``(N, k)``."""
        return self.start_at(self.loc)

    def start_at(self, globals_: Tensor) -> Tensor:
        """Guess the modes of the units at globals ``(d,)`` or ``(S, d)``, as ``(N, k)`` or ``(S, N, k)``."""
        return self.numbers.family._warm_start.at(self.unit_model.units, globals_)

    def remember(self, local: Tensor, regression: Tensor | None = None) -> None:
        """Keep the modes of the units where the globals stand: the next guess starts from them.

        :param Tensor local: ``(N, k)``.
        :param Tensor regression: minus their derivative in the globals, ``(N, k, d)``; by default as it was.
        """
        warm_start, units = self.numbers.family._warm_start, self.unit_model.units
        warm_start.remember(units, self.loc, local, warm_start.slope[units] if regression is None else regression)

    def memory(self) -> tuple[Tensor, Tensor]:
        """Return what is remembered of modes, to bring it back by :meth:`recall`."""
        return self.numbers.family._warm_start.state()

    def recall(self, memory: tuple[Tensor, Tensor] | None = None) -> None:
        """Bring back what :meth:`memory` returned; by default what was known at the first start."""
        self.numbers.family._warm_start.restore(self._first if memory is None else memory)

    # The Gaussian there.

    def gaussian(self, *, mode: Mode | None = None, head: Head | None = None) -> LaplaceGaussian:
        """Return the Gaussian that the guide is where it stands, differentiable in its parameters.

        :param mode: another one than the guide's.
        :param head: another one than the guide's.
        """
        return self.numbers.family.gaussian_of(self.unit_model, mode=mode, head=head)

    def gaussian_given(self, model: UnitModel, local: Tensor, fitted: LaplaceGaussian) -> LaplaceGaussian:
        """Return the Gaussian of other units given the globals, with the globals as they were fitted, without a graph.

        :param UnitModel model: has the other units.
        :param Tensor local: their modes at the globals of the fit, ``(M, k)``.
        :param LaplaceGaussian fitted: of the units that were fitted.
        """
        with torch.no_grad():
            found = arrowhead_information(model.log_joint, fitted.global_loc, local)
            tail, report = repair_tails(self.numbers.family.tail_repair, found.tail)
            precision = Arrowhead(found.head, found.border, tail).with_schur(fitted.precision.schur_complement)
        return LaplaceGaussian(model, fitted.global_loc, local, precision, fitted.head_report, report)

    @cached_property
    def kink(self) -> Kink | None:
        """A kink of the density through the first start, looked for when it is asked for first."""
        memory = self.memory()
        self.recall()
        try:
            return find_kink(self.unit_model, self.first_loc, self.start_at(self.first_loc))
        finally:
            self.recall(memory)

    def kinks(self, gaussian: LaplaceGaussian) -> list[str]:
        """Say so if the curvature of a unit at its mode is not that beside it; see ``kinks.curvature_beside``.

        :param LaplaceGaussian gaussian: of these units.
        """
        return curvature_beside(self.unit_model, gaussian)

    # What the model says.

    def values(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """Return the log joint at globals ``(S, d)`` and units ``(S, N, k)``, as ``(S,)``, without a graph."""
        return values_and_gradients(self.unit_model, globals_, locals_, None).values

    def gradients(self, globals_: Tensor, locals_: Tensor) -> Gradients:
        """Return the log joint at many points, and its gradients there and in the parameters of the model.

        :param Tensor globals_: ``(S, d)``.
        :param Tensor locals_: ``(S, N, k)``.
        """
        return values_and_gradients(self.unit_model, globals_, locals_, self.model_parameters)

    def log_joint_at_start(self) -> float:
        """Return the value of the log joint where the globals stand, with all latents of the units at zero."""
        with torch.no_grad():
            return float(self.unit_model.log_joint(self.loc, torch.zeros_like(self.start)))  # and not at their modes

    @property
    def mode(self) -> Mode:
        """What finds the modes along which a marginal density is taken: the guide's, if it finds any."""
        mode: Mode = self.numbers.family.mode
        return NewtonMode() if isinstance(mode, FreeMode) else mode

    @property
    def integrals(self) -> UnitIntegrals:
        """The marginal density of the globals, unit by unit; found once for each form of the model.

        :raises StructureError: if an observation depends on two units.
        """
        if self._integrals is None or self._integrals[0] is not self.unit_model:
            self._integrals = self.unit_model, self.integrals_of(self.unit_model, self.loc, self.start)
        return self._integrals[1]

    def integrals_of(self, model: UnitModel, global_: Tensor, local: Tensor) -> UnitIntegrals:
        """Return the integrals over the units of a model, the modes found as those of the guide are.

        :param UnitModel model: with these units or others.
        :param Tensor global_: where the model is taken apart by unit, ``(d,)``.
        :param Tensor local: ``(N, k)``.
        :raises StructureError: if an observation depends on two units.
        """
        mode = self.mode if isinstance(self.mode, NewtonMode) else NewtonMode()
        return UnitIntegrals(unit_terms(model, global_, local), mode)

    def simulations(self, gaussian: LaplaceGaussian, number: int) -> Iterator[tuple[UnitIntegrals, Tensor]]:
        """Yield the log probability of data by unit, for data drawn from the model at the center of a posterior.

        It draws by torch's generator. The prior of the globals is left out.

        :param LaplaceGaussian gaussian: the posterior.
        :param int number: of data sets.
        :return: some data sets at a time: their integrals, and where to take them, a row for each: the globals,
            and what tells the data sets apart, ``(S, d)`` or ``(S, d + 1)``.
        :raises ModelError: if the model has a ``pyro.factor``, which no data can be drawn from.
        """
        live = self.unit_model.live()
        with contextlib.suppress(RecordingError):
            live = live.at_once(gaussian.global_loc, gaussian.local_loc)
        for units, rows in simulated_units(live, gaussian.global_loc, gaussian.local_loc, number):
            yield UnitIntegrals(SeparableDensity(_nothing, units), self.integrals.mode), rows

    def recheck(self) -> bool:
        """Compare the recording with the model where the guide stands now, and go back to the model if it differs.

        :return: whether it differs.
        """
        recording, live = self.unit_model.recording, self.unit_model.live()
        if recording is not None:
            try:
                recording.check(live.log_joint, self.loc, self.start)
            except RecordingError as error:
                self._do_without(str(error))
                return True
        return False

    # What the model is, and what it is refused for.

    @property
    def weight(self) -> float:
        """N/B, where B of N units are a minibatch."""
        return self.unit_model.layout.weight

    def global_elements(self) -> list[str]:
        """Name each of the ``d`` unconstrained elements of the globals, such as ``B[0, 1]``."""
        return self.unit_model.layout.global_elements()

    @property
    def subsamples(self) -> list[SubsampledPlate]:
        """The plates of which the model takes only a part, of units or of anything else."""
        return self.unit_model.subsamples

    def refuse_minibatch(self, rest: str) -> None:
        """Refuse a model that takes only a part of a plate; see :meth:`UnitModel.refuse_minibatch`."""
        self.unit_model.refuse_minibatch(rest)

    def refuse_model_parameters(self) -> None:
        """Refuse a model with parameters of its own, for what moves the globals alone.

        :raises ModelError: naming one.
        """
        for name in self.numbers.model_parameters:
            raise ModelError(
                f"this objective moves the latents of the model, and '{name}' is a parameter. Give it a prior, a flat "
                "one if need be, or take the ELBO, which moves parameters too:\n"
                f"{prior_for_parameter(self.unit_model.density, name)}"
                "    fit(model, *args, objective=FixedDrawELBO())"
            )


def _nothing(global_: Tensor, local: Tensor) -> Tensor:
    return (global_ * 0).sum()
