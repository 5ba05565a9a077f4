"""One member of the amortized Laplace family: the Gaussian that a guide is at its present parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor
from torch.distributions.transforms import ComposeTransform, ExpTransform, IndependentTransform, Transform

from laplace_amort.errors import ModelError
from laplace_amort.linalg import Arrowhead, RepairReport
from laplace_amort.model import UnitModel

__all__ = ["LaplaceGaussian", "is_elementwise", "is_exponential", "is_identity", "of_one_event"]

_SHOWN = 12  # globals in what is printed
_NODES = 41  # of the Gauss-Hermite rule for means in constrained space
_LOOPED = 8  # rows that a loop does for


@dataclass(frozen=True)
class LaplaceGaussian:
    r"""A Gaussian over globals and units in unconstrained space, its precision a block arrowhead.

    .. math:: \theta \sim N(\hat\theta, S^{-1}), \qquad
              y_i \mid \theta \sim N\big(\hat y_i - W_i (\theta - \hat\theta),\; U_i^{-1}\big).

    :param UnitModel unit_model: the model that it approximates, for given data.
    :param Tensor global_loc: :math:`\hat\theta`, ``(d,)``.
    :param Tensor local_loc: :math:`\hat y`, ``(N, k)``.
    :param Arrowhead precision: of a unit as it is, without the weight of a minibatch.
    :param RepairReport head_report: what was repaired in :math:`S`.
    :param RepairReport tail_report: what was repaired in the :math:`U_i`.
    """

    unit_model: UnitModel
    global_loc: Tensor
    local_loc: Tensor
    precision: Arrowhead
    head_report: RepairReport
    tail_report: RepairReport

    def __repr__(self) -> str:
        return f"LaplaceGaussian(approximation at the optimum, {self.unit_model.sizes()})"

    def __str__(self) -> str:
        layout = self.unit_model.layout
        sds = self.precision.global_variance().sqrt().tolist()
        elements = zip(layout.global_elements(), self.global_loc.tolist(), sds, strict=True)
        shown = [f"    {name}: {loc:.4g}, sd {sd:.2g}" for name, loc, sd in elements]
        if len(shown) > _SHOWN:
            shown = [*shown[:_SHOWN], f"    and {len(shown) - _SHOWN} more"]
        title = f"Gaussian approximation at the optimum, in unconstrained space: {self.unit_model.sizes()}"
        return "\n".join([title, *shown])

    def to(self, unit_model: UnitModel, dtype: torch.dtype) -> LaplaceGaussian:
        """Return the same Gaussian in another dtype, of the same model run in that."""
        loc, local_loc, precision = self.global_loc.to(dtype), self.local_loc.to(dtype), self.precision.to(dtype)
        return replace(self, unit_model=unit_model, global_loc=loc, local_loc=local_loc, precision=precision)

    def sample_sites(self, prefix: str, plates: dict[str, Any]) -> dict[str, Tensor]:
        """In a guide: sample every latent site of the model.

        :param str prefix: of the names of the auxiliary sites.
        :param plates: the plates of the model, opened by the guide, by name.
        :return: constrained values by site.
        """
        layout, frame = self.unit_model.layout, self.unit_model.layout.frame
        global_ = self.global_loc
        if layout.global_dim:
            # A factor that was just made is what it should be.
            scale_tril = self.precision.global_scale_tril
            normal = dist.MultivariateNormal(self.global_loc, scale_tril=scale_tril, validate_args=False)
            global_ = pyro.sample(f"_{prefix}_global", normal, infer={"is_auxiliary": True})
        # Units are drawn as standard normals, which are then shifted and scaled: with plain elementwise densities for
        # blocks of any size, and none of it on the way of the gradient but the log-determinant beside them.
        zeros = torch.zeros_like(self.local_loc[0])
        with plates[frame.name]:
            standard = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
            noise = pyro.sample(f"_{prefix}_local_noise", standard, infer={"is_auxiliary": True})
            if am_i_wrapped():  # a bare call has no density to keep
                log_scale = self.precision.local_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
                log_scale = log_scale.reshape((-1,) + (1,) * (-frame.dim - 1))
                pyro.factor(f"_{prefix}_local_log_scale", -log_scale, has_rsample=True)
        if not layout.global_dim:  # the enclosing plates show in the units alone
            global_ = global_.expand(*noise.narrow(frame.dim - 1, 0, 1).shape[:-1], 0)
        # Enclosing plates, such as vectorized particles, are made one leading dimension.
        noise = noise.movedim(frame.dim - 1, -2)
        noise = noise.reshape(-1, *noise.shape[-2:])
        deviation = (global_ - self.global_loc).reshape(len(noise), layout.global_dim)
        local = self._local(deviation, noise)
        return self.unit_model.density.sample_values(layout.to_sites(global_, local), plates.values())

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draw from the Gaussian; returns constrained values ``(num_samples, *shape)`` by site."""
        noise = torch.randn(num_samples, *self.local_loc.shape).to(self.local_loc)
        deviation = torch.randn(num_samples, len(self.global_loc)).to(self.global_loc)
        deviation = deviation @ self.precision.global_scale_tril.mT
        return self.constrained(self.global_loc + deviation, self._local(deviation, noise))

    def median(self) -> dict[str, Tensor]:
        """Return the constrained image of the mean, by site: the median, where the support is element by element."""
        layout = self.unit_model.layout
        return self.unit_model.density.to_constrained(layout.to_sites(self.global_loc, self.local_loc))

    def quantiles(self, quantiles: Sequence[float] | Tensor) -> dict[str, Tensor]:
        """Return the constrained images of the marginal quantiles, ``(Q, *shape)`` by site.

        :param quantiles: between 0 and 1.
        """
        probabilities = torch.as_tensor(quantiles).to(self.global_loc).reshape(-1)
        return self._at(torch.special.ndtri(probabilities))

    def mean(self) -> dict[str, Tensor]:
        r"""Return the mean of each site in constrained space, by Gauss-Hermite quadrature of its normal marginals.

        :raises ModelError: for a site whose support is not element by element, such as a simplex.
        """
        for name, site in self.unit_model.density.sites.items():
            if site.transform is None or not is_elementwise(site.transform):
                raise ModelError(
                    f"the mean of site '{name}' is no integral over one normal variable; average draws instead:\n"
                    f"    guide.sample_posterior(1000, *args)['{name}'].mean(0)"
                )
        nodes, weights = (torch.as_tensor(rule) for rule in numpy.polynomial.hermite_e.hermegauss(_NODES))
        weights = (weights / weights.sum()).to(self.global_loc)
        values = self._at(nodes.to(self.global_loc))
        return {name: torch.tensordot(weights, value, dims=1) for name, value in values.items()}

    def _local(self, deviation: Tensor, noise: Tensor) -> Tensor:
        """Units ``(L, N, k)`` for deviations ``(L, d)`` of the globals and standard normal noise ``(L, N, k)``."""
        return self.local_loc + self.precision.draw_local(deviation, noise)

    def _at(self, z: Tensor) -> dict[str, Tensor]:
        """Constrained values ``z (Q,)`` marginal standard deviations from the mean, ``(Q, *shape)`` by site."""
        global_ = self.global_loc + z[:, None] * self.precision.global_variance().sqrt()
        local = self.local_loc + z[:, None, None] * self.precision.local_variance().sqrt()
        return self.constrained(global_, local)

    def constrained_globals(self, global_: Tensor) -> dict[str, Tensor]:
        """Return constrained values ``(Q, *shape)`` of the global sites, for globals ``(Q, d)``."""
        layout = self.unit_model.layout
        if any(site.transform is None for site in layout.global_sites.values()):  # it takes runs of the model
            return _row_by_row(self.unit_model.constrain_global, global_)
        return _for_each(layout.global_sites, global_, self.unit_model.constrain_global)

    def constrained(self, global_: Tensor, local: Tensor) -> dict[str, Tensor]:
        """Return constrained values ``(Q, *shape)`` by site, for globals ``(Q, d)`` and units ``(Q, N, k)``."""
        density, to_sites = self.unit_model.density, self.unit_model.layout.to_sites
        return _for_each(density.sites, global_, lambda rows: density.to_constrained(to_sites(rows, local)))


def _row_by_row(function: Callable[[Tensor], dict[str, Tensor]], rows: Tensor) -> dict[str, Tensor]:
    """Values by site of a function of one row, for all rows: by one run that is mapped over them, if it can be."""

    def looped(some: Tensor) -> dict[str, Tensor]:
        found = [function(row) for row in some]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    if len(rows) <= _LOOPED:
        return looped(rows)
    try:
        with pyro.validation_enabled(False):
            mapped: dict[str, Tensor] = torch.func.vmap(function)(rows)
    except Exception:  # whatever a model of the user's does that cannot be mapped
        return looped(rows)
    some = torch.tensor([0, len(rows) // 2, len(rows) - 1])
    seen = looped(rows[some])
    same = all(torch.allclose(mapped[name][some], value, equal_nan=True) for name, value in seen.items())
    return mapped if same else looped(rows)


def _for_each(
    sites: Mapping[str, Any], global_: Tensor, constrain: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Constrained values ``(Q, *shape)`` of sites for globals ``(Q, d)``, by a function of ``(Q, 1, ..., 1, d)``."""
    ranks = {name: len(site.shape) - site.event_dim for name, site in sites.items()}
    room = (1,) * max(ranks.values(), default=0)  # for the plates of the model
    values = constrain(global_.reshape(len(global_), *room, -1))
    return {
        name: value.reshape(len(value), *value.shape[value.dim() - ranks[name] - sites[name].constrained_event_dim :])
        for name, value in values.items()
    }


def is_elementwise(transform: Transform) -> bool:
    """Tell whether each element of the constrained value is a function of one element of the unconstrained one."""
    transform = of_one_event(transform)
    return int(transform.domain.event_dim) == 0 and int(transform.codomain.event_dim) == 0


def is_exponential(transform: Transform | None) -> bool:
    """Tell whether the unconstrained value is a logarithm: of the constrained one, or of its distance from a bound."""
    transform = of_one_event(transform)
    if isinstance(transform, ComposeTransform):
        return any(is_exponential(part) for part in transform.parts)
    return isinstance(transform, ExpTransform)


def is_identity(transform: Transform | None) -> bool:
    """Tell whether the unconstrained value is the constrained one."""
    transform = of_one_event(transform)
    return isinstance(transform, ComposeTransform) and all(is_identity(part) for part in transform.parts)


def of_one_event(transform: Any) -> Any:
    """Return the transform that one for several dimensions repeats."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform
