"""Whether to believe a fit: one table with a verdict."""

from laplace_amort.diagnostics.diagnose import diagnose, unit_tails
from laplace_amort.diagnostics.findings import Diagnosis, Finding, Level, UnitTails

__all__ = ["Diagnosis", "Finding", "Level", "UnitTails", "diagnose", "unit_tails"]
