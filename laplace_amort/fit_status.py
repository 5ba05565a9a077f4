"""How a fit ended, in words."""

from __future__ import annotations

from laplace_amort.statuses import Status

__all__ = ["FitStatus"]


class FitStatus(Status):
    """How a fit ended; ``str(status)`` is the sentence that a user reads.

    Example::

        >>> print(FitStatus.CONVERGED)
        converged: what is left of the gradient would move the optimum by less than the tolerance
    """

    CONVERGED = 0, "converged: what is left of the gradient would move the optimum by less than the tolerance"
    MAX_STEPS = 1, "not converged in the steps allowed: raise max_steps of the optimizer"
    TOO_FEW_DRAWS = (
        2,
        "converged for its own draws only: others have their optimum elsewhere, so the guide fits badly in some of its "
        "tails; integrate over the units: fit(model, guide, *args, objective=Ladder())",
    )
    STUCK = (
        3,
        "not converged: no step improves the objective although its gradient is not zero; see the history for where it "
        "does not exist, and start elsewhere",
    )
    START_FAILED = 4, "not begun: the objective does not exist at the start nor near it; pass another init_loc_fn"
    NO_MAXIMUM = (
        6,
        "not converged: at the best point the objective is flat or curves upwards in some direction; are the globals "
        "identified?",
    )
    INTERRUPTED = 5, "interrupted: the guide stands at the best point found; go on with resume="

    @property
    def ok(self) -> bool:
        """Whether the fit converged."""
        return self is FitStatus.CONVERGED
