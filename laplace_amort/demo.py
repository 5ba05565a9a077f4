"""Fit real data by plain ``SVI`` with hand-written guides, and hold the result against a long run of NUTS."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from laplace_amort import LogJoint, RepairReport, datasets
from laplace_amort.examples import epil, multisite

__all__ = ["PROBLEMS", "DemoResult", "Fit", "Problem", "run"]

_PARTICLES = 32  # per step
_EVALUATION = 20, 200  # the final ELBO: batches, particles in each
# A start far from the posterior has gradients a thousand times those of its neighborhood. A short memory of squared
# gradients forgets them in some fifty steps.
_BETAS = 0.9, 0.95
_POOR = 0.25  # posterior sds of the mean, and change of the log sd, past which a posterior is not to be relied on


@dataclass(frozen=True)
class Problem:
    """One example with the settings of its fit.

    :param str name: name of the problem, and of its reference posterior.
    :param str title: one line on the data and the model.
    :param example: the module with ``data``, ``model``, ``UnamortizedGuide`` and ``AmortizedGuide``.
    :param str unit: what one local latent belongs to.
    :param str local: name of the local site.
    :param str local_label: what it is, in words.
    :param labels: what the elements of a global site mean, by site.
    :param raw_estimates: from the arguments of the model and the reference to the units' own estimates and their
        standard errors, without pooling.
    :param int steps: default number of SVI steps.
    :param tuple learning_rate: at the first and at the last step.
    """

    name: str
    title: str
    example: Any
    unit: str
    local: str
    local_label: str
    labels: Mapping[str, tuple[str, ...]]
    raw_estimates: Callable[[tuple[Tensor, ...], datasets.Reference], tuple[Tensor, Tensor]]
    steps: int
    learning_rate: tuple[float, float]


def _raw_effects(args: tuple[Tensor, ...], reference: datasets.Reference) -> tuple[Tensor, Tensor]:
    effect, se = args
    return effect - reference.variables["mu"].mean, se


def _raw_log_rates(args: tuple[Tensor, ...], reference: datasets.Reference) -> tuple[Tensor, Tensor]:
    x, y = args
    expected = (x @ reference.variables["beta"].mean).exp().sum(-1)
    count = y.sum(-1) + 0.5  # half a seizure keeps the logarithm of a patient without any finite
    return (count / expected).log(), count.rsqrt()


PROBLEMS = {
    "multisite": Problem(
        name="multisite",
        title="44 sites of an education experiment, Student-t effects, the conditional mode in closed form",
        example=multisite,
        unit="site",
        local="t",
        local_label="effect less mu",
        labels={},
        raw_estimates=_raw_effects,
        steps=400,
        learning_rate=(0.2, 0.0003),
    ),
    "epil": Problem(
        name="epil",
        title="59 patients of an epilepsy trial, Poisson log-normal counts, the conditional mode by Newton steps",
        example=epil,
        unit="patient",
        local="u",
        local_label="log of rate ratio",
        labels={"beta": ("intercept", "log base", "treatment", "treatment x base", "log age", "period 4")},
        raw_estimates=_raw_log_rates,
        steps=600,
        learning_rate=(0.1, 0.0003),
    ),
}


@dataclass(frozen=True)
class Fit:
    """One guide after its fit: a Gaussian in unconstrained space, and how it came about.

    :param str label: name of the guide.
    :param LogJoint log_joint: knows the sites.
    :param Tensor loc: mean, ``(D,)``.
    :param Tensor sd: standard deviations, ``(D,)``.
    :param list elbos: the noisy ELBO of every step done.
    :param int steps: the steps that were asked for.
    :param float seconds: wall time of the steps.
    :param int num_parameters: elements of all parameters of the guide.
    :param float elbo: the final ELBO, from many particles.
    :param float elbo_standard_error: its Monte Carlo standard error.
    :param RepairReport repair: what was repaired at the end.
    """

    label: str
    log_joint: LogJoint
    loc: Tensor
    sd: Tensor
    elbos: list[float]
    steps: int
    seconds: float
    num_parameters: int
    elbo: float
    elbo_standard_error: float
    repair: RepairReport

    def at(self, z: Tensor) -> dict[str, Tensor]:
        """Return each site's constrained value ``z (K,)`` standard deviations from the mean, ``(K, *shape)``.

        Valid for sites whose support is constrained element by element, as here: every element is then an increasing
        function of a normal variable, which takes quantiles to quantiles.
        """
        values = self.log_joint.constrain(self.loc + self.sd * z.reshape(-1, 1, 1))
        return {name: value.reshape(-1, *self.log_joint.sites[name].shape) for name, value in values.items()}

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return mean and standard deviation of each site in constrained space, by Gauss-Hermite quadrature."""
        nodes, weights = (torch.as_tensor(rule) for rule in numpy.polynomial.hermite_e.hermegauss(41))
        weights = weights / weights.sum()
        moments = {}
        for name, value in self.at(nodes).items():
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

    def global_numbers(self) -> Iterator[tuple[str, str, int]]:
        """Yield label, site and flat index of every global number."""
        for name, summary in self.reference.variables.items():
            if summary.role == "global":
                for index in range(summary.mean.numel()):
                    words = self.problem.labels.get(name)
                    yield (f"{name}[{index}] {words[index]}" if words else name), name, index

    def errors(self, fit: Fit, name: str) -> tuple[Tensor, Tensor]:
        """Return error of the mean in posterior sds, and ratio of sds, for the flattened elements of a site."""
        summary, (mean, sd) = self.reference.variables[name], fit.moments()[name]
        return ((mean - summary.mean) / summary.sd).flatten(), (sd / summary.sd).flatten()

    def _globals_table(self) -> str:
        rows: list[list[str]] = []
        moments = [fit.moments() for fit in self.fits]
        for label, name, index in self.global_numbers():
            summary = self.reference.variables[name]
            rows.append([label, "NUTS", *(f"{float(v.flatten()[index]):.4f}" for v in (summary.mean, summary.sd))])
            for fit, moment in zip(self.fits, moments, strict=True):
                error, ratio = (float(value[index]) for value in self.errors(fit, name))
                mean, sd = (f"{float(value.flatten()[index]):.4f}" for value in moment[name])
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
    rows = []
    for label, name, index in result.global_numbers():
        error, ratio = (float(value[index]) for value in result.errors(fit, name))
        rows.append((label, error, ratio))
    shifted, scaled = max(rows, key=lambda row: abs(row[1])), max(rows, key=lambda row: abs(math.log(row[2])))
    lines = [
        f"Largest errors of a global: mean of {shifted[0]}, {shifted[1]:+.2f} posterior sds; sd of {scaled[0]}, "
        f"{_percent(scaled[2])}."
    ]
    errors, ratios = result.errors(fit, result.problem.local)
    at_mean, at_sd = int(errors.abs().argmax()), int(ratios.log().abs().argmax())
    lines.append(
        f"Largest errors of a {result.problem.unit}: mean of {at_mean}, {errors[at_mean]:+.2f} posterior sds; sd of "
        f"{at_sd}, {_percent(float(ratios[at_sd]))}."
    )
    poor = [label for label, error, ratio in rows if abs(error) > _POOR or abs(math.log(ratio)) > _POOR]
    if poor:
        lines.append(f"Do not rely on this posterior for {', '.join(poor)}.")
    lines.append(f"Precision at the end: {fit.repair}.")
    if fit.repair.num_repaired:
        lines.append("It is not positive definite without repair: the fit has not reached a maximum to trust.")
    if len(fit.elbos) < fit.steps:
        lines.append(f"Interrupted after {len(fit.elbos)} of {fit.steps} steps: this is how far it came.")
    return "\n  ".join([f"{fit.label}:", *lines])


def _percent(ratio: float) -> str:
    return f"{100 * abs(ratio - 1):.0f} % too {'wide' if ratio > 1 else 'narrow'}"


def run(name: str = "multisite", *, steps: int | None = None, seed: int = 0, progress: bool = True) -> DemoResult:
    """Fit one example with the un-amortized and with the amortized guide.

    The fits run in float64 with a parameter store and a random state of their own, and leave the caller's alone. An
    interrupt from the keyboard ends the fit in progress, skips the next, and returns what was found.

    :param str name: one of ``PROBLEMS``.
    :param int steps: SVI steps per guide; each problem has its default.
    :param int seed: seed of the particles.
    :param bool progress: whether to show progress bars, on stderr; they are silent where that is no terminal.
    :return: :class:`DemoResult`.
    :raises ValueError: if there is no such problem, or fewer than one step.
    """
    if name not in PROBLEMS:
        raise ValueError(f"there is no demo '{name}'; the names are: {', '.join(PROBLEMS)}")
    problem = PROBLEMS[name]
    steps = problem.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    with own_settings():
        args, reference = problem.example.data(), datasets.reference(name)
        fits: list[Fit] = []
        for label, guide_class in (
            ("un-amortized", problem.example.UnamortizedGuide),
            ("amortized", problem.example.AmortizedGuide),
        ):
            torch.manual_seed(seed)
            try:
                with pyro.get_param_store().scope():
                    fits.append(_fit(problem, label, guide_class(*args), args, steps, progress))
            except KeyboardInterrupt:  # after the steps, during the evaluation
                if not fits:
                    raise
                return DemoResult(problem, args, reference, fits, interrupted=True)
            if len(fits[-1].elbos) < steps:
                return DemoResult(problem, args, reference, fits, interrupted=True)
    return DemoResult(problem, args, reference, fits)


def _fit(problem: Problem, label: str, guide: Any, args: tuple[Tensor, ...], steps: int, progress: bool) -> Fit:
    model = problem.example.model
    first, last = problem.learning_rate
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
        log_joint=guide.log_joint,
        loc=gaussian.loc,
        sd=gaussian.covariance_matrix.diagonal().sqrt(),
        elbos=elbos,
        steps=steps,
        seconds=seconds,
        num_parameters=sum(value.numel() for value in pyro.get_param_store().values()),
        elbo=float(elbo.mean()),
        elbo_standard_error=float(elbo.std() / batches**0.5),
        repair=guide.report,
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
