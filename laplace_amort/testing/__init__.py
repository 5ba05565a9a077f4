"""The gradient-check suite: point it at a model and a guide of your own."""

from typing import TYPE_CHECKING

from laplace_amort.doors import opened_on_demand

__all__ = [
    "CheckReport",
    "CheckRow",
    "CheckSettings",
    "DensePrecision",
    "JointPrecision",
    "MarginalPrecision",
    "check_guide",
]

# Nothing is imported before it is used: the pytest plugin is in this room, and pytest should start fast.
if TYPE_CHECKING:
    from laplace_amort.testing.expected import DensePrecision, JointPrecision, MarginalPrecision
    from laplace_amort.testing.report import CheckReport, CheckRow
    from laplace_amort.testing.suite import CheckSettings, check_guide
else:
    __getattr__, __dir__ = opened_on_demand(
        __name__,
        {
            "expected": "DensePrecision JointPrecision MarginalPrecision",
            "report": "CheckReport CheckRow",
            "suite": "CheckSettings check_guide",
        },
    )
