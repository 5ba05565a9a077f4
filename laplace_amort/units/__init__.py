"""Inside each unit: its mode, and integrals around it, for all units at once."""

from laplace_amort.units.closed_form import ClosedFormMode
from laplace_amort.units.integrals import Conditionals, Integrals, UnitIntegrals, unit_moments
from laplace_amort.units.marginal import LogDetAlongMode, laplace_marginal
from laplace_amort.units.modes import FreeMode, Mode, NewtonMode
from laplace_amort.units.newton import ModeStatus, default_tolerance
from laplace_amort.units.quadrature import (
    GRID_DIM,
    GaussHermite,
    Laplace,
    QuadraturePoints,
    QuadratureRule,
    StudentPoints,
    sobol_points,
    student_log_density,
    student_points,
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
    "QuadraturePoints",
    "QuadratureRule",
    "StudentPoints",
    "UnitIntegrals",
    "default_tolerance",
    "laplace_marginal",
    "sobol_points",
    "student_log_density",
    "student_points",
    "unit_moments",
]
