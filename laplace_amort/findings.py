"""What a diagnosis says: findings with a level each, and one verdict."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from tabulate import tabulate

from laplace_amort.statuses import Status

__all__ = ["Diagnosis", "Finding", "Level"]

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


@dataclass(frozen=True)
class Diagnosis:
    """Whether a posterior can be relied on; ``print(diagnosis)`` shows the table.

    :param tuple findings: of all checks.
    :param str advice: the line to type next; empty if there is nothing to do.

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

    @property
    def level(self) -> Level:
        """The worst of all."""
        return max((finding.level for finding in self.findings), default=Level.GOOD)

    @property
    def ok(self) -> bool:
        """Whether nothing is doubtful or bad."""
        return self.level < Level.DOUBTFUL

    @property
    def verdict(self) -> str:
        """One sentence."""
        bad = ", ".join(finding.name for finding in self.findings if finding.level is Level.BAD)
        doubtful = ", ".join(finding.name for finding in self.findings if finding.level is Level.DOUBTFUL)
        if bad:
            return f"It does not fit: {bad}." + (f" Doubtful: {doubtful}." if doubtful else "")
        if doubtful:
            return f"It may not fit: {doubtful}."
        return "It fits: nothing that was looked at speaks against this posterior."

    def __str__(self) -> str:
        rows = [[f.name, str(f.level), f.value, textwrap.fill(f.sentence, _WIDTH)] for f in self.findings]
        parts = [self.verdict, "", tabulate(rows, ["check", "level", "value", "meaning"], disable_numparse=True)]
        return "\n".join(parts + (["", f"Next:\n    {self.advice}"] if self.advice else []))
