"""What of a fit goes into a file, and what comes of it: the numbers by themselves, or the fit at its model again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laplace_amort.errors import NUMERICAL_ERRORS, ModelError, ResumeError, StructureError
from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Maximum
from laplace_amort.fitting.history import Step
from laplace_amort.fitting.journal import same_start
from laplace_amort.fitting.objectives.base import gaussian_at
from laplace_amort.fitting.objectives.elbo import FixedDrawELBO
from laplace_amort.fitting.objectives.ladder import Ladder
from laplace_amort.fitting.objectives.laplace import MarginalLaplace
from laplace_amort.fitting.objectives.nested import NestedELBO
from laplace_amort.fitting.objectives.quadrature import MarginalQuadrature
from laplace_amort.fitting.objectives.stochastic import WalkState
from laplace_amort.fitting.saving import Described, Known, described
from laplace_amort.fitting.verdict import Errors, Judgement, Reason, Verdict
from laplace_amort.guide import (
    KNOWN_SETTINGS,
    PLAIN_SETTINGS,
    AutoLaplaceFamily,
    LaplaceGaussian,
    Problem,
    own_guide,
)
from laplace_amort.linalg import RepairReport, Whitening
from laplace_amort.posterior import Absent, Posterior, PosteriorNumbers, numbers_of_posterior
from laplace_amort.types import Vector
from laplace_amort.units import GaussHermite, Laplace, StudentPoints

__all__ = [
    "KNOWN",
    "GaussianNumbers",
    "Optimum",
    "Saved",
    "StoredGaussian",
    "content_of",
    "load_line",
    "revived",
    "saved_in",
    "without_model",
]


@dataclasses.dataclass(frozen=True)
class Optimum:
    """One place where starts ended.

    :param float objective: its value there.
    :param int num_starts: that ended there.
    :param dict globals_: constrained values of the global sites, by name.
    :param FitStatus status: how the best of these starts ended.
    """

    objective: float
    num_starts: int
    globals_: Mapping[str, Tensor]
    status: FitStatus


class Saved(NamedTuple):
    """What a later fit goes on from.

    :param start: where all parameters were, and what was known of modes; of a file, None for the latter.
    :param list entries: of the journal; None for a fit that begins.
    :param state: what is known of the modes of the units at the end.
    :param WalkState walk: of a stochastic fit.
    :param Vector end: where all parameters are at the end.
    :param Maximum best: the optimum there.
    """

    start: Any = None
    entries: list[tuple[str, Any]] | None = None
    state: Any = None
    walk: WalkState | None = None
    end: Vector | None = None
    best: Maximum | None = None

    def numbers(self) -> Saved:
        """Return the same without what is known of modes, which is found again."""
        walk = self.walk and dataclasses.replace(self.walk, memory=None)
        return self._replace(start=(self.start[0], None), state=None, walk=walk)

    def knowing(self, memory: Any) -> Saved:
        """Return the same with what is known of modes, as :meth:`Problem.memory` has it."""
        return self._replace(state=memory, walk=self.walk and dataclasses.replace(self.walk, memory=memory))


class GaussianNumbers(NamedTuple):
    """A Gaussian but for the border of its precision.

    :param Tensor global_loc: ``(d,)``.
    :param Tensor local_loc: modes of the units, ``(N, k)``.
    :param Tensor schur_complement: marginal precision of the globals, ``(d, d)``.
    :param RepairReport head_report: what was repaired in it.
    :param RepairReport tail_report: what was repaired in the precisions of the units.
    """

    global_loc: Tensor
    local_loc: Tensor
    schur_complement: Tensor
    head_report: RepairReport
    tail_report: RepairReport

    @staticmethod
    def of(gaussian: LaplaceGaussian) -> GaussianNumbers:
        """Return those of a Gaussian."""
        schur = gaussian.precision.schur_complement
        return GaussianNumbers(
            gaussian.global_loc, gaussian.local_loc, schur, gaussian.head_report, gaussian.tail_report
        )


class StoredGaussian(Absent):
    """A Gaussian as a file has it, with the attributes of :class:`GaussianNumbers`; for all else it says what to type.

    :param GaussianNumbers numbers: of the Gaussian.
    :param str line: that sets up the model.
    """

    def __init__(self, numbers: GaussianNumbers, line: str) -> None:
        super().__init__("the Gaussian with its precision", line)
        vars(self).update(numbers._asdict())


# A class that a result has a field of, or an objective a setting, belongs here; what does not is described in words.
KNOWN = Known(
    (
        *(Optimum, Step, Evaluation, Maximum, WalkState, Saved, GaussianNumbers, PosteriorNumbers, RepairReport),
        *(FitStatus, Verdict, Errors, Reason, Judgement),
        *(MarginalLaplace, MarginalQuadrature, Ladder, FixedDrawELBO, NestedELBO),
        *(Laplace, GaussHermite, StudentPoints, *PLAIN_SETTINGS),
    ),
    {Whitening: (Whitening.numbers, Whitening.of_numbers), **KNOWN_SETTINGS},
)


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
        "posterior": _posterior_of(result),
        "judgement": result.judgement,
        "text": str(result),
        "gaussian": exact,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "has_all_units": exact is not None and exact.local_loc.shape == problem.memory()[0].shape,
        "saved": result.saved.numbers(),
    }


def _posterior_of(result: Any) -> PosteriorNumbers | str:
    """Return the numbers of a posterior, or why there are none."""
    if result.status is FitStatus.INTERRUPTED and "posterior" not in vars(result):  # a file is written at once
        return "the fit was interrupted"
    try:
        posterior: Posterior = result.posterior
        return numbers_of_posterior(posterior)
    except (*NUMERICAL_ERRORS, ModelError, StructureError, ValueError) as error:
        return str(error)


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
