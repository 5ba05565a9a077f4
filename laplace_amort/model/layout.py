"""Which latents are global and which belong to a unit: the two tensors that the rooms below Pyro work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_amort.autodiff import as_one_unit
from laplace_amort.errors import ModelError
from laplace_amort.model.sites import LatentSite
from laplace_amort.types import element_names

__all__ = ["UnitLayout", "find_layout"]


@dataclass(frozen=True)
class UnitLayout:
    r"""Where each latent site lies in the globals :math:`\theta` ``(d,)`` and in the units' :math:`y` ``(N, k)``.

    A site inside the unit plate is local, whatever other plates it is in: what these hold of a unit belongs to the
    block of that unit. Every other site is global.

    :param frame: the frame of the unit plate, as Pyro has it in ``cond_indep_stack``.
    :param dict global_sites: by name, in the order of the model.
    :param dict local_sites: by name, in the order of the model.

    ``print(layout)`` shows the choice.
    """

    frame: Any
    global_sites: Mapping[str, LatentSite]
    local_sites: Mapping[str, LatentSite]

    @property
    def global_dim(self) -> int:
        """Number ``d`` of unconstrained elements of the globals."""
        return sum(site.shape.numel() for site in self.global_sites.values())

    @property
    def local_dim(self) -> int:
        """Number ``k`` of unconstrained elements of each unit."""
        return sum(self._rest(name).numel() for name in self.local_sites)

    @property
    def num_units(self) -> int:
        """Units in this run, ``B`` of a minibatch."""
        return int(self.frame.size)

    @property
    def weight(self) -> float:
        """What Pyro multiplies the terms of a unit by, ``N / B``."""
        return float(self.frame.full_size / self.frame.size)

    def __str__(self) -> str:
        size = f"{self.frame.full_size} units"
        if self.frame.size != self.frame.full_size:
            size = f"{self.frame.size} of {size}"
        lines = [f"unit plate '{self.frame.name}': {size}, dim {self.frame.dim}"]
        shapes = {name: tuple(site.shape) for name, site in self.global_sites.items()}
        lines.append(f"global, {self.global_dim} in all: {_listed(shapes)}")
        shapes = {name: tuple(self._rest(name)) for name in self.local_sites}
        lines.append(f"local, {self.local_dim} in each unit: {_listed(shapes)}")
        return "\n".join(lines)

    def to_sites(self, global_: Tensor, local: Tensor) -> dict[str, Tensor]:
        """Split both tensors into unconstrained values per site.

        :param Tensor global_: ``(*, d)``. Leading dimensions are those of enclosing plates, such as Pyro's vectorized
            particles, with a 1 for each plate of the model: ``(P, 1, d)``.
        :param Tensor local: ``(*, N, k)``, or with the leading dimensions made into one, or with none.
        :return: values by site; leading dimensions broadcast against the batch shape of each.
        """
        return {**self.global_to_sites(global_), **self._local_to_sites(local, global_.shape[:-1])}

    def global_to_sites(self, global_: Tensor) -> dict[str, Tensor]:
        """Split the globals ``(*, d)`` alone, as :meth:`to_sites` does."""
        values, start = {}, 0
        for name, site in self.global_sites.items():
            stop = start + site.shape.numel()
            values[name] = global_[..., start:stop].reshape(site.shape_under(global_.shape[:-1]))
            start = stop
        return values

    def _local_to_sites(self, local: Tensor, leading: torch.Size) -> dict[str, Tensor]:
        values, start = {}, 0
        for name, site in self.local_sites.items():
            rest = self._rest(name)
            part = local[..., start : start + rest.numel()].reshape(-1, self.num_units, *rest)
            values[name] = part.movedim(1, self.unit_axis(name) + 1).reshape(site.shape_under(leading))
            start += rest.numel()
        return values

    def from_sites(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Join unconstrained values per site, of their own shapes, into ``(d,)`` and ``(N, k)``."""
        parts = [values[name].reshape(-1) for name in self.global_sites]
        global_ = torch.cat(parts) if parts else next(iter(values.values())).new_zeros(0)
        return global_, self.local_from_sites(values)

    def local_from_sites(self, values: Mapping[str, Tensor]) -> Tensor:
        """Join the unconstrained values of the local sites into ``(N, k)``."""
        parts = [values[name].movedim(self.unit_axis(name), 0) for name in self.local_sites]
        return torch.cat([part.reshape(self.num_units, -1) for part in parts], dim=-1)

    def global_elements(self) -> list[str]:
        """Name each of the ``d`` unconstrained elements of the globals, such as ``B[0, 1]``."""
        return [element for name, site in self.global_sites.items() for element in element_names(name, site.shape)]

    def local_elements(self) -> list[str]:
        """Name each of the ``k`` unconstrained elements of a unit, such as ``slope[1]``."""
        return [element for name in self.local_sites for element in element_names(name, self._rest(name))]

    def unit_axis(self, name: str) -> int:
        """Return the axis of the units in the value of a local site, constrained or not."""
        site = self.local_sites[name]
        return len(site.shape) - site.event_dim + int(self.frame.dim)

    def _rest(self, name: str) -> torch.Size:
        """Shape of what one unit has of a local site."""
        shape, axis = self.local_sites[name].shape, self.unit_axis(name)
        return shape[:axis] + shape[axis + 1 :]


def find_layout(sites: Mapping[str, LatentSite], unit_plate: str | None = None) -> UnitLayout:
    """Choose the unit plate and sort the sites.

    :param sites: the latent sites of a model, by name.
    :param str unit_plate: name of the plate; ``None`` for the outermost plate that holds latents, and of several such
        the largest. Latents of the others become globals.
    :return: :class:`UnitLayout`.
    :raises ModelError: if a latent lies in a sequential plate, or none lies in a plate or in that one, or if latents
        outside the unit plate, or in a plate nested in it, are subsampled.
    """
    frames = _plates_of_latents(sites)
    if unit_plate is None:
        outermost = [site.plates[0] for site in sites.values() if site.plates]
        unit_plate = max(outermost, key=lambda frame: frame.full_size).name
    if unit_plate not in frames:
        raise ModelError(
            f"no latent site lies in a plate named '{unit_plate}'; the plates that hold latents are "
            f"{', '.join(repr(name) for name in frames)}:\n    unit_plate='{next(iter(frames))}'"
        )
    local = {name: site for name, site in sites.items() if any(f.name == unit_plate for f in site.plates)}
    layout = UnitLayout(
        frame=frames[unit_plate],
        global_sites={name: site for name, site in sites.items() if name not in local},
        local_sites=local,
    )
    _refuse_other_subsampling(layout)
    return layout


def _plates_of_latents(sites: Mapping[str, LatentSite]) -> dict[str, Any]:
    """The frames of the plates that hold latents, by name; there must be one, and none that is a loop."""
    for name, site in sites.items():
        for plate in site.sequential_plates:
            raise ModelError(
                f"latent site '{name}' lies in the sequential plate '{plate}', a loop in Python over the units. "
                f"Vectorize it:\n    with pyro.plate('{plate}', num_units):\n        pyro.sample(...)"
            )
    frames = {frame.name: frame for site in sites.values() for frame in site.plates}
    if not frames:
        raise ModelError(
            f"no latent site lies in a plate ({', '.join(sites)}), so there are no units. If each unit has a latent, "
            "sample it in a plate (not by .expand or .to_event):\n"
            "    with pyro.plate('units', num_units):\n"
            "        y = pyro.sample('y', dist.Normal(mu, tau))   # y has shape (num_units,)\n"
            f"{as_one_unit(max(len(sites) - 1, *(site.shape.numel() for site in sites.values())))}\n"
            "For a model without units, Pyro has a guide:\n"
            "    pyro.infer.autoguide.AutoLaplaceApproximation(model)"
        )
    return frames


def _refuse_other_subsampling(layout: UnitLayout) -> None:
    """Only the units may be subsampled: nothing else in the guide is made afresh for each minibatch."""
    for name, site in (*layout.global_sites.items(), *layout.local_sites.items()):
        for frame in site.plates:
            if frame.size == frame.full_size or frame.name == layout.frame.name:
                continue
            kind = "belongs to the units" if name in layout.local_sites else "is global"
            raise ModelError(
                f"latent site '{name}' {kind}, but lies in plate '{frame.name}' too, which subsamples {frame.size} of "
                f"{frame.full_size}; of plates with latents only the unit plate '{layout.frame.name}' can be "
                f"subsampled. Use the whole plate, or make it the unit plate:\n    unit_plate='{frame.name}'"
            )


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
