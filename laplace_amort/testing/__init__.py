"""The gradient-check suite: point it at a model and a guide of your own."""

from laplace_amort.testing.check_guide import CheckSettings, check_guide
from laplace_amort.testing.expected import DensePrecision, JointPrecision, MarginalPrecision
from laplace_amort.testing.report import CheckReport, CheckRow

__all__ = [
    "CheckReport",
    "CheckRow",
    "CheckSettings",
    "DensePrecision",
    "JointPrecision",
    "MarginalPrecision",
    "check_guide",
]
