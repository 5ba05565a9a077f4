"""Whether to believe a fit: one table with a verdict."""

from laplace_amort.diagnostics.diagnose import diagnose, unit_tails
from laplace_amort.diagnostics.findings import Diagnosis, Finding, Level, UnitTails
from laplace_amort.diagnostics.thresholds import UNIT_TAILS

__all__ = ["UNIT_TAILS", "Diagnosis", "Finding", "Level", "UnitTails", "diagnose", "unit_tails"]
