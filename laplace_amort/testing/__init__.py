"""The gradient-check suite: point it at a model and a guide of your own."""

from laplace_amort.testing.check_guide import CheckSettings, check_guide
from laplace_amort.testing.report import CheckReport, CheckRow

__all__ = ["CheckReport", "CheckRow", "CheckSettings", "check_guide"]
