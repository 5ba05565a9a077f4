"""How the parameter is found: objectives, optimizers, history, and the result."""

from laplace_amort.fitting.evaluation import FitStatus
from laplace_amort.fitting.fit import fit
from laplace_amort.fitting.history import CHECK, Step
from laplace_amort.fitting.objectives.elbo import FixedDrawELBO
from laplace_amort.fitting.objectives.ladder import Ladder
from laplace_amort.fitting.objectives.laplace import MarginalLaplace
from laplace_amort.fitting.objectives.nested import NestedELBO
from laplace_amort.fitting.objectives.quadrature import MarginalQuadrature
from laplace_amort.fitting.objectives.stochastic import Stochastic
from laplace_amort.fitting.optimizers import QuasiNewton, TrustRegion
from laplace_amort.fitting.records import Optimum
from laplace_amort.fitting.result import FitResult
from laplace_amort.fitting.verdict import Errors, Judgement, Reason, Verdict

__all__ = [
    "CHECK",
    "Errors",
    "FitResult",
    "FitStatus",
    "FixedDrawELBO",
    "Judgement",
    "Ladder",
    "MarginalLaplace",
    "MarginalQuadrature",
    "NestedELBO",
    "Optimum",
    "QuasiNewton",
    "Reason",
    "Step",
    "Stochastic",
    "TrustRegion",
    "Verdict",
    "fit",
]
