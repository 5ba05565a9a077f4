"""What of a fit goes into a file, and what comes of it: the numbers by themselves, or the fit at its model again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from laplace_amort.errors import ResumeError
from laplace_amort.fitting.evaluation import FitStatus
from laplace_amort.fitting.journal import same_start
from laplace_amort.fitting.objectives.base import gaussian_at
from laplace_amort.fitting.records import KNOWN, GaussianNumbers, Saved, StoredGaussian
from laplace_amort.fitting.saving import Described, described
from laplace_amort.guide import PLAIN_SETTINGS, AutoLaplaceFamily, Problem, own_guide
from laplace_amort.posterior import Absent, numbers_of_posterior

__all__ = ["content_of", "load_line", "revived", "saved_in", "without_model"]


# ----------------------------------------------------------------------------------------------------------- to a file


def content_of(result: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file has of a fit. What a reader will look at is computed now, unless it was before.

    :param FitResult result: the fit.
    :param plain: those of its fields that are plain numbers, words and records, by name.
    """
    problem, gaussian = result.problem, result.gaussian
    exact = None if gaussian is None else GaussianNumbers.of(result.exact_gaussian())
    return {
        "plain": dict(plain),
        "maximized": described(result.maximized, KNOWN),
        "asked": described(result.asked, KNOWN),
        "guide": {name: described(one, KNOWN) for name, one in result.guide.settings().items()},
        **_shown(result),
        "judgement": result.judgement,
        "how": result.how(),
        "gaussian": exact,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "has_all_units": exact is not None and exact.local_loc.shape == problem.memory()[0].shape,
        "saved": result.saved.numbers(),
    }


def _shown(result: Any) -> dict[str, Any]:
    """Return the posterior that a reader is shown, and in what it is not the one that was asked for."""
    interrupted = result.status is FitStatus.INTERRUPTED  # then nothing is drawn: the file is to be written at once
    try:
        return {
            "shown": numbers_of_posterior(result.posterior_to_show()),
            "missing": "the fit was interrupted" if interrupted else "",
            "have_mean": {} if interrupted else result.have_mean(),
        }
    except ValueError as error:
        return {"shown": None, "missing": str(error), "have_mean": {}}


# --------------------------------------------------------------------------------------------------------- from a file


def without_model(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the fields of a result, as far as a file has them, with what says so in the place of the others.

    :param content: of the file.
    :param path: of the file, for the line to type.
    """
    line, dtype = load_line(path), getattr(torch, content["dtype"])
    exact = content["gaussian"]
    rounded = exact and exact._replace(**{name: getattr(exact, name).to(dtype) for name in exact._fields[:3]})
    return {
        **content["plain"],
        "maximized": content["maximized"],
        "asked": content["asked"],
        "guide": Absent("its guide", line),
        "problem": Absent("its model at the data", line),
        "gaussian": rounded and StoredGaussian(rounded, line),
        "in_double": exact and (None if dtype == torch.float64 else StoredGaussian(exact, line)),
        "saved": saved_in(content),
    }


def load_line(path: str | Path) -> str:
    """Word the line that sets up the model of a fit in a file."""
    return f"FitResult.load({str(path)!r}, model, *args)"


def saved_in(content: Mapping[str, Any]) -> Saved:
    """Return what a later fit goes on from, with the modes of the units at the optimum for a first guess."""
    saved: Saved = content["saved"]
    if not content["has_all_units"]:
        return saved
    gaussian: GaussianNumbers = content["gaussian"]
    local = gaussian.local_loc
    return saved.knowing((local, local.new_zeros(*local.shape, len(gaussian.global_loc))))


def revived(
    content: Mapping[str, Any],
    path: str | Path,
    model: Callable[..., Any],
    guide: AutoLaplaceFamily | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the fields of a result at its model, which the fit has left: nothing is evaluated but the Gaussian.

    :param content: of the file.
    :param path: of the file, for messages.
    :param model: a Pyro model.
    :param guide: for settings that no file can hold; None for one that is made as that of the fit was.
    :param args: arguments of the model.
    :param kwargs: its keyword arguments.
    :raises ResumeError: if model, data or guide are others, or the objective is one that no file can hold.
    """
    plain, saved, objective = content["plain"], saved_in(content), content["maximized"]
    if isinstance(objective, Described):
        raise ResumeError(
            f"{path} is of a fit with the objective {objective}, and of one of your own a file holds evaluations only. "
            f"The fit reads these:\n    fit(model, *args, objective=..., resume={str(path)!r})"
        )
    guide = _guide_for(content["guide"], path, model, guide)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plain["seed"])  # as in the fit, so that a minibatch is the same
        problem = Problem(guide, args, kwargs)
        problem.restore(saved.start)
        same_start(_at_start(saved), problem.log_joint_at_start())
        problem.restore((_needed(saved.end), None))
        problem.recall(saved.state)
        problem.recheck()
        problem.hand_back()
        gaussian = content["gaussian"] and gaussian_at(problem, objective, _needed(saved.best))
    given = gaussian if gaussian is None or problem.is_as_given else gaussian.to(problem.given, problem.dtype)
    return {
        **plain,
        "maximized": objective,
        "asked": content["asked"],
        "guide": guide,
        "problem": problem,
        "gaussian": given,
        "in_double": None if given is gaussian else gaussian,
        "saved": saved,
    }


def _needed(value: Any) -> Any:
    """Return what every file has.

    :raises ResumeError: if it is not there.
    """
    if value is None:
        raise ResumeError("the file is not whole. Fit again:\n    result = fit(model, *args)\n    result.save(path)")
    return value


def _at_start(saved: Saved) -> float:
    """Return the log joint where the fit began: what it had in its journal first."""
    return float(_needed(saved.entries)[0][1])


def _guide_for(
    settings: Mapping[str, Any], path: str | Path, model: Callable[..., Any], guide: AutoLaplaceFamily | None
) -> AutoLaplaceFamily:
    """Return the guide that was given if it is like that of the fit, or one like that."""
    if guide is None:
        for name, one in settings.items():
            if isinstance(one, Described):
                raise ResumeError(
                    f"{path} is of a fit whose guide had {name}={one}, which no file can hold. Give it that guide:\n"
                    f"    FitResult.load({str(path)!r}, model, *args, guide=AutoLaplaceFamily(model, {name}=...))"
                )
        return own_guide(model, **settings)
    for name, one in guide.settings().items():
        if _kind(one) != _kind(settings[name]) or (_is_plain(one) and one != settings[name]):
            raise ResumeError(
                f"{path} is of a fit whose guide had {name}={settings[name]!r}, and this one has {one!r}. Leave it "
                f"out, or give it one with that:\n    {load_line(path)}"
            )
    return guide


def _kind(value: Any) -> str:
    """Return the name of a class, also of an object that there is only a description of."""
    return repr(value).partition("(")[0]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, *PLAIN_SETTINGS))
