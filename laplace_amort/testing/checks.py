"""The comparisons that :func:`~laplace_amort.testing.check_guide` makes; each returns rows of its report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from laplace_amort.autodiff import CURVATURE, ancestors_of, fixed_normal, is_dual_edge
from laplace_amort.model import LogJoint, undressed
from laplace_amort.testing.expected import ExpectedPrecision
from laplace_amort.testing.finite_differences import derivative
from laplace_amort.testing.gaussian import GuideGaussian
from laplace_amort.testing.report import CheckRow
from laplace_amort.types import element_name

__all__ = ["Subject", "gradients", "log_density", "partial_hessian", "path_leaks"]

_LEAK = "A mean descends from the curvature output. Compute the mode and the mean from dual.mean."
_HESSIAN = (
    "Is the Hessian taken with all latents independent (dual_path, then observed_information(log_joint, "
    "dual.curvature, y_hat)), at the mean of the guide, with Jacobians (LogJoint), sign and scale right?"
)
_DENSITY = "Does the guide account once for the Jacobian of each constrained site? LogJoint.sample_sites does."
_MISSING = "A path is missing: was something detached or computed under no_grad? Compute the mode from dual.mean."
_NOT_SMOOTH = "Finite differences cannot decide: the function is not smooth here, or not deterministic."


@dataclass
class Subject:
    """A guide under examination."""

    loss: Callable[[], float]
    gradient: Callable[[], dict[str, Tensor]]
    leaves: dict[str, Tensor]
    gaussian: GuideGaussian
    expected: ExpectedPrecision
    tolerance: float
    max_elements: int
    progress: bool
    note: str = ""

    def notes(self) -> tuple[str, ...]:
        """Return sentences for the end of the report."""
        checked = [
            f"{name}: {self.max_elements} of {leaf.numel()} elements, drawn at random"
            for name, leaf in self.leaves.items()
            if leaf.numel() > self.max_elements
        ]
        return (*checked, self.note)


def path_leaks(subject: Subject) -> Iterator[CheckRow]:
    """Follow the graph of every unconditional mean: it must not reach a curvature output.

    A mean that is conditional on another draw holds regression coefficients, which descend from the curvature rightly;
    there the comparison of the precision decides.
    """
    gaussian = subject.gaussian
    base = gaussian.origin.clone().requires_grad_()
    trace = gaussian.trace(base)
    drawn = {edge for edge in ancestors_of(base * 1) if getattr(edge[0], "variable", None) is base}
    node: Any
    for name, node in trace.nodes.items():
        if name not in gaussian.log_q.sites:
            continue
        ancestors = ancestors_of(getattr(undressed(node["fn"]), "loc", base.detach()))
        if ancestors & drawn or not any(is_dual_edge(edge) for edge in ancestors):
            continue
        leaks = sum(is_dual_edge(edge, CURVATURE) for edge in ancestors)
        yield CheckRow("path leak", f"mean of '{name}'", leaks, 0, leaks, 0, _LEAK)


def partial_hessian(subject: Subject) -> Iterator[CheckRow]:
    """Compare the precision with finite differences of the gradient of the model's log joint, at the guide's mean."""
    gaussian, log_joint = subject.gaussian, subject.gaussian.log_joint
    mean, found = (moment.detach() for moment in gaussian.moments())

    def gradient(direction: Tensor, h: float) -> Tensor:
        point = (mean + h * direction).requires_grad_()
        return torch.autograd.grad(log_joint(point), point)[0]

    columns, errors = [], []
    floor = found.diagonal().abs().sqrt()  # of a gradient, per conditional standard deviation
    for i in tqdm(range(len(mean)), "partial Hessian", disable=not subject.progress, leave=False):
        direction = torch.zeros_like(mean)
        direction[i] = found[i, i].abs().rsqrt()  # steps in units of the conditional standard deviation
        along = functools.partial(gradient, direction)
        column, error = derivative(along, mean.dtype, subject.tolerance / 100, floor)
        columns.append(column / direction[i])
        errors.append(error / direction[i])
    hessian = torch.stack(columns)
    expected, error, subject.note = subject.expected(log_joint, mean, -(hessian + hessian.mT) / 2, torch.stack(errors))
    # Relative to the scale that the two coordinates have, and so independent of their units.
    size = (expected.diagonal().unsqueeze(-1) * expected.diagonal()).sqrt()
    relative = (found - expected).abs() / size
    i, j = divmod(int(relative.argmax()), len(mean))
    yield CheckRow(
        "partial Hessian",
        f"{_element(log_joint, i)}, {_element(log_joint, j)}",
        float(found[i, j]),
        float(expected[i, j]),
        float(relative[i, j]),
        subject.tolerance,
        _HESSIAN,
        _NOT_SMOOTH if (error / size).max() > subject.tolerance else "",
    )


def log_density(subject: Subject) -> Iterator[CheckRow]:
    """Compare what the sites of the guide sum up to with the pushed-forward density of what it draws."""
    gaussian = subject.gaussian
    base_mean, precision = (moment.detach() for moment in gaussian.base_moments())
    base = base_mean + precision.diagonal().rsqrt() * fixed_normal(base_mean)
    log_volume = torch.linalg.slogdet(gaussian.jacobian(base))[1]
    expected = gaussian.log_q(base) - log_volume - gaussian.log_joint.log_jacobian(gaussian.to_model(base))
    found: Any = gaussian.trace(base).log_prob_sum()
    found, expected = found.detach(), expected.detach()
    error = float((found - expected).abs() / (1 + expected.abs()))
    yield CheckRow("log density", "all sites", float(found), float(expected), error, subject.tolerance, _DENSITY)


def gradients(subject: Subject) -> Iterator[CheckRow]:
    """Compare derivatives of the loss, the mean and the precision in each parameter with finite differences."""
    views = _Views(subject)
    generator = torch.Generator().manual_seed(0)
    for name, leaf in subject.leaves.items():
        chosen = torch.randperm(leaf.numel(), generator=generator)[: subject.max_elements]
        found = views.autograd(name, chosen)
        expected, errors = views.finite_differences(name, chosen)
        for q, quantity in enumerate(views.names):
            scale = torch.maximum(expected[q].abs().max(), views.floors[q])
            relative = (found[q] - expected[q]).abs() / scale
            worst = int(relative.argmax())
            yield CheckRow(
                quantity,
                element_name(name, _index(int(chosen[worst]), leaf.shape)),
                float(found[q, worst]),
                float(expected[q, worst]),
                float(relative[worst]),
                subject.tolerance,
                _MISSING,
                _NOT_SMOOTH if (errors[q] / scale).max() > subject.tolerance else "",
            )


class _Views:
    """Numbers to differentiate: the loss, and random one-dimensional views of mean and precision, one per site.

    ``floors`` says of each below which size a derivative counts as zero: a share of the quantity itself, the nat being
    the unit of a loss.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        sites = subject.gaussian.log_joint.sites
        self.names = ["ELBO gradient", *(f"{what} of '{name}'" for what in ("mean", "precision") for name in sites)]
        numbers = torch.zeros(2, subject.gaussian.log_joint.size, dtype=torch.float64)
        left, self.right = fixed_normal(numbers, seed=1)
        own = torch.zeros(len(sites), len(left), dtype=torch.float64)
        for view, site in zip(own, sites.values(), strict=True):
            view[site.slice] = 1.0
        self.left = own * left

        mean, precision = (moment.detach().double().cpu() for moment in subject.gaussian.moments())
        spread, sizes = mean.abs() + precision.diagonal().rsqrt(), self.left.abs()
        loss = torch.tensor([1 + abs(subject.loss())], dtype=torch.float64)
        self.floors = 1e-3 * torch.cat([loss, sizes @ spread, sizes @ precision.abs() @ self.right.abs()])

        leaves = list(subject.leaves.values())
        gradients = [torch.autograd.grad(v, leaves, retain_graph=True, allow_unused=True) for v in self._moments()]
        loss_gradient = subject.gradient()
        self.by_leaf = {
            name: torch.stack(
                [loss_gradient[name], *(torch.zeros_like(leaf) if g[k] is None else g[k] for g in gradients)]
            )
            for k, (name, leaf) in enumerate(subject.leaves.items())
        }

    def _moments(self) -> Tensor:
        """Return the views of mean and precision, differentiable in the parameters."""
        mean, precision = self.subject.gaussian.moments()
        left, right = self.left.to(mean), self.right.to(mean)
        return torch.cat([left @ mean, left @ precision @ right])

    def autograd(self, name: str, chosen: Tensor) -> Tensor:
        """Return derivatives ``(Q, K)`` in the chosen elements of a parameter, as autograd has them."""
        return self.by_leaf[name].reshape(len(self.names), -1).double().cpu()[:, chosen]

    def finite_differences(self, name: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return those derivatives by finite differences, with estimates of their errors."""
        leaf, subject = self.subject.leaves[name], self.subject
        columns = [
            derivative(
                functools.partial(self._displaced, leaf, _index(element, leaf.shape)),
                leaf.dtype,
                subject.tolerance / 100,
                self.floors,
            )
            for element in tqdm(chosen.tolist(), name, disable=not subject.progress, leave=False)
        ]
        values, errors = zip(*columns, strict=True)
        return torch.stack(values, dim=-1), torch.stack(errors, dim=-1)

    def _displaced(self, leaf: Tensor, index: tuple[int, ...], h: float) -> Tensor:
        """Return all numbers with one element of a parameter moved by ``h``."""
        original = leaf.data[index].clone()
        try:
            leaf.data[index] = original + h
            loss = torch.tensor([self.subject.loss()], dtype=torch.float64)
            return torch.cat([loss, self._moments().detach().double().cpu()])
        finally:
            leaf.data[index] = original


def _index(position: int, shape: torch.Size) -> tuple[int, ...]:
    """Find the index of an element by its position in the flattened tensor."""
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(position), shape)) if shape else ()


def _element(log_joint: LogJoint, position: int) -> str:
    """Name the element at a position in the packed vector."""
    site = next(site for site in log_joint.sites.values() if position < site.slice.stop)
    return element_name(site.name, _index(position - site.start, site.shape))
