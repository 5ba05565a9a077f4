"""The latent sites of a model as one packed vector, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from laplace_amort.errors import ModelError
from laplace_amort.model.sites import LatentSite

__all__ = ["check_names", "listed", "pack", "unpack"]


def listed(sites: Mapping[str, LatentSite]) -> str:
    """Return names and shapes of sites, in the order of the packed vector."""
    return ", ".join(f"{name} {tuple(site.shape)}" for name, site in sites.items())


def pack(sites: Mapping[str, LatentSite], values: Mapping[str, Tensor]) -> Tensor:
    """Concatenate unconstrained values of all sites into ``(D,)``."""
    check_names(sites, values)
    for name, site in sites.items():
        if values[name].shape != site.shape:
            raise ModelError(
                f"site '{name}' has unconstrained shape {tuple(site.shape)}, got {tuple(values[name].shape)}"
            )
    return torch.cat([values[name].reshape(-1) for name in sites])


def unpack(sites: Mapping[str, LatentSite], packed: Tensor) -> dict[str, Tensor]:
    """Split ``(*, D)`` into unconstrained values per site, with the leading dimensions of enclosing plates."""
    size, leading = sum(site.shape.numel() for site in sites.values()), packed.shape[:-1]
    if packed.shape[-1:] != (size,):
        raise ModelError(
            f"expected {size} unconstrained elements in the order {listed(sites)}; got shape {tuple(packed.shape)}"
        )
    for site in sites.values():
        _refuse_overlap(site, leading)
    return {name: packed[..., site.slice].reshape(site.shape_under(leading)) for name, site in sites.items()}


def check_names(sites: Mapping[str, LatentSite], values: Mapping[str, Tensor]) -> None:
    """Refuse values of other sites, or of some only."""
    missing = [name for name in sites if name not in values]
    unknown = [name for name in values if name not in sites]
    if missing or unknown:
        raise ModelError(f"expected a value for each of {list(sites)}; missing {missing}, unknown {unknown}")


def _refuse_overlap(site: LatentSite, leading: torch.Size) -> None:
    """Refuse leading dimensions of enclosing plates where the site has dimensions of its own."""
    plates = len(site.shape) - site.event_dim
    if any(size != 1 for size in leading[max(len(leading) - plates, 0) :]):
        raise ModelError(
            f"leading shape {tuple(leading)} of the packed values overlaps the batch shape "
            f"{tuple(site.shape[:plates])} of site '{site.name}'. Make room for it:\n"
            f"    packed.reshape({tuple(leading)} + (1,) * {plates} + (-1,))"
        )
