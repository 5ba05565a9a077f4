"""Fit real data by plain ``SVI`` with ``AutoLaplaceFamily``, and hold the result against a long run of NUTS."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from laplace_amort import AutoLaplaceFamily, LaplaceGaussian
from laplace_amort.examples import datasets
from laplace_amort.examples.problems import PROBLEMS, Problem

__all__ = ["PROBLEMS", "STEPS", "DemoResult", "Fit", "run"]

STEPS = 400
_LEARNING_RATE = 0.1, 0.001  # at the first and at the last step
_PARTICLES = 32  # per step
_EVALUATION = 20, 200  # the final ELBO: batches, particles in each
# A start far from the posterior has gradients a thousand times those of its neighborhood. A short memory of squared
# gradients forgets them in some fifty steps.
_BETAS = 0.9, 0.95
_POOR = 0.25  # posterior sds of the mean, and change of the log sd, past which a posterior is not to be relied on


@dataclass(frozen=True)
class Fit:
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
class DemoResult:
    """What :func:`run` found; ``print(result)`` shows it beside the reference posterior.

    :param Problem problem: what was fitted.
    :param tuple args: arguments of the model.
    :param datasets.Reference reference: the reference posterior.
    :param list fits: the guides, in the order of their fits.
    :param bool interrupted: whether the user stopped it.
    """

    problem: Problem
    args: tuple[Tensor, ...]
    reference: datasets.Reference
    fits: list[Fit] = field(default_factory=list)
    interrupted: bool = False

    def __str__(self) -> str:
        sections = [f"{self.problem.name}: {self.problem.title}", self._globals_table(), self._fits_table()]
        sections += [_verdict(self, fit) for fit in self.fits]
        return "\n\n".join(sections)

    def numbers(self, role: str) -> Iterator[tuple[str, str, int]]:
        """Yield label, site and flat index of every number that is "global", or "local"."""
        for name, summary in self.reference.variables.items():
            if summary.role == role:
                words = self.problem.labels.get(name, ("",) * summary.mean.numel())
                for index, word in enumerate(words):
                    yield f"{name}[{index}] {word}".strip() if summary.mean.dim() else name, name, index

    def errors(self, fit: Fit, name: str) -> tuple[Tensor, Tensor]:
        """Return error of the mean in posterior sds, and ratio of sds, for the flattened elements of a site."""
        summary, (mean, sd) = self.reference.variables[name], fit.moments[name]
        return ((mean - summary.mean) / summary.sd).flatten(), (sd / summary.sd).flatten()

    def _globals_table(self) -> str:
        rows: list[list[str]] = []
        for label, name, index in self.numbers("global"):
            summary = self.reference.variables[name]
            rows.append([label, "NUTS", *(f"{float(v.flatten()[index]):.4f}" for v in (summary.mean, summary.sd))])
            for fit in self.fits:
                error, ratio = _at(self.errors(fit, name), index)
                mean, sd = (f"{float(value.flatten()[index]):.4f}" for value in fit.moments[name])
                rows.append(["", fit.label, mean, sd, f"{error:+.3f}", f"{ratio:.3f}"])
        headers = ["global", "posterior", "mean", "sd", "error / sd", "sd ratio"]
        return tabulate(rows, headers, colalign=("left", "left", *["right"] * 4), disable_numparse=True)

    def _fits_table(self) -> str:
        reference = self.reference
        rows = [
            [
                fit.label,
                fit.num_parameters,
                f"{len(fit.elbos)} of {fit.steps}" if len(fit.elbos) < fit.steps else fit.steps,
                f"{fit.seconds:.1f}",
                f"{fit.elbo:.3f} ± {fit.elbo_standard_error:.3f}",
                f"{reference.log_evidence - fit.elbo:.3f}",
            ]
            for fit in self.fits
        ]
        headers = ["guide", "parameters", "steps", "seconds", "ELBO", "log evidence - ELBO"]
        table = tabulate(rows, headers, colalign=("left", *["right"] * 5), disable_numparse=True)
        return (
            f"{table}\nReference log evidence {reference.log_evidence:.3f} ± "
            f"{reference.log_evidence_standard_error:.3f}; what the ELBO lacks of it is the guide's KL divergence."
        )


def _verdict(result: DemoResult, fit: Fit) -> str:
    """Say in words, from the numbers alone, what to believe."""
    lines, reports = [], (fit.gaussian.head_report, fit.gaussian.tail_report)
    for role, what in (("global", "global"), ("local", result.problem.unit)):
        rows = [(label, *_at(result.errors(fit, name), index)) for label, name, index in result.numbers(role)]
        shifted, scaled = max(rows, key=lambda row: abs(row[1])), max(rows, key=lambda row: abs(math.log(row[2])))
        lines.append(
            f"Largest errors of a {what}: mean of {shifted[0]}, {shifted[1]:+.2f} posterior sds; "
            f"sd of {scaled[0]}, {_percent(scaled[2])}."
        )
        poor = [label for label, error, ratio in rows if abs(error) > _POOR or abs(math.log(ratio)) > _POOR]
        if poor:
            lines.append(f"Do not rely on this posterior for {_listed(poor)}.")
    units = "globals (1: as with all units known)", "units (in hundredths of their diagonals)"
    lines += [f"Precision of the {what} at the end: {report}." for what, report in zip(units, reports, strict=True)]
    if any(report.smallest_before <= 0 for report in reports):
        lines.append("It is not positive definite without repair: the fit has not reached a maximum to trust.")
    if len(fit.elbos) < fit.steps:
        lines.append(f"Interrupted after {len(fit.elbos)} of {fit.steps} steps: this is how far it came.")
    return "\n  ".join([f"{fit.label}:", *lines])


def _at(values: tuple[Tensor, Tensor], index: int) -> tuple[float, float]:
    return float(values[0][index]), float(values[1][index])


def _percent(ratio: float) -> str:
    return f"{100 * abs(ratio - 1):.0f} % too {'wide' if ratio > 1 else 'narrow'}"


def _listed(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def run(name: str = "multisite", *, steps: int = STEPS, seed: int = 0, progress: bool = True) -> DemoResult:
    """Fit one example with three guides: un-amortized, and amortized with either head.

    The fits run in float64 with a parameter store and a random state of their own, and leave the caller's alone. An
    interrupt from the keyboard ends the fit in progress, skips the rest, and returns what was found.

    :param str name: one of ``PROBLEMS``.
    :param int steps: SVI steps for each guide.
    :param int seed: seed of the particles.
    :param bool progress: whether to show progress bars, on stderr; they are silent where that is no terminal.
    :return: :class:`DemoResult`.
    :raises ValueError: if there is no such problem, or fewer than one step.
    """
    if name not in PROBLEMS:
        raise ValueError(f"there is no demo '{name}'; the names are: {', '.join(PROBLEMS)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    problem = PROBLEMS[name]
    with own_settings():
        args, reference = problem.example.data(), datasets.reference(name)
        fits: list[Fit] = []
        for label, guide in problem.guides().items():
            torch.manual_seed(seed)
            try:
                with pyro.get_param_store().scope():
                    fits.append(_fit(problem.example.model, label, guide, args, steps, progress))
            except KeyboardInterrupt:  # after the steps, during the evaluation
                if not fits:
                    raise
                return DemoResult(problem, args, reference, fits, interrupted=True)
            if len(fits[-1].elbos) < steps:
                return DemoResult(problem, args, reference, fits, interrupted=True)
    return DemoResult(problem, args, reference, fits)


def _fit(
    model: Callable[..., Any],
    label: str,
    guide: AutoLaplaceFamily,
    args: tuple[Tensor, ...],
    steps: int,
    progress: bool,
) -> Fit:
    first, last = _LEARNING_RATE
    optimizer = ClippedAdam({"lr": first, "lrd": (last / first) ** (1 / steps), "betas": _BETAS})
    svi = SVI(model, guide, optimizer, _elbo(_PARTICLES))
    elbos: list[float] = []
    start = time.perf_counter()
    try:
        with tqdm(total=steps, desc=label, file=sys.stderr, disable=None if progress else True) as bar:
            for _ in range(steps):
                elbos.append(-float(svi.step(*args)))
                bar.set_postfix(loss=f"{-elbos[-1]:.2f}", refresh=False)
                bar.update()
    except KeyboardInterrupt:
        pass  # the count of ELBOs tells
    seconds = time.perf_counter() - start
    with torch.no_grad():
        gaussian = guide.gaussian(*args)
    batches, particles = _EVALUATION
    elbo = torch.tensor([-_elbo(particles).loss(model, guide, *args) for _ in range(batches)])
    return Fit(
        label=label,
        gaussian=gaussian,
        elbos=elbos,
        steps=steps,
        seconds=seconds,
        num_parameters=sum(parameter.numel() for parameter in guide.parameters()),
        elbo=float(elbo.mean()),
        elbo_standard_error=float(elbo.std() / batches**0.5),
    )


def _elbo(particles: int) -> Trace_ELBO:
    return Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)


@contextmanager
def own_settings() -> Iterator[None]:
    """Run in float64, from a forked random state, and on one thread: threads only get in each other's way here."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
