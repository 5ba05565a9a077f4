"""What a fit says of itself: how far to trust the posterior, by how much it may be off, and what to type next."""

from __future__ import annotations

from typing import NamedTuple

from laplace_amort.statuses import Status
from laplace_amort.types import in_sd

__all__ = ["NEXT_LINE", "Errors", "Judgement", "Reason", "Verdict"]

NEXT_LINE = "\n    "
"""What stands before a line to type."""


class Verdict(Status):
    """How far to trust a posterior; ``str(verdict)`` is a sentence, and ``verdict.ok`` whether to use the numbers.

    Do not read ``RIGHT`` as proof: modes of the globals that no start led to are not seen. For a longer look there is
    :func:`~laplace_amort.diagnose`.

    Example::

        >>> print(Verdict.RIGHT)
        right, as far as can be seen
        >>> Verdict.RIGHT.ok, Verdict.INEXACT.ok
        (True, False)
    """

    RIGHT = 0, "right, as far as can be seen"
    INEXACT = 1, "not exact: means or standard deviations are off by more than they may be"
    NO_MOMENTS = 2, "right in its quantiles, but some mean or standard deviation does not exist: report quantiles"
    WEIGHTED = 3, "that of a model with weights: standard deviations are not those of the data as they are"
    POORLY_COVERED = 4, "not known well: few draws of the globals count, or the tail of their weights is heavy"
    SEVERAL_MODES = 5, "one mode of several: what lies around the others is left out"
    KINKED = 6, "not to be relied on: the density has kinks where the fit takes it for smooth"
    NOT_A_MAXIMUM = 7, "not to be relied on: the fit ended where the density has no maximum in all directions"
    NOT_COMPARED = 8, "not known: there was nothing to compare it with"
    NOT_CONVERGED = 9, "not to be relied on: the fit has not converged"
    NO_POSTERIOR = 10, "there is no posterior"

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the numbers; never where the fit has not converged."""
        return self is Verdict.RIGHT


class Errors(NamedTuple):
    """How far a posterior may be off at most, as estimated: by integrals over the units, and by sampling.

    :param float mean: of the mean of a global, in posterior standard deviations.
    :param float sd: of the standard deviation of a global, in per cent.
    :param str global_: the global that is worst; empty if there is none.
    :param float unit_mean: of the mean of a unit, in posterior standard deviations.
    :param float unit_sd: of the standard deviation of a unit, in per cent.
    :param str unit: the element of a unit that is worst; empty if there is none.
    """

    mean: float
    sd: float
    global_: str
    unit_mean: float
    unit_sd: float
    unit: str

    def __str__(self) -> str:
        parts = [
            f"means of the {what} {_within(in_sd(mean))} and standard deviations {_within(_percent(sd))} "
            f"(worst: {where})"
            for what, mean, sd, where in (
                ("globals", self.mean, self.sd, self.global_),
                ("units", self.unit_mean, self.unit_sd, self.unit),
            )
            if where
        ]
        return "; ".join(parts)


def _within(size: str) -> str:
    return f"within {size.removeprefix('under ')}"


def _percent(share: float) -> str:
    return "under 0.1 %" if share < 0.1 else f"{share:.2g} %"


class Reason(NamedTuple):
    """What speaks against a posterior.

    :param Verdict verdict: what it comes to, by itself.
    :param str sentence: what was found, with numbers.
    :param str advice: the line to type next; empty if there is none.
    """

    verdict: Verdict
    sentence: str
    advice: str = ""

    @classmethod
    def of_note(cls, verdict: Verdict, note: str) -> Reason:
        """Return what a note of a fit says, its lines to type apart."""
        sentence, _, advice = note.partition(NEXT_LINE)
        return cls(verdict, sentence, advice)

    def __str__(self) -> str:
        return f"{self.sentence}{NEXT_LINE}{self.advice}" if self.advice else self.sentence


class Judgement(NamedTuple):
    """A verdict and what it rests on.

    :param errors: :class:`Errors`; None where there is nothing to compare with.
    :param tuple reasons: what speaks against the posterior, the worst first; empty if nothing does.
    """

    errors: Errors | None
    reasons: tuple[Reason, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of the reasons."""
        return max((reason.verdict for reason in self.reasons), default=Verdict.RIGHT)

    @property
    def advice(self) -> str:
        """The line to type next; empty if there is nothing to do."""
        return next((reason.advice for reason in self.reasons if reason.advice), "")

    def __str__(self) -> str:
        lines = [f"{self.verdict.name}: {self.verdict}"]
        if self.errors is not None and str(self.errors):
            lines[0] += f". Estimated: {self.errors}"
        return "\n".join([*lines, *map(str, self.reasons)])
