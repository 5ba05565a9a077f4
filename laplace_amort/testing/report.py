"""What a check found: rows that print as a table."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate

from laplace_amort.errors import GuideCheckError

__all__ = ["CheckReport", "CheckRow"]


@dataclass(frozen=True)
class CheckRow:
    """One comparison, at the element where it came out worst.

    :param str check: what was compared.
    :param str where: parameter, site and element.
    :param float found: what the guide does.
    :param float expected: what an independent route gives.
    :param float error: ``abs(found - expected)`` relative to the scale of the quantity.
    :param float tolerance: bound on ``error``.
    :param str hint: the likely mistake and the line to type instead, shown if the row fails.
    :param str undecided: why the comparison could not be made, if so; such a row counts as failed.
    """

    check: str
    where: str
    found: float
    expected: float
    error: float
    tolerance: float
    hint: str = ""
    undecided: str = ""

    @property
    def ok(self) -> bool:
        """Whether the comparison was made and came out within tolerance."""
        return not self.undecided and self.error <= self.tolerance

    @property
    def verdict(self) -> str:
        """How the comparison came out: ``ok``, ``FAILED`` or ``UNDECIDED``."""
        return "ok" if self.ok else "UNDECIDED" if self.undecided else "FAILED"


@dataclass(frozen=True)
class CheckReport:
    """All rows of a check; prints as a table.

    :param tuple rows: of :class:`CheckRow`.
    :param tuple notes: sentences about what the check did.

    Example::

        >>> print(CheckReport((CheckRow("ELBO gradient", "theta[0]", 1.5, 1.5, 0.0, 1e-6),)))
        check          where       found    expected    relative error  verdict
        -------------  --------  -------  ----------  ----------------  ---------
        ELBO gradient  theta[0]      1.5         1.5                 0  ok
        1 of 1 checks passed
    """

    rows: tuple[CheckRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every row passed."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        columns = ("check", "where", "found", "expected", "relative error", "verdict")
        cells = [
            (row.check, row.where, f"{row.found:.9g}", f"{row.expected:.9g}", f"{row.error:.2g}", row.verdict)
            for row in self.rows
        ]
        passed = sum(row.ok for row in self.rows)
        return "\n".join([tabulate(cells, columns), f"{passed} of {len(cells)} checks passed", *self.notes])

    def raise_if_failed(self) -> None:
        """Raise for the rows that did not pass.

        :raises GuideCheckError: naming each with its element, both values, and what to do.
        """
        failed = [row for row in self.rows if not row.ok]
        if not failed:
            return
        lines = [f"{len(failed)} of {len(self.rows)} checks of the guide did not pass"]
        for row in failed:
            lines.append(f"- {row.check} at {row.where}: found {row.found:.9g}, expected {row.expected:.9g}")
            lines.extend(f"  {text}" for text in (row.undecided, row.hint) if text)
        raise GuideCheckError("\n".join(lines), self)
