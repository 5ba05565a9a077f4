"""The amortized Laplace family for Pyro: guides whose only parameter is where they stand."""

from laplace_amort.arrowhead import Arrowhead
from laplace_amort.arrowhead_information import ArrowheadBlocks, arrowhead_information, check_structure
from laplace_amort.boost import Boost
from laplace_amort.diagnostics import diagnose
from laplace_amort.dual_path import DualPath, DualPathParam, check_paths, dual_path
from laplace_amort.errors import (
    GuideCheckError,
    InformationError,
    LaplaceAmortError,
    ModelError,
    ModeNotFoundError,
    ModeWarning,
    NotPositiveDefiniteError,
    PathError,
    PathLeakError,
    PathMissingWarning,
    RecordingError,
    ResumeError,
    StructureError,
)
from laplace_amort.family import LaplaceGaussian
from laplace_amort.findings import Diagnosis, Finding, Level
from laplace_amort.fit_result import FitResult, Optimum
from laplace_amort.fit_status import FitStatus
from laplace_amort.fitting import fit
from laplace_amort.guides import AutoLaplaceFamily
from laplace_amort.heads import JointCurvature, MarginalCurvature
from laplace_amort.information import observed_information, subsample_information
from laplace_amort.ladder import Ladder
from laplace_amort.layout import UnitLayout
from laplace_amort.log_joint import LogJoint
from laplace_amort.modes import ClosedFormMode, FreeMode, NewtonMode
from laplace_amort.modified_cholesky import ModifiedCholesky
from laplace_amort.objectives import FixedDrawELBO, MarginalLaplace
from laplace_amort.optimizers import QuasiNewton, TrustRegion
from laplace_amort.params import dual_path_param
from laplace_amort.pointwise import ConditionalLikelihood, MarginalLikelihood
from laplace_amort.posterior import Posterior
from laplace_amort.predictions import ConditionedUnits, NewUnits, SeenUnits
from laplace_amort.repair import NoRepair, RepairReport, SoftAbs
from laplace_amort.rules import GaussHermite, StudentPoints
from laplace_amort.run import Step
from laplace_amort.stochastic import Stochastic
from laplace_amort.unit_objectives import MarginalQuadrature, NestedELBO

__version__ = "0.1.0"

__all__ = [
    "Arrowhead",
    "ArrowheadBlocks",
    "AutoLaplaceFamily",
    "Boost",
    "ClosedFormMode",
    "ConditionalLikelihood",
    "ConditionedUnits",
    "Diagnosis",
    "DualPath",
    "DualPathParam",
    "Finding",
    "FitResult",
    "FitStatus",
    "FixedDrawELBO",
    "FreeMode",
    "GaussHermite",
    "GuideCheckError",
    "InformationError",
    "JointCurvature",
    "Ladder",
    "LaplaceAmortError",
    "LaplaceGaussian",
    "Level",
    "LogJoint",
    "MarginalCurvature",
    "MarginalLaplace",
    "MarginalLikelihood",
    "MarginalQuadrature",
    "ModeNotFoundError",
    "ModeWarning",
    "ModelError",
    "ModifiedCholesky",
    "NestedELBO",
    "NewUnits",
    "NewtonMode",
    "NoRepair",
    "NotPositiveDefiniteError",
    "Optimum",
    "PathError",
    "PathLeakError",
    "PathMissingWarning",
    "Posterior",
    "QuasiNewton",
    "RecordingError",
    "RepairReport",
    "ResumeError",
    "SeenUnits",
    "SoftAbs",
    "Step",
    "Stochastic",
    "StructureError",
    "StudentPoints",
    "TrustRegion",
    "UnitLayout",
    "arrowhead_information",
    "check_paths",
    "check_structure",
    "diagnose",
    "dual_path",
    "dual_path_param",
    "fit",
    "observed_information",
    "subsample_information",
]
