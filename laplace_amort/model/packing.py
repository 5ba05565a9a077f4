"""The latent sites of a model as one packed vector, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from laplace_amort.errors import ModelError
from laplace_amort.model.sites import LatentSite

__all__ = ["Packing"]


class Packing:
    """The order of latent sites in one packed vector, and the way there and back.

    :param sites: by name, in the order of the model.
    """

    def __init__(self, sites: Mapping[str, LatentSite]) -> None:
        self.sites = sites
        self.size = sum(site.shape.numel() for site in sites.values())

    def __str__(self) -> str:
        return ", ".join(f"{site.name} {tuple(site.shape)}" for site in self.sites.values())

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Concatenate unconstrained values of all sites into ``(D,)``."""
        self.check_names(values)
        for name, site in self.sites.items():
            if values[name].shape != site.shape:
                raise ModelError(
                    f"site '{name}' has unconstrained shape {tuple(site.shape)}, got {tuple(values[name].shape)}"
                )
        return torch.cat([values[name].reshape(-1) for name in self.sites])

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Split ``(*, D)`` into unconstrained values per site, with the leading dimensions of enclosing plates."""
        if packed.shape[-1:] != (self.size,):
            raise ModelError(
                f"expected {self.size} unconstrained elements in the order {self}; got shape {tuple(packed.shape)}"
            )
        leading = packed.shape[:-1]
        values = {}
        for name, site in self.sites.items():
            _refuse_overlap(site, leading)
            values[name] = packed[..., site.slice].reshape(site.shape_under(leading))
        return values

    def check_names(self, values: Mapping[str, Tensor]) -> None:
        """Refuse values of other sites, or of some only."""
        missing = [name for name in self.sites if name not in values]
        unknown = [name for name in values if name not in self.sites]
        if missing or unknown:
            raise ModelError(f"expected a value for each of {list(self.sites)}; missing {missing}, unknown {unknown}")


def _refuse_overlap(site: LatentSite, leading: torch.Size) -> None:
    """Refuse leading dimensions of enclosing plates where the site has dimensions of its own."""
    plates = len(site.shape) - site.event_dim
    if any(size != 1 for size in leading[max(len(leading) - plates, 0) :]):
        raise ModelError(
            f"leading shape {tuple(leading)} of the packed values overlaps the batch shape "
            f"{tuple(site.shape[:plates])} of site '{site.name}'. Make room for it:\n"
            f"    packed.reshape({tuple(leading)} + (1,) * {plates} + (-1,))"
        )
