"""Fit real data by plain ``SVI`` with ``AutoLaplaceFamily``, Pyro as it is, and hold it against a long run of NUTS."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm import trange

from laplace_amort import AutoLaplaceFamily, FreeMode, JointCurvature, LaplaceGaussian, MarginalCurvature, SoftAbs
from laplace_amort.examples.catalogue import Example
from laplace_amort.examples.settings import own_settings
from laplace_amort.examples.titles import STEPS
from laplace_amort.examples.yardstick import Yardstick

__all__ = ["SVIFit", "SVIResult", "guides", "run"]

_LEARNING_RATE = 0.1, 0.001  # at the first and at the last step
_PARTICLES = 32  # per step
_EVALUATION = 20, 200  # the final ELBO: batches, particles in each
# A start far from the posterior has gradients a thousand times those of its neighborhood. A short memory of squared
# gradients forgets them in some fifty steps.
_BETAS = 0.9, 0.95
# Where a fit starts the information is often indefinite, and an eigenvalue on its way through zero gives the guide a
# standard deviation of 1 / sqrt(floor) there. With the default floor that is an ELBO so low that the un-amortized guide
# of epil stays on the wrong side, and its joint head for some hundred steps. At a maximum no eigenvalue comes near this
# floor: the report says so.
_REPAIR = SoftAbs(floor=3e-3)


def guides(example: Example) -> dict[str, AutoLaplaceFamily]:
    """Return new guides of an example by label, in the order of their fits."""
    model = example.module.model
    return {
        "un-amortized": AutoLaplaceFamily(model, FreeMode(), head=JointCurvature(), repair=_REPAIR),
        "joint head": AutoLaplaceFamily(model, example.mode, head=JointCurvature(), repair=_REPAIR),
        "marginal head": AutoLaplaceFamily(model, example.mode, head=MarginalCurvature(), repair=_REPAIR),
    }


@dataclass(frozen=True)
class SVIFit:
    """One guide after its fit: a Gaussian in unconstrained space, and how it came about.

    :param str label: name of the guide.
    :param LaplaceGaussian gaussian: what it is.
    :param list elbos: the noisy ELBO of every step done.
    :param int steps: the steps that were asked for.
    :param float seconds: wall time of the steps.
    :param int num_parameters: elements of all parameters of the guide.
    :param float elbo: the final ELBO, from many particles.
    :param float elbo_standard_error: its Monte Carlo standard error.
    """

    label: str
    gaussian: LaplaceGaussian
    elbos: list[float]
    steps: int
    seconds: float
    num_parameters: int
    elbo: float
    elbo_standard_error: float

    @cached_property
    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of each site in constrained space, by Gauss-Hermite quadrature."""
        nodes, weights = (torch.as_tensor(rule) for rule in numpy.polynomial.hermite_e.hermegauss(21))
        weights = weights / weights.sum()
        moments = {}
        for name, value in self.gaussian.quantiles(torch.special.ndtr(nodes)).items():
            mean = torch.tensordot(weights, value, dims=1)
            moments[name] = mean, torch.tensordot(weights, (value - mean) ** 2, dims=1).sqrt()
        return moments


@dataclass(frozen=True)
class SVIResult:
    """What :func:`run` found; ``print(result)`` shows it beside the reference posterior.

    :param Yardstick yardstick: the example and its reference posterior.
    :param list fits: the guides, in the order of their fits.
    :param bool interrupted: whether the user stopped it.
    """

    yardstick: Yardstick
    fits: list[SVIFit]
    interrupted: bool = False

    def __str__(self) -> str:
        moments = {fit.label: fit.moments for fit in self.fits}
        words = ([f"{fit.label}:", *self._words(fit)] for fit in self.fits)
        return self.yardstick.report(moments, [self._evidence(fit) for fit in self.fits], words)

    def _evidence(self, fit: SVIFit) -> dict[str, str]:
        return {
            "guide": fit.label,
            "parameters": str(fit.num_parameters),
            "steps": f"{len(fit.elbos)} of {fit.steps}" if len(fit.elbos) < fit.steps else str(fit.steps),
            "seconds": f"{fit.seconds:.1f}",
            "ELBO": f"{fit.elbo:.3f} ± {fit.elbo_standard_error:.3f}",
            "log evidence - ELBO": f"{self.yardstick.reference.log_evidence - fit.elbo:.3f}",
        }

    def _words(self, fit: SVIFit) -> list[str]:
        head, tail = fit.gaussian.head_report, fit.gaussian.tail_report
        lines = [
            *self.yardstick.verdict(fit.moments),
            f"Precision of the globals (1: as with all units known) at the end: {head}.",
            f"Precision of the units (in hundredths of their diagonals) at the end: {tail}.",
        ]
        if min(head.smallest_before, tail.smallest_before) <= 0:
            lines.append("It is not positive definite without repair: the fit has not reached a maximum to trust.")
        if len(fit.elbos) < fit.steps:
            lines.append(f"Interrupted after {len(fit.elbos)} of {fit.steps} steps: this is how far it came.")
        return lines


def run(name: str = "multisite", *, steps: int = STEPS, seed: int = 0, progress: bool = True) -> SVIResult:
    """Fit one example with three guides: un-amortized, and amortized with either head.

    The fits run in float64 with a parameter store and a random state of their own, and leave the caller's alone. An
    interrupt from the keyboard ends the fit in progress, skips the rest, and returns what was found.

    :param str name: one of ``EXAMPLES``.
    :param int steps: SVI steps for each guide.
    :param int seed: seed of the particles.
    :param bool progress: whether to show progress bars, on stderr; they are silent where that is no terminal.
    :return: :class:`SVIResult`.
    :raises ValueError: if there is no such example, or fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    fits: list[SVIFit] = []
    with own_settings():
        yardstick = Yardstick.of(name)
        args = yardstick.example.module.data()
        try:
            for label, guide in guides(yardstick.example).items():
                torch.manual_seed(seed)
                with pyro.get_param_store().scope():
                    fits.append(_fit(label, guide, args, steps, progress))
                if len(fits[-1].elbos) < steps:
                    return SVIResult(yardstick, fits, interrupted=True)
        except KeyboardInterrupt:  # after the steps, during the evaluation
            if not fits:
                raise
            return SVIResult(yardstick, fits, interrupted=True)
    return SVIResult(yardstick, fits)


def _fit(label: str, guide: AutoLaplaceFamily, args: tuple[Tensor, ...], steps: int, progress: bool) -> SVIFit:
    model, (first, last) = guide.model, _LEARNING_RATE
    optimizer = ClippedAdam({"lr": first, "lrd": (last / first) ** (1 / steps), "betas": _BETAS})
    svi = SVI(model, guide, optimizer, _elbo(_PARTICLES))
    elbos: list[float] = []
    start = time.perf_counter()
    with (
        suppress(KeyboardInterrupt),  # the count of ELBOs tells
        trange(steps, desc=label, file=sys.stderr, disable=None if progress else True) as bar,
    ):
        for _ in bar:
            elbos.append(-float(svi.step(*args)))
            bar.set_postfix(loss=f"{-elbos[-1]:.2f}", refresh=False)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        gaussian = guide.gaussian(*args)
    batches, particles = _EVALUATION
    elbo = torch.tensor([-_elbo(particles).loss(model, guide, *args) for _ in range(batches)])
    num_parameters = sum(parameter.numel() for parameter in guide.parameters())
    error = float(elbo.std() / batches**0.5)
    return SVIFit(label, gaussian, elbos, steps, seconds, num_parameters, float(elbo.mean()), error)


def _elbo(particles: int) -> Trace_ELBO:
    return Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
