"""Check whether a guide of the Laplace family has the precision and the gradient that it should have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from laplace_amort.errors import GuideCheckError
from laplace_amort.linalg import SoftAbs
from laplace_amort.model import LogJoint
from laplace_amort.testing import checks
from laplace_amort.testing.expected import ExpectedPrecision, expected_of
from laplace_amort.testing.gaussian import GuideGaussian, is_base_site
from laplace_amort.testing.report import CheckReport

__all__ = ["CheckSettings", "check_guide"]


@dataclass(frozen=True)
class CheckSettings:
    """How :func:`check_guide` checks.

    :param ELBO elbo: whose gradient is checked; options A and B of :mod:`laplace_amort.guide.routes` are ELBOs too.
    :param precision: what the precision of the guide should be. By default that of
        :class:`~laplace_amort.AutoLaplaceFamily` is what its head, its repair and its unit plate ask for,
        :class:`~laplace_amort.testing.JointPrecision` or :class:`~laplace_amort.testing.MarginalPrecision`, and that
        of any other guide is the observed information, repaired as a whole: ``DensePrecision(repair)``.
    :param repair: what a hand-written guide does to its information; applied to the expected one before they are
        compared, with the matrix as the only argument. :class:`~laplace_amort.SoftAbs` is even: one that is to tell the
        sign of the information must have a bound, in the guide: ``SoftAbs(max_relative_change=1.9)``.
    :param int seed: of the common random numbers, and of the choice of elements.
    :param int max_elements: elements of each parameter to differentiate by finite differences, drawn at random.
    :param float tolerance: bound on relative errors; ``None`` for 1e-5 in float64 and 2e-2 in float32.
    :param bool progress: whether to show a progress bar on stderr.
    """

    elbo: ELBO = field(default_factory=Trace_ELBO)
    precision: ExpectedPrecision | None = None
    repair: Callable[[Tensor], tuple[Tensor, Any]] = field(default_factory=SoftAbs)
    seed: int = 0
    max_elements: int = 64
    tolerance: float | None = None
    progress: bool = False


def check_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    settings: CheckSettings | None = None,
    **kwargs: Any,
) -> CheckReport:
    r"""Check a guide of the amortized Laplace family, hand-written or automatic, at its present parameters.

    Five comparisons, each of which catches what the others cannot:

    - *ELBO gradient*: each parameter's gradient against finite differences of the loss with common random numbers. A
      path that is missing shows here.
    - *mean*, *precision*: their derivatives in each parameter against finite differences, site by site. They tell
      *which* path is missing.
    - *partial Hessian*: the precision of the guide against the negative Hessian of the model's log joint at the mean
      of the guide, every latent an independent argument, by finite differences of gradients. A Hessian that sees
      :math:`\partial\hat y/\partial\hat\theta`, lacks a Jacobian, has a wrong sign or a scale too many shows here.
      Of :class:`~laplace_amort.AutoLaplaceFamily` the blocks are repaired as its own are, and with
      :class:`~laplace_amort.MarginalCurvature` the log-determinants of the units are differenced along modes that are
      searched anew; see :class:`CheckSettings`.
    - *log density*: what the sites of the guide sum up to against the Gaussian pushed through the constraints.
    - *path leak*: no mean may descend from the curvature output of a :func:`~laplace_amort.dual_path`.

    Do not use it to judge how good the approximation is: a guide can be right and a poor fit. The model and the guide
    must not be wrapped in a common ``poutine.scale``; pass them as they are. Parameters, their gradients and the state
    of the random number generators are left as they were.

    :param model: a Pyro model with continuous latents.
    :param guide: a guide that is Gaussian in unconstrained coordinates, with reparameterized sites.
    :param args: arguments of both.
    :param CheckSettings settings: see there.
    :param kwargs: keyword arguments of both.
    :return: :class:`~laplace_amort.testing.CheckReport`, which prints as a table.
    :raises GuideCheckError: if a comparison fails or cannot be decided; it names the parameter or site, the element
        and both values, and has the ``report``.
    :raises ModelError: if the model is one that :class:`~laplace_amort.LogJoint` refuses.

    Cost: 6 losses and 6 readings of the guide's moments per element of a parameter, and 6 gradients of the log joint
    per latent; up to 5 times that where a function is hard to difference. The marginal curvature takes 7 searches for
    the modes, with dense matrices, per pair of globals.

    Example: under pytest this is the whole test::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from laplace_amort import LogJoint, dual_path_param, observed_information
        >>> def model(z):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(mu, 1.))
        ...         pyro.sample("z", dist.Poisson(y.exp()), obs=z)
        >>> def guide(z):
        ...     log_joint = LogJoint(model, z)
        ...     mu = dual_path_param("mu_hat", torch.tensor(0.3).double())
        ...     y_hat = mu.mean + z / 9              # any smooth function will do for the check
        ...     precision = observed_information(log_joint, mu.curvature, y_hat)
        ...     loc = torch.cat([mu.mean.reshape(1), y_hat])
        ...     normal = dist.MultivariateNormal(loc, precision_matrix=precision)
        ...     log_joint.sample_sites(pyro.sample("joint", normal, infer={"is_auxiliary": True}))
        >>> pyro.clear_param_store()
        >>> check_guide(model, guide, torch.tensor([1., 4.], dtype=torch.float64)).ok
        True
    """
    settings = settings or CheckSettings()
    with _preserved_state(settings.seed), torch.enable_grad():
        trace = _guide_trace(guide, settings.seed, args, kwargs)
        leaves = _leaves(model, guide, settings.seed, args, kwargs)
        nodes: dict[str, Any] = dict(trace.nodes)
        indices: dict[str, Tensor] = {name: node["value"] for name, node in nodes.items() if site_is_subsample(node)}
        log_joint = LogJoint(model, *args, **kwargs).with_indices(**indices)
        log_joint.initial()  # refuses to run with a subsampled plate that the guide has not opened
        gaussian = GuideGaussian(log_joint, guide, indices, args, kwargs)
        gaussian.require_affine()
        tolerance = settings.tolerance or (1e-5 if gaussian.origin.dtype == torch.float64 else 2e-2)
        subject = checks.Subject(
            loss=_loss(settings, tolerance, model, guide, args, kwargs),
            gradient=_gradient(settings, leaves, model, guide, args, kwargs),
            leaves=leaves,
            gaussian=gaussian,
            expected=settings.precision or expected_of(guide, settings.repair),
            tolerance=tolerance,
            max_elements=settings.max_elements,
            progress=settings.progress,
        )
        rows = [
            *checks.path_leaks(subject),
            *checks.partial_hessian(subject),
            *checks.log_density(subject),
            *checks.gradients(subject),
        ]
    report = CheckReport(tuple(rows), subject.notes())
    report.raise_if_failed()
    return report


@contextlib.contextmanager
def _preserved_state(seed: int) -> Iterator[None]:
    """Seed all generators, and put them back."""
    state = pyro.util.get_rng_state()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)


def _guide_trace(guide: Any, seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
    """Run the guide once.

    :raises GuideCheckError: if it draws nothing, or draws what is not reparameterized.
    """
    pyro.set_rng_seed(seed)
    with poutine.block():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    node: Any
    drawn = {name: node for name, node in trace.nodes.items() if is_base_site(node)}
    if not drawn:
        raise GuideCheckError("the guide draws no continuous site; there is no Gaussian to check")
    for name, node in drawn.items():
        if not node["fn"].has_rsample:
            raise GuideCheckError(
                f"site '{name}' of the guide ({type(node['fn']).__name__}) is not reparameterized, so finite "
                "differences with common random numbers cannot tell its gradient"
            )
    return trace


def _leaves(model: Any, guide: Any, seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Find the unconstrained parameters of both, by name."""
    pyro.set_rng_seed(seed)
    with poutine.block(), poutine.trace(param_only=True) as capture:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        poutine.replay(model, trace=guide_trace)(*args, **kwargs)
    nodes: dict[str, Any] = dict(capture.trace.nodes)
    leaves = {name: node["value"].unconstrained() for name, node in nodes.items()}
    trainable = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad and leaf.numel()}
    if not trainable:
        raise GuideCheckError("the guide has no parameter: nothing was declared by pyro.param or dual_path_param")
    return trainable


def _loss(settings: CheckSettings, tolerance: float, *call: Any) -> Callable[[], float]:
    """Return the loss, with common random numbers, as a function of the parameters as they stand.

    :raises GuideCheckError: if it differs from run to run.
    """
    model, guide, args, kwargs = call
    elbo: Any = settings.elbo
    pyro.set_rng_seed(settings.seed)
    elbo.loss(model, guide, *args, **kwargs)  # a vectorized ELBO first runs both once to count plates

    def loss() -> float:
        pyro.set_rng_seed(settings.seed)
        return float(elbo.loss(model, guide, *args, **kwargs))

    first, second = loss(), loss()
    # A search for modes that starts where the last one ended may end elsewhere by a rounding error: that does no harm.
    if not abs(first - second) <= 1e-3 * tolerance * (1 + abs(first)):
        raise GuideCheckError(
            "the loss differs between two runs with the same seed: the guide or the model draws random numbers that "
            "pyro.set_rng_seed does not control, or keeps state from one run to the next"
        )
    return loss


def _gradient(settings: CheckSettings, leaves: dict[str, Tensor], *call: Any) -> Callable[[], dict[str, Tensor]]:
    """Return the gradients of the loss, with common random numbers, as a function of the parameters as they stand."""
    model, guide, args, kwargs = call
    elbo: Any = settings.elbo

    def gradient() -> dict[str, Tensor]:
        saved = {name: leaf.grad for name, leaf in leaves.items()}
        try:
            for leaf in leaves.values():
                leaf.grad = None
            pyro.set_rng_seed(settings.seed)
            elbo.loss_and_grads(model, guide, *args, **kwargs)
            return {n: torch.zeros_like(v) if v.grad is None else v.grad.clone() for n, v in leaves.items()}
        finally:
            for name, leaf in leaves.items():
                leaf.grad = saved[name]

    return gradient
