"""The amortized Laplace family for Pyro: guides whose only parameter is where they stand."""

from typing import TYPE_CHECKING

from laplace_amort.doors import opened_on_demand

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022
    "AutoLaplaceFamily",
    "FixedDrawELBO",
    "Ladder",
    "LogJoint",
    "MarginalLaplace",
    "NewUnits",
    "SoftAbs",
    "Stochastic",
    "diagnose",
    "dual_path_param",
    "fit",
    "observed_information",
    # The rest.
    "Arrowhead",
    "ArrowheadBlocks",
    "Boost",
    "ClosedFormMode",
    "ConditionalLikelihood",
    "ConditionedUnits",
    "Diagnosis",
    "DualPath",
    "DualPathParam",
    "Errors",
    "Finding",
    "FitResult",
    "FitStatus",
    "FreeMode",
    "GaussHermite",
    "GlobalsTable",
    "GuideCheckError",
    "InformationError",
    "JointCurvature",
    "Judgement",
    "LaplaceAmortError",
    "LaplaceGaussian",
    "Level",
    "MarginalCurvature",
    "MarginalLikelihood",
    "MarginalQuadrature",
    "ModeNotFoundError",
    "ModeWarning",
    "ModelError",
    "ModifiedCholesky",
    "NeedsModelError",
    "NestedELBO",
    "NewtonMode",
    "NoRepair",
    "NormalPoints",
    "NotPositiveDefiniteError",
    "Optimum",
    "PathError",
    "PathLeakError",
    "PathMissingWarning",
    "Posterior",
    "QuasiNewton",
    "Reason",
    "RecordingError",
    "RepairReport",
    "ResumeError",
    "SeenUnits",
    "Step",
    "StructureError",
    "StudentPoints",
    "TrustRegion",
    "UnitLayout",
    "Verdict",
    "arrowhead_information",
    "check_paths",
    "check_structure",
    "dual_path",
    "routes",
    "subsample_information",
]

# Type checkers read the imports. Python takes the same names from the table, each room when it is first asked for:
# the command line explains itself, and complains of what is typed, before torch is there.
# isort: off
if TYPE_CHECKING:
    # What most need: a fit, whether to believe it, and the pieces of a guide written by hand.
    from laplace_amort.autodiff import observed_information
    from laplace_amort.diagnostics import diagnose
    from laplace_amort.fitting import FixedDrawELBO, Ladder, MarginalLaplace, Stochastic, fit
    from laplace_amort.guide import AutoLaplaceFamily, dual_path_param
    from laplace_amort.linalg import SoftAbs
    from laplace_amort.model import LogJoint
    from laplace_amort.posterior import NewUnits

    # The rest, room by room.
    from laplace_amort.autodiff import (
        ArrowheadBlocks,
        DualPath,
        DualPathParam,
        arrowhead_information,
        check_paths,
        check_structure,
        dual_path,
        subsample_information,
    )
    from laplace_amort.diagnostics import Diagnosis, Finding, Level
    from laplace_amort.errors import (
        GuideCheckError,
        InformationError,
        LaplaceAmortError,
        ModeNotFoundError,
        ModeWarning,
        ModelError,
        NeedsModelError,
        NotPositiveDefiniteError,
        PathError,
        PathLeakError,
        PathMissingWarning,
        RecordingError,
        ResumeError,
        StructureError,
    )
    from laplace_amort.fitting import (
        Errors,
        FitResult,
        FitStatus,
        Judgement,
        MarginalQuadrature,
        NestedELBO,
        Optimum,
        QuasiNewton,
        Reason,
        Step,
        TrustRegion,
        Verdict,
    )
    from laplace_amort.guide import JointCurvature, LaplaceGaussian, MarginalCurvature, routes
    from laplace_amort.linalg import Arrowhead, Boost, ModifiedCholesky, NoRepair, RepairReport
    from laplace_amort.model import UnitLayout
    from laplace_amort.posterior import (
        ConditionalLikelihood,
        ConditionedUnits,
        GlobalsTable,
        MarginalLikelihood,
        Posterior,
        SeenUnits,
    )
    from laplace_amort.units import ClosedFormMode, FreeMode, GaussHermite, NewtonMode, NormalPoints, StudentPoints
else:
    __getattr__, __dir__ = opened_on_demand(
        __name__,
        {
            "autodiff": "ArrowheadBlocks DualPath DualPathParam arrowhead_information check_paths check_structure "
            "dual_path observed_information subsample_information",
            "diagnostics": "Diagnosis Finding Level diagnose",
            "errors": "GuideCheckError InformationError LaplaceAmortError ModeNotFoundError ModeWarning ModelError "
            "NeedsModelError NotPositiveDefiniteError PathError PathLeakError PathMissingWarning RecordingError "
            "ResumeError StructureError",
            "fitting": "Errors FitResult FitStatus FixedDrawELBO Judgement Ladder MarginalLaplace MarginalQuadrature "
            "NestedELBO Optimum QuasiNewton Reason Step Stochastic TrustRegion Verdict fit",
            "guide": "AutoLaplaceFamily JointCurvature LaplaceGaussian MarginalCurvature dual_path_param routes",
            "linalg": "Arrowhead Boost ModifiedCholesky NoRepair RepairReport SoftAbs",
            "model": "LogJoint UnitLayout",
            "posterior": "ConditionalLikelihood ConditionedUnits GlobalsTable MarginalLikelihood NewUnits Posterior "
            "SeenUnits",
            "units": "ClosedFormMode FreeMode GaussHermite NewtonMode NormalPoints StudentPoints",
        },
    )
# isort: on
