"""A Pyro model of many units, as a function of two tensors: the globals and the units' latents."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from laplace_amort.autodiff import Arithmetic, Recording, record
from laplace_amort.errors import ModelError, RecordingError
from laplace_amort.model.at_once import LogJointAtOnce, ManyPoints, many_points
from laplace_amort.model.handlers import SubsampledPlate
from laplace_amort.model.layout import UnitLayout, find_layout
from laplace_amort.model.log_joint import LogJoint
from laplace_amort.types import Density

__all__ = ["Terms", "UnitModel"]

# Terms that are compared may differ by this power of the rounding error.
_SHARE = 0.6


class Terms(NamedTuple):
    """The terms of the log joint that a site brings, in one row.

    :param str name: of the site.
    :param bool inside: whether the site is in the plate of the units, so that there is one for each unit, in order.
    :param Tensor values: ``(n,)``.
    """

    name: str
    inside: bool
    values: Tensor


class UnitModel:
    r"""The log joint :math:`f(\theta, y)` of a Pyro model for given data, globals ``(d,)`` and units ``(N, k)`` apart.

    It is what the rooms below Pyro know of a model. Terms of the units carry the weight ``N / B`` of a minibatch.

    :param LogJoint density: of the model, with its arguments and subsample indices.
    :param UnitLayout layout: which site is where.
    :param Tensor units: index of each unit in the whole plate, ``(N,)``.
    """

    def __init__(self, density: LogJoint, layout: UnitLayout, units: Tensor) -> None:
        self.density = density
        self.layout = layout
        self.units = units
        self.recording: Recording | None = None
        self._recorded_terms: Callable[[Tensor, Tensor], list[Terms]] | None = None
        self.points: ManyPoints | None = None  # how it takes many of them at once; None if it does not

    def __repr__(self) -> str:
        return f"UnitModel({self.sizes()})"

    def sizes(self) -> str:
        """Say how many globals and units there are."""
        d, units = self.layout.global_dim, self.layout.num_units
        whole = int(self.layout.frame.full_size)
        number = f"{units} of {whole}" if whole != units else f"{units}"
        return f"{d} global{'s' if d != 1 else ''}, {number} unit{'s' if whole != 1 else ''}"

    def at_once(self, global_: Tensor, local: Tensor) -> UnitModel:
        """Return the same model, run for many points at once where many are asked for.

        :param Tensor global_: near which it is seen to take them, ``(d,)``.
        :param Tensor local: ``(N, k)``.
        :raises RecordingError: if it does not; see :mod:`~laplace_amort.model.at_once`.
        """
        other = self.live()
        other.points = many_points(other, global_, local)
        return other

    @property
    def many(self) -> Density:
        """What is evaluated at many points: the recording, or the log joint."""
        if self.recording is not None:
            return self.recording
        return self.log_joint if self.points is None else LogJointAtOnce(self, self.points)

    def recorded(self, global_: Tensor, local: Tensor) -> UnitModel:
        """Return the same model as a recording of its tensor operations, for many evaluations with the same data.

        The terms are what is recorded, by three runs of the model; their sum follows from these.

        :param Tensor global_: where to record, ``(d,)``.
        :param Tensor local: ``(N, k)``.
        :raises RecordingError: if it cannot be recorded; see :func:`~laplace_amort.autodiff.recording.record`.
        """
        other, found = copy.copy(self), list[Terms]()

        def joined(global_: Tensor, local: Tensor) -> Tensor:
            found[:] = self.flat_terms(global_, local)
            return torch.cat([terms.values for terms in found])

        recording = record(joined, global_, local)
        kinds = [(terms.name, terms.inside) for terms in found]
        other._recorded_terms = functools.partial(_named, kinds, recording.parts())
        other.recording = recording.sum_of_parts()
        return other

    def recorded_leaves(self) -> list[Tensor]:
        """Return the parameters that a recording reads: none, where the model is not recorded."""
        held = {} if self.recording is None else self.recording.operations.constants
        return [tensor for tensor in held.values() if tensor.requires_grad]

    def compare(self, global_: Tensor, local: Tensor) -> None:
        """Compare the terms that are recorded with those of the model now, at one point, by their values.

        :param Tensor global_: ``(d,)``.
        :param Tensor local: ``(N, k)``.
        :raises RecordingError: if they differ by more than rounding errors.
        """
        recorded, live = self.flat_terms(global_, local), self.live().flat_terms(global_, local)
        if [terms[:2] for terms in recorded] != [terms[:2] for terms in live]:
            raise RecordingError("the sites of the model are not those that were recorded")
        for one, other in zip(recorded, live, strict=True):
            if not _same(one.values, other.values, global_.dtype):
                raise RecordingError(
                    f"the terms of site '{one.name}' are not what was recorded. Does the model use a number that "
                    "changes from call to call, NumPy, or random numbers?"
                )

    @property
    def subsamples(self) -> list[SubsampledPlate]:
        """The plates of which the model takes only a part, of units or of anything else."""
        return [plate for plate in self.density.subsampled_plates if plate.subsample_size < plate.size]

    def refuse_minibatch(self, rest: str) -> None:
        """Refuse a model that takes only a part of a plate, for what needs all of it.

        :param str rest: of the sentence, after a comma: who needs all of it, and the line to type.
        :raises ModelError: naming the plate and its sizes.
        """
        for plate in self.subsamples:
            kind = "units" if plate.name == self.layout.frame.name else "elements"
            raise ModelError(
                f"the model takes {plate.subsample_size} of {plate.size} {kind} of plate '{plate.name}' at a time, "
                f"{rest}"
            )

    def under(self, arithmetic: Arithmetic) -> UnitModel:
        """Return the same model, run in another arithmetic."""
        other = self.live()
        other.density = self.density.under(arithmetic)
        other.layout = find_layout(other.density.sites, self.layout.frame.name)
        return other

    def live(self) -> UnitModel:
        """Return the same model as runs of its Python."""
        other = copy.copy(self)
        other.recording = other._recorded_terms = None
        return other

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the model."""
        return self.density.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the model."""
        return self.density.kwargs

    @property
    def log_joint(self) -> Density:
        """The log joint in unconstrained space, a scalar; arguments that overflow give NaN, not an error."""
        return self._run if self.recording is None else self.recording

    def _run(self, global_: Tensor, local: Tensor) -> Tensor:
        # A trial point of a mode search may overflow in one unit; that unit alone is to step back.
        with pyro.validation_enabled(False):
            return self.density.evaluate(self.layout.to_sites(global_, local))

    def terms(self, global_: Tensor, local: Tensor) -> list[tuple[str, tuple[Any, ...], Tensor]]:
        """Return the terms that the log joint is the sum of, by site, from a run; see :meth:`LogJoint.terms`."""
        with pyro.validation_enabled(False):
            return self.density.terms(self.layout.to_sites(global_, local))

    def density_terms_at(
        self, how: ManyPoints, globals_: Tensor, locals_: Tensor
    ) -> list[tuple[str, tuple[Any, ...], Tensor]]:
        """Return the terms at many points ``(S, d)`` and ``(S, N, k)``, by site, each ``(S, *shape)``."""
        if len(globals_) == 1:  # as it always is
            return [(name, plates, values[None]) for name, plates, values in self.terms(globals_[0], locals_[0])]
        return how.terms(self, globals_, locals_)

    def terms_at(self, globals_: Tensor, locals_: Tensor) -> list[tuple[str, tuple[Any, ...], Tensor]]:
        """Return the terms of :meth:`terms` at many points, each ``(S, *shape)``, of a model that takes many."""
        if self.points is None:
            raise RecordingError("this model was not seen to take many points at once: at_once(global_, local)")
        return self.density_terms_at(self.points, globals_, locals_)

    def flat_terms_at(self, how: ManyPoints, globals_: Tensor, locals_: Tensor) -> list[Terms]:
        """Return the terms of :meth:`flat_terms` at many points, each ``(S, n)``."""
        found = self.density_terms_at(how, globals_, locals_)
        return [self._flat(*site, locals_.shape[1], leading=1) for site in found]

    def flat_terms(self, global_: Tensor, local: Tensor) -> list[Terms]:
        """Return the terms that the log joint is the sum of, one for each unit where a site is in its plate.

        :param Tensor global_: ``(d,)``.
        :param Tensor local: ``(N, k)``.
        """
        if self._recorded_terms is not None:
            return self._recorded_terms(global_, local)
        return [self._flat(*site, len(local)) for site in self.terms(global_, local)]

    def _flat(self, name: str, plates: tuple[Any, ...], values: Tensor, num_units: int, leading: int = 0) -> Terms:
        frame, rank = self.layout.frame, values.dim() - leading
        inside = any(plate.name == frame.name for plate in plates)
        if not (inside and rank >= -frame.dim and values.shape[frame.dim] == num_units):
            return Terms(name, False, values if rank == 1 else values.reshape(*values.shape[:leading], -1))
        others = [axis for axis in range(-rank, 0) if axis != frame.dim]
        return Terms(name, True, values.sum(others) if others else values)

    def constrain_global(self, global_: Tensor) -> dict[str, Tensor]:
        """Return the constrained values of the global sites, by name."""
        sites, unconstrained = self.layout.global_sites, self.layout.global_to_sites(global_)
        if any(site.transform is None for site in sites.values()):
            # A support that depends on other latents takes a run of the model; where the units are does not matter.
            anywhere = global_.new_zeros(self.layout.num_units, self.layout.local_dim)
            everything = self.density.to_constrained(self.layout.to_sites(global_, anywhere))
            return {name: everything[name] for name in sites}
        return {name: site.transform(unconstrained[name]) for name, site in sites.items() if site.transform}

    def unconstrain_local(self, values: Mapping[str, Tensor], global_: Tensor) -> Tensor:
        """Join constrained values of the local sites into ``(N, k)``.

        :param values: by name, each of the shape of its site.
        :param Tensor global_: the globals, on which the support of a local site may depend.
        :raises ModelError: if a value has another shape than its site, or lies outside its support.
        """
        for name, site in self.layout.local_sites.items():
            rank = len(site.shape) - site.event_dim  # only the event may have another shape when constrained
            if name in values and values[name].shape[:rank] != site.shape[:rank]:
                raise ModelError(
                    f"the value of local site '{name}' has shape {tuple(values[name].shape)}, and the site has batch "
                    f"shape {tuple(site.shape[:rank])}: one value for each unit"
                )
        unconstrained = self.density.to_unconstrained({**self.constrain_global(global_), **values})
        return self.layout.local_from_sites(unconstrained)

    def unit_axis(self, name: str) -> int:
        """Return the axis of the units in a value of a local site, constrained or not."""
        return self.layout.unit_axis(name)

    def describe(self, unit: int) -> str:
        """Name a unit of this run, for messages."""
        sites = ", ".join(repr(name) for name in self.layout.local_sites)
        return f"unit {int(self.units[unit])} of plate '{self.layout.frame.name}' ({sites})"

    def start(self, init_loc_fn: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """Return globals and units at the start that one of Pyro's ``init_to_*`` strategies gives."""
        return self.start_in(self.density.prototype(init_loc_fn))

    def start_in(self, trace: Any) -> tuple[Tensor, Tensor]:
        """Return globals and units at which a trace of the model was made."""
        return self.layout.from_sites(self.density.unconstrained_in(trace))

    def check_deterministic(self, global_: Tensor, local: Tensor) -> None:
        """Evaluate twice at one point.

        :raises ModelError: if the two differ, because the model draws something that is not among its latent sites.
        """
        with torch.no_grad():
            first, second = (self.log_joint(global_, local) for _ in range(2))
        # Sums on a GPU need not agree to the last bit.
        if bool((first - second).abs() > torch.finfo(first.dtype).eps ** 0.5 * (1 + first.abs())):
            raise ModelError(
                f"the log joint of the model is {float(first)} and then {float(second)} at one and the same latents: "
                "it draws random numbers elsewhere than in its visible latent sites. Is there dropout in a network, or "
                "noise by torch.randn? Switch it off, or make it a pyro.sample:\n"
                "    network.eval()\n"
                "Does poutine.block hide a latent from this guide, as in an AutoGuideList? Give the hidden site a "
                "value:\n    AutoLaplaceFamily(poutine.condition(model, data={'site': value}))"
            )


def _same(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether terms are the same but for rounding errors, or are both no numbers."""
    if one.shape != other.shape:
        return False
    rounding = max(torch.finfo(kind).eps for kind in (dtype, one.dtype)) ** _SHARE
    finite = other[other.isfinite()]
    size = 1 + finite.abs().max() if len(finite) else 1
    return bool((((one - other).abs() <= rounding * size) | ~(one.isfinite() | other.isfinite())).all())


def _named(
    kinds: list[tuple[str, bool]],
    parts: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    global_: Tensor,
    local: Tensor,
) -> list[Terms]:
    """Recorded values as terms of their sites; not a function in a function, so that it can be pickled."""
    return [Terms(*kind, values) for kind, values in zip(kinds, parts(global_, local), strict=True)]
