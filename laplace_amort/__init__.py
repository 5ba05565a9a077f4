"""The amortized Laplace family for Pyro: guides whose only parameter is where they stand."""

from laplace_amort.dual_path import DualPath, DualPathParam, check_paths, dual_path
from laplace_amort.errors import (
    GuideCheckError,
    InformationError,
    LaplaceAmortError,
    ModelError,
    NotPositiveDefiniteError,
    PathError,
    PathLeakError,
    PathMissingWarning,
)
from laplace_amort.information import observed_information, subsample_information
from laplace_amort.log_joint import LogJoint
from laplace_amort.params import dual_path_param
from laplace_amort.repair import RepairReport, SoftAbs

__version__ = "0.1.0"

__all__ = [
    "DualPath",
    "DualPathParam",
    "GuideCheckError",
    "InformationError",
    "LaplaceAmortError",
    "LogJoint",
    "ModelError",
    "NotPositiveDefiniteError",
    "PathError",
    "PathLeakError",
    "PathMissingWarning",
    "RepairReport",
    "SoftAbs",
    "check_paths",
    "dual_path",
    "dual_path_param",
    "observed_information",
    "subsample_information",
]
