"""One call that fits a guide until it has converged, and says whether it has."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from laplace_amort.errors import NUMERICAL_ERRORS, ModelError
from laplace_amort.fitting.evaluation import FitStatus, Maximum
from laplace_amort.fitting.history import History, progress_bar
from laplace_amort.fitting.identification import describe_flattest
from laplace_amort.fitting.journal import Journal
from laplace_amort.fitting.objectives.base import Objective
from laplace_amort.fitting.objectives.elbo import FixedDrawELBO
from laplace_amort.fitting.objectives.laplace import MarginalLaplace
from laplace_amort.fitting.optimizers import Optimizer, TrustRegion
from laplace_amort.fitting.result import FitResult, Optimum, load_saved
from laplace_amort.fitting.search import End, find_ends, fresh_value, positive
from laplace_amort.fitting.stochastic import Stochastic, StochasticState
from laplace_amort.guide import AutoLaplaceFamily, LaplaceGaussian, Problem

__all__ = ["fit"]

_START_STEPS = 100  # on the one minibatch with which a stochastic fit begins


def fit(
    model: Callable[..., Any],
    guide: AutoLaplaceFamily,
    *args: Any,
    objective: Objective = FixedDrawELBO(),
    optimizer: Optimizer | Stochastic | None = None,
    num_draws: int | None = None,
    starts: int = 1,
    seed: int = 0,
    progress: bool = True,
    resume: FitResult | str | Path | None = None,
    **kwargs: Any,
) -> FitResult:
    r"""Fit a guide of the amortized Laplace family until it has converged, and say whether it has.

    By default this maximizes the ELBO on fixed draws, from the optimum of the marginal Laplace density; the draws
    become more until others give the same optimum. Where the model subsamples its units, it is stochastic optimization
    from the optimum of one minibatch.

    Do not use it with other guides: their parameters are many, and noisy steps by ``SVI`` are the right tool for them.

    :param model: a Pyro model, that of the guide.
    :param AutoLaplaceFamily guide: it starts where it stands, and stands at the optimum in the end.
    :param args: arguments of the model.
    :param objective: :class:`~laplace_amort.FixedDrawELBO`, :class:`~laplace_amort.NestedELBO`,
        :class:`~laplace_amort.MarginalLaplace`, :class:`~laplace_amort.MarginalQuadrature` or
        :class:`~laplace_amort.Ladder`.
    :param optimizer: :class:`~laplace_amort.TrustRegion`, :class:`~laplace_amort.QuasiNewton` or
        :class:`~laplace_amort.Stochastic`; by default what suits objective and model.
    :param int num_draws: draws that the ELBO begins with, an even number; of no effect with :class:`Stochastic`.
    :param int starts: how many, of no effect with :class:`Stochastic`; those after the first are uniform between -2 and
        2 in unconstrained space. What they find is in ``result.optima``.
    :param int seed: of all draws and starts; the state of torch's generator stays as it is.
    :param bool progress: whether to show a bar, where standard error is a terminal.
    :param resume: a result that was interrupted, or a stochastic one that ran out of steps, or the path of one that was
        saved: the fit goes on, with the same numbers as if it had never stopped.
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
        >>> pyro.clear_param_store()
        >>> result = fit(model, AutoLaplaceFamily(model), torch.tensor([1., 3.]))
        >>> result.status.name, round(result.objective, 3)
        ('CONVERGED', -4.378)
        >>> {name: value.round(decimals=3) for name, value in result.gaussian.median().items()}
        {'mu': tensor(1.), 'y': tensor([1., 2.])}
    """
    _check_arguments(model, guide, objective, optimizer, starts)
    if num_draws is not None:
        objective = _with_draws(objective, num_draws)
    saved = _Saved() if resume is None else copy.deepcopy(load_saved(resume))
    with torch.random.fork_rng(devices=[]), progress_bar(progress) as bar:
        begun = time.perf_counter()
        torch.manual_seed(seed)
        bar.set_description("set-up")
        problem = Problem(guide, args, kwargs)
        if saved.start is None:
            saved = saved._replace(start=problem.state())
        problem.restore(saved.start)  # a fit that goes on begins where it began, to read what it found from there
        journal = Journal(saved.entries, saved.state, problem.memory, problem.recall)
        run = History(problem, journal, seed, bar)
        run.add_time("set-up", time.perf_counter() - begun)
        journal.call(f"log joint {problem.log_joint_at_start():.17g}", lambda: None)  # so that no other model goes on
        if optimizer is None and problem.subsamples and type(objective) is FixedDrawELBO:  # the ELBO of SVI, no other
            optimizer = Stochastic()
        if isinstance(optimizer, Stochastic):
            return _stochastic(run, optimizer, saved, args, kwargs)
        return _deterministic(run, objective, optimizer, starts, saved)


class _Saved(NamedTuple):
    """What a later fit goes on from."""

    start: Any = None
    entries: list[tuple[str, Any]] | None = None
    state: Any = None
    stochastic: StochasticState | None = None


def _deterministic(
    run: History, objective: Objective, optimizer: Optimizer | None, starts: int, saved: _Saved
) -> FitResult:
    problem = run.problem
    for plate in problem.subsamples:
        kind = "units" if plate.name == problem.unit_model.layout.frame.name else "elements"
        raise ModelError(
            f"the model takes {plate.subsample_size} of {plate.size} {kind} of plate '{plate.name}' at a time, and "
            f"{type(objective).__name__} needs all of them in every evaluation. Leave subsample_size out of the model, "
            "or optimize stochastically:\n    fit(model, guide, *args, optimizer=Stochastic())"
        )
    objective.check(problem)
    try:
        ends = find_ends(run, objective, optimizer, starts)
        if problem.recheck():  # what was recorded was not the model everywhere: once again, without
            ends = find_ends(run, objective, optimizer, 1)
        maximum = ends[0].maximum
        value = maximum.evaluation.value, maximum.evaluation.standard_error
        if isinstance(objective, FixedDrawELBO) and maximum.status is not FitStatus.START_FAILED:
            value = fresh_value(run, objective)
    except KeyboardInterrupt:
        maximum = run.interrupted()
        ends, value = [End(maximum)], (maximum.evaluation.value, maximum.evaluation.standard_error)
    kept = _Saved(saved.start, run.journal.entries, run.journal.state)
    return _result(run, objective, ends, value, kept)


def _stochastic(
    run: History, optimizer: Stochastic, saved: _Saved, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FitResult:
    state = saved.stochastic or optimizer.begin(run.seed)
    try:
        if saved.stochastic is None:  # one minibatch tells where about the optimum is
            find_ends(run, MarginalLaplace(), TrustRegion(max_steps=_START_STEPS), 1)
        maximum = optimizer.climb(run, state, args, kwargs)
    except KeyboardInterrupt:
        maximum = run.interrupted()
    kept = _Saved(saved.start, run.journal.entries, run.journal.state, None if state.phase is None else state)
    value = maximum.evaluation.value, maximum.evaluation.standard_error
    return _result(run, FixedDrawELBO(), [End(maximum)], value, kept)


def _in_short(problem: str) -> str:
    """The sentence and the first unit, without lines to type that are for those who compute matrices themselves."""
    return "\n".join(problem.splitlines()[:2]).partition(" To repair")[0]


def _result(
    run: History, objective: Objective, ends: list[End], value: tuple[float, float], saved: _Saved
) -> FitResult:
    maximum, problem = ends[0].maximum, run.problem
    objective, settled = run.settled(maximum, objective)
    notes = list(settled)
    if problem.not_recorded:
        notes.append(f"every evaluation ran the model in Python, which takes longer: {problem.not_recorded}")
    failure = maximum.evaluation.problem or next((step.problem for step in run.history[::-1] if step.problem), "")
    if failure and not maximum.status.ok:
        notes.append(f"the last point without an objective: {_in_short(failure)}")
    if maximum.status is FitStatus.NO_MAXIMUM and maximum.evaluation.information is not None:
        signs = positive(problem).tolist()
        notes.append(describe_flattest(_global_names(problem), signs, maximum.evaluation.information))
    gaussian = _gaussian(problem, objective, maximum)
    if gaussian is not None:
        notes += problem.kinks(gaussian)
    return FitResult(
        status=maximum.status,
        guide=problem.guide,
        objective=value[0],
        standard_error=value[1],
        gradient_norm=maximum.gradient_norm,
        num_draws=run.num_draws,
        history=run.history,
        timings=run.timings,
        optima=[_optimum(problem, end) for end in ends],
        notes=notes,
        gaussian=gaussian,
        saved=saved,
        maximized=objective,
        problem=problem,
        seed=run.seed,
    )


def _optimum(problem: Problem, end: End) -> Optimum:
    maximum, d = end.maximum, len(problem.loc)
    with torch.no_grad():
        values = problem.unit_model.constrain_global(torch.from_numpy(maximum.point[:d]).to(problem.loc))
    return Optimum(maximum.evaluation.value, end.num_starts, values, maximum.status)


def _gaussian(problem: Problem, objective: Objective, maximum: Maximum) -> LaplaceGaussian | None:
    """The posterior where the guide stands; None where there is none."""
    try:
        with torch.no_grad():
            gaussian = objective.gaussian(problem, maximum)
            return dataclasses.replace(gaussian, unit_model=problem.unit_model.live())
    except NUMERICAL_ERRORS:
        return None


def _global_names(problem: Problem) -> list[str]:
    """Names of the unconstrained elements of the globals, ``d`` of them."""
    return [
        site.name if site.shape.numel() == 1 else f"{site.name}[{index}]"
        for site in problem.unit_model.layout.global_sites.values()
        for index in range(site.shape.numel())
    ]


def _check_arguments(model: Any, guide: Any, objective: Any, optimizer: Any, starts: int) -> None:
    if not isinstance(guide, AutoLaplaceFamily):
        raise TypeError(
            f"fit needs a guide of the amortized Laplace family, got {type(guide).__name__}:\n"
            "    fit(model, AutoLaplaceFamily(model), *args)\nFor any other guide, there is SVI."
        )
    if guide.model != model:
        raise ModelError(
            "the guide was made for another model than the one given; what is fitted is the guide's own. Make one of "
            "them the other:\n    fit(model, AutoLaplaceFamily(model), *args)"
        )
    if isinstance(objective, type) or not isinstance(objective, Objective):
        hint = f"{objective.__name__}()" if isinstance(objective, type) else "FixedDrawELBO()"
        raise TypeError(
            "objective must be one such as FixedDrawELBO(), MarginalLaplace(), MarginalQuadrature() or Ladder(), got "
            f"{objective!r}:\n    objective={hint}\n"
            "An ELBO of Pyro's goes into the optimizer: optimizer=Stochastic(elbo=...)"
        )
    if isinstance(optimizer, Stochastic):
        if type(objective) is not FixedDrawELBO:
            raise TypeError(
                f"Stochastic() follows the ELBO of the guide, and {type(objective).__name__}() is another objective. "
                "Leave one of them out:\n"
                "    fit(model, guide, *args, optimizer=Stochastic())"
            )
    elif isinstance(optimizer, type) or not isinstance(optimizer, Optimizer | None):
        raise TypeError(
            f"optimizer must be TrustRegion(), QuasiNewton() or Stochastic(), got {optimizer!r}. One of torch's goes "
            "into the latter:\n    optimizer=Stochastic(torch.optim.Adam, lr=0.1)"
        )
    if starts < 1:
        raise ValueError(f"starts must be at least 1, got {starts}")


def _with_draws(objective: Objective, num_draws: int) -> Objective:
    if not isinstance(objective, FixedDrawELBO):
        raise ValueError(f"{type(objective).__name__} takes no draws: leave num_draws out")
    return dataclasses.replace(objective, num_draws=num_draws, max_draws=max(num_draws, objective.max_draws))
