"""What a diagnosis says: findings with a level each, and one verdict."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray
from tabulate import tabulate

from laplace_amort.posterior import markup, records_frame
from laplace_amort.statuses import Status

__all__ = ["Diagnosis", "Finding", "Level", "UnitTails"]

_WIDTH = 72


class Level(Status):
    """How bad a finding is."""

    GOOD = 0, "good"
    UNKNOWN = 1, "not known"
    DOUBTFUL = 2, "doubtful"
    BAD = 3, "bad"


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    :param str name: what was looked at.
    :param Level level: how bad it is.
    :param str value: the numbers.
    :param str sentence: what they mean; where they are bad, what to do.
    """

    name: str
    level: Level
    value: str
    sentence: str


class UnitTails(NamedTuple):
    """Shape of the tails of the units: k-hat of importance weights whose proposal is a unit's normal approximation.

    :param str plate: of the units.
    :param units: index in the plate of those looked at, ``(U,)``: those first whose weights vary most.
    :param k_hat: of each of them, ``(U,)``; minus infinity where all weights are the same.
    :param int num_units: that there are.
    """

    plate: str
    units: NDArray[numpy.int64]
    k_hat: NDArray[numpy.float64]
    num_units: int

    def __repr__(self) -> str:
        largest = f", k-hat up to {self.k_hat.max():.2g}" if len(self.k_hat) else ""
        return f"UnitTails({len(self.units)} of {self.num_units} units of plate '{self.plate}'{largest})"


@dataclass(frozen=True)
class Diagnosis:
    """Whether a posterior can be relied on; ``print(diagnosis)`` shows the table.

    :param tuple findings: of all checks.
    :param str advice: the line to type next; empty if there is nothing to do.
    :param UnitTails unit_tails: k-hat unit by unit, for ``laplace_amort.plots.k_hat_figure``; ``None`` where units were
        not looked at.

    Example::

        >>> print(Diagnosis((Finding("convergence", Level.GOOD, "0.001", "at the optimum"),)))
        It fits: nothing that was looked at speaks against this posterior.
        <BLANKLINE>
        check        level    value    meaning
        -----------  -------  -------  --------------
        convergence  good     0.001    at the optimum
    """

    findings: tuple[Finding, ...]
    advice: str = ""
    unit_tails: UnitTails | None = field(default=None, repr=False, compare=False)

    @property
    def level(self) -> Level:
        """Which level the worst of all has."""
        return max((finding.level for finding in self.findings), default=Level.GOOD)

    @property
    def ok(self) -> bool:
        """Whether nothing is doubtful or bad."""
        return self.level < Level.DOUBTFUL

    @property
    def verdict(self) -> str:
        """What the findings come to, in one sentence."""
        bad = ", ".join(finding.name for finding in self.findings if finding.level is Level.BAD)
        doubtful = ", ".join(finding.name for finding in self.findings if finding.level is Level.DOUBTFUL)
        if bad:
            return f"It does not fit: {bad}." + (f" Doubtful: {doubtful}." if doubtful else "")
        if doubtful:
            return f"It may not fit: {doubtful}."
        return "It fits: nothing that was looked at speaks against this posterior."

    def to_frame(self) -> Any:
        """Return the table, a row for each check.

        :return: a ``pandas.DataFrame`` with the columns ``check``, ``level``, ``value`` and ``meaning``.
        :raises ImportError: if pandas is not installed.
        """
        columns = ["check", "level", "value", "meaning"]
        rows = [(f.name, str(f.level), f.value, f.sentence) for f in self.findings]
        return records_frame([dict(zip(columns, row, strict=True)) for row in rows], columns)

    def __repr__(self) -> str:
        number = len(self.findings)
        return f"Diagnosis({self.level}, {number} finding{'s' if number != 1 else ''})"

    def _repr_html_(self) -> str:
        rows = [(f.name, str(f.level), f.value, f.sentence) for f in self.findings]
        kind = f"verdict {'ok' if self.ok else 'not-ok'}"
        parts = [markup.strong(self.verdict, kind=kind), markup.table(["check", "level", "value", "meaning"], rows)]
        return markup.division(
            parts + ([markup.paragraph(f"Next:\n    {self.advice}", "next")] if self.advice else []), "laplace-amort"
        )

    def __str__(self) -> str:
        rows = [[f.name, str(f.level), f.value, textwrap.fill(f.sentence, _WIDTH)] for f in self.findings]
        parts = [self.verdict, "", tabulate(rows, ["check", "level", "value", "meaning"], disable_numparse=True)]
        return "\n".join(parts + (["", f"Next:\n    {self.advice}"] if self.advice else []))
