"""What a saved fit consists of: the records in a file, and which classes these are of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Maximum
from laplace_amort.fitting.history import Step
from laplace_amort.fitting.objectives.elbo import FixedDrawELBO
from laplace_amort.fitting.objectives.ladder import Ladder
from laplace_amort.fitting.objectives.laplace import MarginalLaplace
from laplace_amort.fitting.objectives.nested import NestedELBO
from laplace_amort.fitting.objectives.quadrature import MarginalQuadrature
from laplace_amort.fitting.objectives.stochastic import WalkState
from laplace_amort.fitting.saving import Known
from laplace_amort.fitting.verdict import Errors, Judgement, Reason, Verdict
from laplace_amort.guide import KNOWN_SETTINGS, PLAIN_SETTINGS, LaplaceGaussian
from laplace_amort.linalg import RepairReport, Whitening
from laplace_amort.posterior import Absent, PosteriorNumbers, StoredRows
from laplace_amort.types import Vector
from laplace_amort.units import GaussHermite, Laplace, StudentPoints

__all__ = ["KNOWN", "GaussianNumbers", "Optimum", "Saved", "StoredGaussian"]


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

    def __repr__(self) -> str:
        starts = f"{self.num_starts} start{'s' if self.num_starts != 1 else ''}"
        return f"Optimum({self.status.name}, objective {self.objective:.6g}, {starts})"


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
        *(Optimum, Step, Evaluation, Maximum, WalkState, Saved),
        *(GaussianNumbers, PosteriorNumbers, StoredRows, RepairReport),
        *(FitStatus, Verdict, Errors, Reason, Judgement),
        *(MarginalLaplace, MarginalQuadrature, Ladder, FixedDrawELBO, NestedELBO),
        *(Laplace, GaussHermite, StudentPoints, *PLAIN_SETTINGS),
    ),
    {Whitening: (Whitening.numbers, Whitening.of_numbers), **KNOWN_SETTINGS},
)
