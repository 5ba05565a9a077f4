"""Inside each unit: its mode, and integrals around it, for all units at once."""

from laplace_amort.units.closed_form import ClosedFormMode
from laplace_amort.units.integrals import Conditionals, Integrals, UnitIntegrals, unit_moments
from laplace_amort.units.marginal import LogDetAlongMode, laplace_marginal
from laplace_amort.units.modes import FreeMode, Mode, NewtonMode
from laplace_amort.units.newton import ModeStatus, default_tolerance
from laplace_amort.units.points import matched_normal, sobol_points, student_log_density, student_points
from laplace_amort.units.quadrature import (
    GRID_DIM,
    GaussHermite,
    Laplace,
    NormalPoints,
    QuadraturePoints,
    QuadratureRule,
    StudentPoints,
    accurate_rule,
)

__all__ = [
    "GRID_DIM",
    "ClosedFormMode",
    "Conditionals",
    "FreeMode",
    "GaussHermite",
    "Integrals",
    "Laplace",
    "LogDetAlongMode",
    "Mode",
    "ModeStatus",
    "NewtonMode",
    "NormalPoints",
    "QuadraturePoints",
    "QuadratureRule",
    "StudentPoints",
    "UnitIntegrals",
    "accurate_rule",
    "default_tolerance",
    "laplace_marginal",
    "matched_normal",
    "sobol_points",
    "student_log_density",
    "student_points",
    "unit_moments",
]
