"""What speaks for a posterior or against it: comparisons with a better one, tails, other modes."""

from laplace_amort.evidence.comparison import Comparison, PosteriorComparison, compare, compare_globals
from laplace_amort.evidence.moments import HeavyTail, heavy_tails
from laplace_amort.evidence.next_rung import against_next, next_rule
from laplace_amort.evidence.slices import other_peaks
from laplace_amort.evidence.unit_checks import other_modes, unit_k_hat

__all__ = [
    "Comparison",
    "HeavyTail",
    "PosteriorComparison",
    "against_next",
    "compare",
    "compare_globals",
    "heavy_tails",
    "next_rule",
    "other_modes",
    "other_peaks",
    "unit_k_hat",
]
