"""Reading the Gaussian out of a guide: its mean, precision and density, whatever sites it is written with.

The *base* sites of a guide are those it draws; every other latent site is a ``Delta`` that follows from them. The log
density of the base sites, as a function of their unconstrained values, is a quadratic if the guide is a Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from laplace_amort.autodiff import fixed_normal, observed_information
from laplace_amort.errors import GuideCheckError
from laplace_amort.model import LogJoint, undressed

__all__ = ["GuideGaussian", "is_base_site"]


def is_base_site(node: Any) -> bool:
    """Say whether a site of a guide is drawn, and not a ``Delta``, a factor, or the indices of a plate."""
    return (
        node["type"] == "sample"
        and not node["is_observed"]
        and not site_is_subsample(node)
        and not isinstance(undressed(node["fn"]), dist.Delta)
    )


class GuideGaussian:
    """The Gaussian that a guide samples from, in unconstrained coordinates of the model's latents.

    :param LogJoint log_joint: of the model, with the subsample indices of ``indices`` fed in.
    :param guide: the guide.
    :param indices: subsample indices by plate name.
    :param args: arguments of the guide.
    :param kwargs: keyword arguments of the guide.
    :raises GuideCheckError: if the guide draws nothing, lacks a latent of the model, or is not Gaussian.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        guide: Callable[..., Any],
        indices: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.log_joint = log_joint
        self.guide = guide
        self.indices = dict(indices)
        self.args, self.kwargs = args, kwargs
        base_only = poutine.block(_Unscaled()(guide), hide_fn=lambda node: not is_base_site(node) and _is_site(node))
        self.log_q = LogJoint(base_only, *args, **kwargs).with_indices(**indices)
        self.origin = self.log_q.initial()

    def base_moments(self) -> tuple[Tensor, Tensor]:
        """Return mean ``(D,)`` and precision ``(D, D)`` of the base draw, differentiable in the parameters."""
        runs = []

        def log_q(packed: Tensor) -> Tensor:
            runs.append((packed, self.log_q(packed)))
            return runs[-1][1]

        precision = observed_information(log_q, self.origin)
        ((packed, value),) = runs  # one run of the guide serves slope and curvature
        (slope,) = torch.autograd.grad(value, packed, create_graph=True)
        return self.origin + torch.linalg.solve(precision, slope), precision  # a Newton step, exact for a quadratic

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and precision in the model's packed coordinates, differentiable in the parameters."""
        base_mean, base_precision = self.base_moments()
        mean, rows = self._image(base_mean)
        inverse = torch.linalg.inv(rows)
        return mean, inverse.mT @ base_precision @ inverse

    def require_affine(self) -> None:
        """Compare the map from the base draw to the latents at two points: only an affine one keeps a Gaussian.

        :raises GuideCheckError: if they differ.
        """
        mean, precision = (moment.detach() for moment in self.base_moments())
        points = mean, mean + precision.diagonal().rsqrt() * fixed_normal(mean)
        pairs = [(self.jacobian(point), observed_information(self.log_q, point)) for point in points]
        for here, there in zip(*pairs, strict=True):
            if (here - there).abs().max() > 1e-4 * here.abs().max():
                raise GuideCheckError(
                    "the guide is not Gaussian in unconstrained coordinates: its log density is not a quadratic in "
                    "what it draws, or the latents are not affine in that"
                )

    def to_model(self, base: Tensor) -> Tensor:
        """Map a base draw ``(D,)`` to the packed unconstrained latents ``(D,)`` of the model."""
        trace = self.trace(base)
        missing = [name for name in self.log_joint.sites if name not in trace.nodes]
        if missing:
            raise GuideCheckError(f"the guide has no site for the latents {missing} of the model")
        nodes: dict[str, Any] = dict(trace.nodes)
        return self.log_joint.unconstrain({name: nodes[name]["value"] for name in self.log_joint.sites})

    def jacobian(self, base: Tensor) -> Tensor:
        """Return the derivative ``(D, D)`` of :meth:`to_model`.

        :raises GuideCheckError: if the guide does not draw as many numbers as the model has latents.
        """
        return self._image(base)[1]

    def _image(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents ``(D,)`` and their derivative ``(D, D)``, from one run of the guide."""
        self._check_size(base)
        with torch.enable_grad():
            point = base.detach().requires_grad_() if not base.requires_grad else base
            image = self.to_model(point)
            (rows,) = torch.autograd.grad(
                image, point, torch.eye(base.numel()).to(base), is_grads_batched=True, create_graph=True
            )
        return image, rows

    def _check_size(self, base: Tensor) -> None:
        if base.numel() != self.log_joint.size:
            raise GuideCheckError(
                f"the guide draws {base.numel()} numbers for {self.log_joint.size} unconstrained latents of the model "
                f"({self.log_joint!r}); a Gaussian with a precision matrix needs as many"
            )

    def trace(self, base: Tensor) -> poutine.Trace:
        """Trace the guide at a base draw, hidden from handlers outside and without subsampling weights."""
        values: dict[str, Any] = {**self.log_q.constrain(base), **self.indices}
        with poutine.block(), poutine.condition(data=values):
            return poutine.trace(_Unscaled()(self.guide)).get_trace(*self.args, **self.kwargs)


class _Unscaled(Messenger):
    """Undo ``poutine.scale`` and the weights of subsampled plates: the density of the draw itself."""

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            msg["scale"] = 1.0


def _is_site(node: Any) -> bool:
    return node["type"] == "sample" and not site_is_subsample(node)
