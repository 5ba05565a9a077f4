"""One call that fits a guide until it has converged, and says whether it has."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide

from laplace_amort.errors import ModelError
from laplace_amort.fitting.causes import causes
from laplace_amort.fitting.evaluation import Maximum
from laplace_amort.fitting.history import History, progress_bar
from laplace_amort.fitting.journal import AT_START, Journal, same_start
from laplace_amort.fitting.objectives.base import Objective, gaussian_at
from laplace_amort.fitting.objectives.elbo import FixedDrawELBO
from laplace_amort.fitting.objectives.ladder import Ladder
from laplace_amort.fitting.objectives.laplace import MarginalLaplace
from laplace_amort.fitting.objectives.stochastic import Stochastic
from laplace_amort.fitting.optimizers import Optimizer, TrustRegion
from laplace_amort.fitting.records import Optimum, Saved
from laplace_amort.fitting.result import FitResult, load_saved
from laplace_amort.fitting.search import START_STEPS, find_maxima, fresh_value
from laplace_amort.guide import AutoLaplaceFamily, LaplaceGaussian, Problem, own_guide

__all__ = ["fit"]


def fit(
    model: Callable[..., Any],
    *args: Any,
    guide: AutoLaplaceFamily | None = None,
    objective: Objective | None = None,
    optimizer: Optimizer | None = None,
    starts: int = 1,
    seed: int = 0,
    check: bool = True,
    progress: bool = True,
    resume: FitResult | str | Path | None = None,
    num_draws: int | None = None,
    **kwargs: Any,
) -> FitResult:
    r"""Fit a hierarchical model, and say how far to trust the posterior: ``fit(model, *args)`` is the whole call.

    By default the units are integrated over, by as many points as it takes (:class:`~laplace_amort.Ladder`), and the
    globals are drawn from what that leaves. Where the model subsamples, this needs all units at once, so it is
    stochastic optimization (:class:`~laplace_amort.Stochastic`); where it has parameters of its own (``pyro.param``),
    their maximum is that of an ELBO (:class:`~laplace_amort.FixedDrawELBO`). ``print(result)`` shows the verdict and
    the posterior.

    Do not use it with other guides: their parameters are many, and noisy steps by ``SVI`` are the right tool for them.

    :param model: a Pyro model.
    :param args: arguments of the model; before them may stand the guide.
    :param AutoLaplaceFamily guide: of this model; by default one is made, with parameters of its own that Pyro's store
        does not hold. A guide that is given starts where it stands, and stands at the optimum in the end.
    :param objective: :class:`~laplace_amort.Ladder`, :class:`~laplace_amort.MarginalQuadrature`,
        :class:`~laplace_amort.MarginalLaplace`, :class:`~laplace_amort.NestedELBO`,
        :class:`~laplace_amort.FixedDrawELBO` (the guide as the best Gaussian of its family) or
        :class:`~laplace_amort.Stochastic`.
    :param optimizer: :class:`~laplace_amort.TrustRegion` or :class:`~laplace_amort.QuasiNewton`, by default what suits
        the objective; None for :class:`~laplace_amort.Stochastic`, which has one of torch's.
    :param int starts: how many, of no effect with :class:`~laplace_amort.Stochastic`; those after the first are uniform
        between -2 and 2 in unconstrained space. What they find is in ``result.optima``.
    :param int seed: of all draws and starts; the state of torch's generator stays as it is.
    :param bool check: whether ``result.verdict`` compares the posterior with one by better integrals, and looks for
        other modes. Without, it cannot be good.
    :param bool progress: whether to show a bar, where standard error is a terminal.
    :param resume: a result that was interrupted, or a stochastic one that ran out of steps, or the path of one that was
        saved: the fit goes on, with the same numbers as if it had never stopped.
    :param int num_draws: deprecated: it is a setting of the objective, ``FixedDrawELBO(num_draws=...)``.
    :param kwargs: keyword arguments of the model. One that has a name from this list can be passed by
        ``functools.partial(model, seed=...)``.
    :return: :class:`FitResult`. Also when a user interrupts (Ctrl-C): what was found until then.
    :raises ModelError: if the model is not that of the guide, or the guide cannot take it.
    :raises ResumeError: if what was saved is another fit.
    :raises TypeError: if guide, objective or optimizer is none, or if objective and optimizer do not go together.
    :raises ValueError: if ``starts`` or ``num_draws`` is out of its range.

    Example: a Gaussian model, in which the family holds the posterior::

        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(z):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(mu, 1.))
        ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
        >>> result = fit(model, torch.tensor([1., 3.]))
        >>> result.verdict.name, result.status.name
        ('RIGHT', 'CONVERGED')
        >>> {name: value.round(decimals=3) for name, value in result.posterior.mean().items()}
        {'mu': tensor(1.), 'y': tensor([1., 2.])}
    """
    guide, args = _guide_and_arguments(model, guide, args)
    objective, optimizer = _as_they_are_now(objective, optimizer, num_draws)
    _check_settings(objective, optimizer, starts)
    saved = Saved() if resume is None else copy.deepcopy(load_saved(resume))
    with torch.random.fork_rng(devices=[]), progress_bar(progress) as bar:
        torch.manual_seed(seed)
        history, saved = _set_up(guide, args, kwargs, seed, saved, bar)
        objective = objective or _default_objective(history.problem, optimizer)
        try:
            maxima, value = _maximized(history, objective, optimizer, starts)
        except KeyboardInterrupt:
            maxima, value = [history.interrupted()], None
        return _result(history, objective, maxima, value, saved, check)


def _default_objective(problem: Problem, optimizer: Optimizer | None) -> Objective:
    """Return the objective whose posterior is right, of those that a model can have.

    :param Problem problem: the model at its data.
    :param optimizer: what was asked for: one that needs the same function at every step is none for minibatches.
    """
    if problem.subsamples and optimizer is None:
        return Stochastic()
    return FixedDrawELBO() if problem.model_parameters else Ladder()


def _set_up(
    guide: AutoLaplaceFamily, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int, saved: Saved, bar: Any
) -> tuple[History, Saved]:
    """Return the problem with all that a fit before has found of it, and what is saved, with the start."""
    begun = time.perf_counter()
    bar.set_description("set-up")
    problem = Problem(guide, args, kwargs)
    if saved.start is None:
        saved = saved._replace(start=problem.state())
    problem.restore(saved.start)  # a fit that goes on begins where it began, to read what it found from there
    journal = Journal(saved.entries, saved.state, problem.memory, problem.recall)
    history = History(problem, journal, seed, bar, saved.walk)
    history.add_time("set-up", time.perf_counter() - begun)
    at_start = problem.log_joint_at_start()
    same_start(journal.call(AT_START, lambda: at_start), at_start)  # so that no other model goes on
    return history, saved


def _maximized(
    history: History, objective: Objective, optimizer: Optimizer | None, starts: int
) -> tuple[list[Maximum], tuple[float, float] | None]:
    """Return the optima, the best first, and the value at the best with its error if it is not what was maximized."""
    objective.check(history.problem)
    if isinstance(objective, Stochastic):
        find_maxima(history, MarginalLaplace(), TrustRegion(max_steps=START_STEPS))  # one minibatch tells where about
        return [objective.climb(history, objective.default_optimizer)], None
    history.problem.refuse_minibatch(
        f"and {type(objective).__name__} needs all of them in every evaluation. Leave subsample_size out of the model, "
        "or optimize stochastically:\n    fit(model, *args, objective=Stochastic())"
    )
    maxima = find_maxima(history, objective, optimizer, starts)
    if history.problem.recheck():  # what was recorded was not the model everywhere: once again, without
        maxima = find_maxima(history, objective, optimizer)
    if isinstance(objective, FixedDrawELBO) and math.isfinite(maxima[0].evaluation.value):
        return maxima, fresh_value(history, objective)
    return maxima, None


# ---------------------------------------------------------------------------------------------------------- the result


def _result(
    history: History,
    objective: Objective,
    maxima: list[Maximum],
    value: tuple[float, float] | None,
    saved: Saved,
    check: bool,
) -> FitResult:
    best, problem, journal, asked = maxima[0], history.problem, history.journal, objective
    objective, end = best.objective or objective, problem.state()[0]
    problem.hand_back()
    gaussian = gaussian_at(problem, objective, best)
    given = gaussian if gaussian is None or problem.is_as_given else gaussian.to(problem.given, problem.dtype)
    found, error = value or (best.evaluation.value, best.evaluation.standard_error)
    return FitResult(
        status=best.status,
        guide=problem.guide,
        objective=found,
        standard_error=error,
        gradient_norm=best.gradient_norm,
        num_draws=history.num_draws,
        history=history.steps,
        timings=history.timings,
        optima=[_optimum(problem, one) for one in maxima],
        notes=_notes(history, best, gaussian),
        gaussian=given,
        in_double=None if given is gaussian else gaussian,
        saved=Saved(saved.start, journal.entries, journal.state, history.walk, end, best.numbers()),
        maximized=objective,
        problem=problem,
        seed=history.seed,
        asked=asked,
        check=check,
        sampled=best.posterior,
    )


def _optimum(problem: Problem, maximum: Maximum) -> Optimum:
    """Return what a user sees of an optimum."""
    point = torch.from_numpy(maximum.point[: len(problem.loc)]).to(problem.loc)
    with torch.no_grad():
        values = problem.unit_model.constrain_global(point)
    return Optimum(maximum.evaluation.value, maximum.num_starts, problem.rounded(values), maximum.status)


def _notes(history: History, maximum: Maximum, gaussian: LaplaceGaussian | None) -> list[str]:
    """Return what a user should know of a fit, in sentences."""
    problem, notes = history.problem, list(maximum.notes)
    if problem.numbers.reason:
        notes.append(
            f"computed in {problem.dtype}, since the model does not run in double precision: {problem.numbers.reason}. "
            "In so few digits a fit may end where there is no optimum. Give it more before a new guide is called "
            "first:\n    torch.set_default_dtype(torch.float64)   # and data.double()"
        )
    if problem.not_recorded:
        notes.append(f"every evaluation ran the model in Python, which takes longer: {problem.not_recorded}")
    if problem.not_at_once:
        notes.append(
            f"and for one point at a time, which takes up to 100 times as long: {problem.not_at_once}. Leave branches "
            "to torch; and where a tensor is written to in place, count its dimensions from the right:\n"
            "    torch.where(mu > 0, a, b)      # for: a if mu > 0 else b\n"
            "    p[..., 0] = y[..., unit]       # for: p[0] = y[unit]"
        )
    return notes + causes(history, maximum, gaussian)


# ------------------------------------------------------------------------------------------------------- the arguments


def _guide_and_arguments(model: Any, guide: Any, args: tuple[Any, ...]) -> tuple[AutoLaplaceFamily, tuple[Any, ...]]:
    """Return the guide, one of its own where none is given, and the arguments of the model."""
    if args and isinstance(args[0], AutoGuide):  # as it once had to be given
        if guide is not None:
            raise TypeError("two guides are given. Leave one of them out:\n    fit(model, *args, guide=guide)")
        guide, *rest = args
        args = tuple(rest)
    if guide is None:
        return own_guide(model), args
    if not isinstance(guide, AutoLaplaceFamily):
        raise TypeError(
            f"fit needs a guide of the amortized Laplace family, got {type(guide).__name__}. Leave it out, and one is "
            "made:\n    fit(model, *args)\nFor any other guide, there is SVI."
        )
    if guide.model != model:
        raise ModelError(
            "the guide was made for another model than the one given; what is fitted is the guide's own. Leave it out, "
            "and one is made:\n    fit(model, *args)"
        )
    return guide, args


def _as_they_are_now(objective: Any, optimizer: Any, num_draws: int | None) -> tuple[Any, Any]:
    """Return objective and optimizer for arguments as they once were, with a warning that has the line to type."""
    if isinstance(optimizer, Stochastic):
        if objective is not None and type(objective) is not FixedDrawELBO:
            raise TypeError(
                f"Stochastic() follows the ELBO of the guide, and {type(objective).__name__}() is another objective. "
                "Leave one of them out:\n    fit(model, *args, objective=Stochastic())"
            )
        _warn_deprecated("Stochastic is an objective", "objective=Stochastic()")
        return optimizer, None
    if num_draws is not None:
        objective = FixedDrawELBO() if objective is None else objective
        if not isinstance(objective, FixedDrawELBO):
            raise ValueError(f"{type(objective).__name__} takes no draws: leave num_draws out")
        name, most = type(objective).__name__, max(num_draws, objective.max_draws)
        objective = dataclasses.replace(objective, num_draws=num_draws, max_draws=most)
        _warn_deprecated(f"num_draws is a setting of {name}", f"objective={name}(num_draws={num_draws})")
    return objective, optimizer


def _warn_deprecated(why: str, argument: str) -> None:
    line = f"{why}:\n    fit(model, *args, {argument})"
    warnings.warn(line, DeprecationWarning, stacklevel=4)  # at the call of fit


def _check_settings(objective: Any, optimizer: Any, starts: int) -> None:
    if isinstance(objective, type) or not isinstance(objective, Objective | None):
        hint = f"{objective.__name__}()" if isinstance(objective, type) else "FixedDrawELBO()"
        raise TypeError(
            "objective must be one such as FixedDrawELBO(), MarginalLaplace(), MarginalQuadrature() or Ladder(), got "
            f"{objective!r}:\n    objective={hint}\n"
            "An ELBO of Pyro's goes into the objective Stochastic: objective=Stochastic(elbo=...)"
        )
    if isinstance(optimizer, type) or not isinstance(optimizer, Optimizer | None):
        raise TypeError(
            f"optimizer must be TrustRegion() or QuasiNewton(), got {optimizer!r}. One of torch's goes into an "
            "objective:\n    objective=Stochastic(torch.optim.Adam, lr=0.1)"
        )
    if isinstance(objective, Stochastic) and optimizer is not None:
        raise TypeError(
            f"Stochastic() steps by an optimizer of torch's, and {optimizer!r} is another. Leave one of them out:\n"
            "    fit(model, *args, objective=Stochastic(torch.optim.Adam, lr=0.1))"
        )
    if starts < 1:
        raise ValueError(f"starts must be at least 1, got {starts}")
