"""Predictions by Pyro's ``Predictive``: for the units that were fitted, for new ones, and for new ones with data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from laplace_amort.errors import ModelError
from laplace_amort.model import observed_sites, plates_of, with_data_drawn
from laplace_amort.posterior.draws import PosteriorDraws
from laplace_amort.posterior.new_units import posterior_for

__all__ = [
    "ConditionedUnits",
    "Drawn",
    "NewUnits",
    "SeenUnits",
    "Units",
    "all_units",
    "predictive",
    "predictive_of",
    "refuse_minibatch",
]


class Drawn(NamedTuple):
    """What a prediction starts from.

    :param dict values: constrained values ``(S, *shape)`` by site.
    :param dict sizes: of the plates around these sites in the model to come, by name.
    """

    values: Mapping[str, Tensor]
    sizes: Mapping[str, int]


@runtime_checkable
class Units(Protocol):
    """Which units are predicted; any object with this method."""

    def draw(self, posterior: PosteriorDraws, num_samples: int, seed: int | None) -> Drawn:
        """Return draws of what is known of them.

        :param Posterior posterior: of the fit.
        :param int num_samples: number of draws.
        :param int seed: of the draws.
        """


@dataclass(frozen=True)
class SeenUnits:
    """The units that were fitted, all of them or some: at the data of the fit, or at other covariates.

    :param index: places of the units in the plate; by default all, in order. The arguments of the model must be for
        these units alone.

    Do not use it for units that were not fitted: :class:`NewUnits`, or :class:`ConditionedUnits` where there are data.
    """

    index: Sequence[int] | Tensor | None = None

    def draw(self, posterior: PosteriorDraws, num_samples: int, seed: int | None) -> Drawn:
        """See :class:`Units`."""
        refuse_minibatch(posterior)
        values, sizes = all_units(posterior, posterior.sample_latents(num_samples, seed))
        layout = posterior.gaussian.unit_model.layout
        if self.index is None:
            return Drawn(values, sizes)
        index = torch.as_tensor(self.index, dtype=torch.long, device=posterior.gaussian.local_loc.device).reshape(-1)
        if not len(index) or not bool(((index >= 0) & (index < layout.num_units)).all()):
            raise IndexError(
                f"units of plate '{layout.frame.name}' are numbered 0 to {layout.num_units - 1}, got {index.tolist()}"
            )
        some = {name: values[name].index_select(1 + posterior.unit_axis(name), index) for name in layout.local_sites}
        return Drawn({**values, **some}, {**sizes, layout.frame.name: len(index)})


@dataclass(frozen=True)
class NewUnits:
    """Units of which nothing is known, as many as the arguments of the model are for: drawn from it, given the globals.

    Do not use it where the new units have data: :class:`ConditionedUnits`.
    """

    def draw(self, posterior: PosteriorDraws, num_samples: int, seed: int | None) -> Drawn:
        """See :class:`Units`.

        :raises ModelError: if the model has no globals, so that a fit says nothing of new units.
        """
        sites = posterior.gaussian.unit_model.layout.global_sites
        if not sites:
            raise ModelError(
                "the model has no globals, so that the fit says nothing of new units. What the model says of them:\n"
                "    Predictive(pyro.poutine.uncondition(model), num_samples=1000)(*args)"
            )
        values = posterior.sample_latents(num_samples, seed)
        return Drawn({name: values[name] for name in sites}, _plate_sizes(sites))


@dataclass(frozen=True)
class ConditionedUnits:
    """Units that were not fitted, given data of their own: see :meth:`Posterior.posterior_for`.

    :param args: arguments of the model with the data of these units. The prediction may have others, for the same
        units.
    :param kwargs: its keyword arguments.

    Do not use it for so many data that the globals should learn from them: fit again.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, *args: Any, **kwargs: Any) -> ConditionedUnits:
        """Return them for a call of the model: ``ConditionedUnits.at(z_new)``."""
        return cls(args, kwargs)

    def draw(self, posterior: PosteriorDraws, num_samples: int, seed: int | None) -> Drawn:
        """See :class:`Units`."""
        found = posterior_for(posterior, self.args, dict(self.kwargs))
        return all_units(found, found.sample_latents(num_samples, seed))


def predictive(
    posterior: PosteriorDraws, units: Units, num_samples: int, seed: int | None, parallel: bool
) -> Predictive:
    """Return a ``pyro.infer.Predictive``, to be called with the model's arguments; see :meth:`Posterior.predictive`."""
    if isinstance(units, type) or not isinstance(units, Units):
        raise TypeError(
            f"units must be SeenUnits(), NewUnits() or ConditionedUnits.at(...), got {units!r}. Arguments of "
            "the model go into the second call:\n    result.predictive(NewUnits())(*args)"
        )
    default = (units.args, dict(units.kwargs)) if isinstance(units, ConditionedUnits) else None
    with torch.no_grad():
        drawn = units.draw(posterior, num_samples, seed)
    return predictive_of(drawn, posterior, default, parallel)


def predictive_of(
    drawn: Drawn,
    posterior: PosteriorDraws,
    default: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    parallel: bool = False,
) -> Predictive:
    """Return a ``pyro.infer.Predictive`` for draws that are at hand.

    :param Drawn drawn: the draws.
    :param Posterior posterior: of the fit.
    :param default: arguments of a call without any; by default those of the data that the posterior is of.
    :param bool parallel: of ``Predictive``.
    """
    unit_model = posterior.gaussian.unit_model
    names = [name for name in unit_model.density.sites if name not in drawn.values]
    default = default or (unit_model.args, unit_model.kwargs)
    model = _Unconditioned(
        posterior.problem.guide.model, default, drawn, unit_model.layout.frame.name, unit_model.density.door
    )
    sites = [*names, *observed_sites(unit_model)]
    return Predictive(model, dict(drawn.values), return_sites=sites, parallel=parallel)


class _Unconditioned:
    """A model whose observations are drawn; called without arguments, at those of the fit."""

    def __init__(
        self, model: Callable[..., Any], default: tuple[Any, Any], drawn: Drawn, unit_plate: str, door: Any
    ) -> None:
        self.default, self.drawn, self.unit_plate, self.door = default, drawn, unit_plate, door
        # Pyro runs the model once by itself, to see its sites. A draw of the posterior serves where the prior has none.
        first = {name: value[0] for name, value in drawn.values.items()}
        self.model = poutine.condition(with_data_drawn(model), data=first)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.door(args, kwargs) if args or kwargs else self.default
        check = _CheckPlates(self.drawn, self.unit_plate)
        with check:
            returned = self.model(*args, **kwargs)
        for name in self.drawn.values:
            if name not in check.seen:
                raise ModelError(
                    f"the model has no site '{name}' at these arguments, and had one in the fit; it must sample all of "
                    "its latents whatever the data are"
                )
        return returned


class _CheckPlates(Messenger):
    """Refuse a run whose plates have other sizes than what is known of them."""

    def __init__(self, drawn: Drawn, unit_plate: str) -> None:
        super().__init__()
        self.drawn, self.unit_plate = drawn, unit_plate
        self.seen: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.drawn.values or site_is_subsample(msg):
            return
        self.seen.add(msg["name"])
        for frame in plates_of(msg):
            expected = self.drawn.sizes.get(frame.name)
            if expected is None or expected == frame.full_size == frame.size:
                continue
            if frame.size != frame.full_size:
                raise ModelError(
                    f"plate '{frame.name}' takes {frame.size} of {frame.full_size} at these arguments; a prediction is "
                    f"for all of them. Leave the minibatch out:\n    pyro.plate('{frame.name}', {frame.full_size})"
                )
            raise ModelError(_other_size(msg["name"], frame, expected, self.unit_plate))


def _other_size(name: str, frame: Any, expected: int, unit_plate: str) -> str:
    text = (
        f"plate '{frame.name}' around site '{name}' has size {frame.full_size} at these arguments, and there are draws "
        f"of {expected}"
    )
    if frame.name != unit_plate:
        return f"{text}; only the plate of the units, '{unit_plate}', may have another"
    return (
        f"{text} units. For other units than those fitted, or for some of these:\n"
        "    result.predictive(NewUnits())(*args)\n"
        "    result.predictive(ConditionedUnits.at(*args))()          # new ones, given their data\n"
        f"    result.predictive(SeenUnits(index))(*args)               # index has {frame.full_size} numbers"
    )


def all_units(posterior: PosteriorDraws, values: Mapping[str, Tensor]) -> Drawn:
    """Return draws of all sites as what a prediction for the same units starts from.

    :param Posterior posterior: that they are of.
    :param values: ``(S, *shape)`` by site.
    """
    layout = posterior.gaussian.unit_model.layout
    return Drawn(values, _plate_sizes({**layout.global_sites, **layout.local_sites}))


def _plate_sizes(sites: Mapping[str, Any]) -> dict[str, int]:
    return {frame.name: int(frame.size) for site in sites.values() for frame in site.plates}


def refuse_minibatch(posterior: PosteriorDraws) -> None:
    """Refuse a posterior that is of a part of the units.

    :raises ModelError: with the line to type.
    """
    posterior.gaussian.unit_model.refuse_minibatch(
        "so that the posterior is one of a minibatch. Go on from where the guide stands with all of them, by arguments "
        "with which the model does not subsample:\n    result = fit(model, result.guide, *args)"
    )
