"""What a fit works on: a guide at given data, its parameters as one vector, and the model recorded for many runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor

from laplace_amort.errors import ModelError, RecordingError, ResumeError
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.model import SubsampledPlate, UnitModel, unit_terms
from laplace_amort.types import Vector
from laplace_amort.units import FreeMode, Mode, NewtonMode, UnitIntegrals

__all__ = ["Problem", "set_vector", "to_vector"]


class Problem:
    """A guide, and the model at given data as a function of two tensors.

    Where the model subsamples, one minibatch stands for all.

    :param AutoLaplaceFamily guide: it is set up if it has not been called yet.
    :param tuple args: arguments of the model.
    :param dict kwargs: keyword arguments of the model.

    Attributes: ``unit_model``, recorded where that is possible, and ``not_recorded``, the reason if it is not.
    """

    def __init__(self, guide: AutoLaplaceFamily, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.guide = guide
        self.unit_model = guide.unit_model(*args, **kwargs)
        self.unit_model.density.check_data()  # set-up has done so for the data of the first call alone
        self.first = guide.warm_start.state()
        self.not_recorded = ""
        self._integrals: tuple[UnitModel, UnitIntegrals] | None = None
        try:
            self.unit_model = self.unit_model.recorded(self.loc, self.start)
        except RecordingError as error:
            self.not_recorded = str(error)

    @property
    def loc(self) -> Tensor:
        """Where the globals stand, ``(d,)``, without a graph."""
        loc: Any = self.guide.loc
        return torch.as_tensor(loc).detach()

    @property
    def start(self) -> Tensor:
        """A first guess of the modes of the units there, ``(N, k)``."""
        return self.guide.warm_start.at(self.unit_model.units, self.loc)

    @property
    def integrals(self) -> UnitIntegrals:
        """The marginal density of the globals, unit by unit; found once for each form of the model.

        :raises StructureError: if an observation depends on two units.
        """
        if self._integrals is None or self._integrals[0] is not self.unit_model:
            density = unit_terms(self.unit_model, self.loc, self.start)
            mode = self.mode if isinstance(self.mode, NewtonMode) else NewtonMode()
            self._integrals = self.unit_model, UnitIntegrals(density, mode)
        return self._integrals[1]

    @property
    def weight(self) -> float:
        """N/B, where B of N units are a minibatch."""
        return self.unit_model.layout.weight

    @property
    def subsamples(self) -> list[SubsampledPlate]:
        """The plates of which the model takes only a part, of units or of anything else."""
        return [plate for plate in self.unit_model.density.subsampled_plates if plate.subsample_size < plate.size]

    @property
    def mode(self) -> Mode:
        """What finds the modes along which a marginal density is taken: the guide's, if it finds any."""
        return NewtonMode() if isinstance(self.guide.mode, FreeMode) else self.guide.mode

    def globals_(self) -> list[Tensor]:
        """The parameter that holds the globals, alone in a list."""
        # The second is its name once a user has assigned to it.
        return [leaf for name, leaf in self.guide.named_parameters() if name in ("loc_unconstrained", "loc")]

    def parameters(self) -> list[Tensor]:
        """All parameters there are, of guide and model, the globals first."""
        first = self.globals_()
        leaves = [*self.guide.parameters(), *self.unit_model.density.parameters().values()]
        rest: dict[int, Tensor] = {id(leaf): leaf for leaf in leaves}
        return first + [leaf for leaf in rest.values() if all(leaf is not one for one in first)]

    def state(self) -> tuple[Vector, tuple[Tensor, Tensor]]:
        """Return where all parameters stand, and what the guide remembers of modes."""
        return to_vector(self.parameters()), self.guide.warm_start.state()

    def restore(self, state: tuple[Vector, tuple[Tensor, Tensor]]) -> None:
        """Bring back what :meth:`state` returned, as the first start.

        :raises ResumeError: if it is of other parameters.
        """
        vector, self.first = state
        sizes = len(vector), self.first[0].shape
        if sizes != (sum(p.numel() for p in self.parameters()), self.guide.warm_start.intercept.shape):
            raise ResumeError(
                f"the saved fit has {sizes[0]} parameters and units {tuple(sizes[1])}, and this guide has others. Was "
                "it made for other data or by other settings? Start anew:\n    fit(model, guide, *args)"
            )
        set_vector(self.parameters(), vector)
        self.guide.warm_start.restore(self.first)

    def log_joint_at_start(self) -> float:
        """Return the value of the log joint where the fit starts."""
        with torch.no_grad():
            return float(self.unit_model.log_joint(self.loc, self.start))

    def place(self, start: Tensor) -> None:
        """Put the globals at a start ``(d,)``, and forget the modes found elsewhere."""
        set_vector(self.globals_(), start.double().cpu().numpy())
        self.guide.warm_start.restore(self.first)

    def move(self, point: Vector) -> None:
        """Put the globals at a point ``(d,)``, or all parameters at a point ``(P,)``."""
        set_vector(self.globals_() if len(point) == len(self.loc) else self.parameters(), point)

    def center_units(self, keep: Callable[[str, Callable[[], Tensor]], Tensor]) -> None:
        """Put centers that are parameters of the guide at the modes of the units.

        :param keep: calls a function, as :meth:`Journal.call` does, which keeps the result under a label.
        """
        mode: Any = self.guide.mode
        if isinstance(mode, FreeMode):
            with torch.no_grad():
                modes = keep("centers", lambda: self.mode.find(self.unit_model, self.loc, self.start))
                set_vector([mode.get_parameter("loc_unconstrained")], to_vector([modes]))

    def starts(self, globals_: Tensor) -> Tensor:
        """Guesses of the modes of the units at many globals ``(S, d)``, as ``(S, N, k)``."""
        warm_start, units = self.guide.warm_start, self.unit_model.units
        return warm_start.intercept[units] - (warm_start.slope[units] @ globals_.mT).movedim(-1, 0)

    def refuse_model_parameters(self) -> None:
        """Refuse a model with parameters of its own, for what moves the globals alone.

        :raises ModelError: naming one.
        """
        for name in self.unit_model.density.parameters():
            raise ModelError(
                f"this objective moves the latents of the model, and '{name}' is a parameter. Give it a prior, a flat "
                "one if need be, or take the ELBO, which moves parameters too:\n"
                f"    pyro.sample('{name}', dist.ImproperUniform(constraints.real, (), ()))\n"
                "    fit(model, guide, *args, objective=FixedDrawELBO())"
            )

    def recheck(self) -> bool:
        """Compare the recording with the model where the guide stands now, and go back to the model if it differs.

        :return: whether it differs.
        """
        recording, live = self.unit_model.recording, self.unit_model.live()
        if recording is not None:
            try:
                recording.check(live.log_joint, self.loc, self.start)
            except RecordingError as error:
                self.unit_model, self.not_recorded = live, str(error)
                return True
        return False


def to_vector(parameters: Iterable[Tensor]) -> Vector:
    """Join the values of parameters."""
    parts = [parameter.detach().reshape(-1).double() for parameter in parameters]
    return torch.cat(parts).cpu().numpy() if parts else numpy.zeros(0)


@torch.no_grad()
def set_vector(parameters: Iterable[Tensor], vector: Vector) -> None:
    """Give parameters their parts of a vector, in place."""
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.copy_(torch.from_numpy(vector[start:stop]).reshape(parameter.shape))
        start = stop
