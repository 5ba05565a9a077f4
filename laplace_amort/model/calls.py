"""The calls of a model, each with data of its own: which units it takes, and the plates that go with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from laplace_amort.errors import ModelError
from laplace_amort.model.handlers import SubsampledPlate
from laplace_amort.model.layout import find_layout
from laplace_amort.model.log_joint import LogJoint
from laplace_amort.model.unit_model import UnitModel

__all__ = ["UnitModels", "all_plates"]


class UnitModels:
    """Makes the :class:`UnitModel` of each call of a guide, and the plates that go with it.

    The sites of the model are looked for again only where they may have changed: when it is called with data of other
    sizes, and in every call where it subsamples, because the last minibatch may be short.

    :param model: a Pyro model.
    :param str unit_plate: see :func:`~laplace_amort.model.layout.find_layout`.
    """

    def __init__(self, model: Callable[..., Any], unit_plate: str | None) -> None:
        self.model = model
        self.unit_plate = unit_plate
        self._density: LogJoint | None = None
        self._has_bounds = False
        self._signature: Any = None

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], chosen: Mapping[str, Any]
    ) -> tuple[UnitModel, dict[str, Any]]:
        """Open the plates of the model that are not among the ``chosen``, and see the model through their indices.

        :param args: positional arguments of the model.
        :param kwargs: its keyword arguments.
        :param chosen: plates made elsewhere, by name.
        :return: the model of this call, and all its plates by name.
        """
        density = self._find(args, kwargs, {name: plate.indices for name, plate in chosen.items()})
        plates = all_plates(density, chosen)
        density = density.with_indices(**{name: plate.indices for name, plate in plates.items()})
        layout = find_layout(density.sites, self.unit_plate)
        return UnitModel(density, layout, plates[layout.frame.name].indices), plates

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any], indices: Mapping[str, Tensor]) -> LogJoint:
        signature = _signature((args, kwargs, indices))
        if (
            self._density is None
            or self._density.subsampled_plates
            or self._density.imputed
            or self._density.kept
            or signature != self._signature
        ):
            density = LogJoint.at_indices(indices, self.model, *args, **kwargs)
            self._density, self._signature = density.given(), signature
            self._has_bounds = any(site.bounds for site in density.sites.values())
            return density
        density = self._density.given(*args, **kwargs)
        return density.with_supports() if self._has_bounds else density


def all_plates(density: LogJoint, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The plates of the model: those chosen, those it subsamples, and those around its latents."""
    plates = dict(chosen)
    for plate in density.subsampled_plates:
        if plate.name in plates:
            _refuse_two_choices(plate, plates[plate.name].indices)
        else:
            how = {"subsample_size": plate.subsample_size} if plate.given is None else {"subsample": plate.given}
            plates[plate.name] = pyro.plate(plate.name, plate.size, dim=plate.dim, **how)
    for site in density.sites.values():
        for frame in site.plates:
            if frame.name not in plates:
                plates[frame.name] = pyro.plate(frame.name, frame.full_size, dim=frame.dim)
    return plates


def _refuse_two_choices(plate: SubsampledPlate, chosen: Tensor) -> None:
    if plate.given is not None and not torch.equal(plate.given, chosen):
        raise ModelError(
            f"the model takes the units {plate.given.tolist()[:5]}... of plate '{plate.name}' by subsample=, and the "
            f"guide's create_plates {chosen.tolist()[:5]}...; leave it to the model:\n    AutoLaplaceFamily(model)"
        )


def _signature(value: Any) -> Any:
    """What of the arguments of a model may change the shapes of its sites."""
    if isinstance(getattr(value, "shape", None), tuple):  # tensors, arrays of numpy, frames of pandas
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return {key: _signature(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_signature(item) for item in value]
    # Of an object nothing is known: it equals no other, so that the sites are looked for in every call.
    return value if isinstance(value, int | float | str | None) else object()
