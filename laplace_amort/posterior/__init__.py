"""What one has after a fit: draws, moments, predictions, tables and files."""

from laplace_amort.posterior.draws import gaussian_sample
from laplace_amort.posterior.importance import ImportanceSample
from laplace_amort.posterior.likelihood import ConditionalLikelihood, MarginalLikelihood
from laplace_amort.posterior.marginal import log_densities, marginal_sample
from laplace_amort.posterior.posterior import Posterior
from laplace_amort.posterior.predictive import ConditionedUnits, NewUnits, SeenUnits, Units
from laplace_amort.posterior.proposals import matched_normal
from laplace_amort.posterior.psis import K_GOOD, pareto_smoothed
from laplace_amort.posterior.quantiles import weighted_quantiles
from laplace_amort.posterior.stored import Absent, PosteriorNumbers, StoredPosterior, numbers_of_posterior
from laplace_amort.posterior.tables import globals_table, records_frame
from laplace_amort.posterior.unit_draws import LinearUnits, NestedUnits, WeightedUnits

__all__ = [
    "K_GOOD",
    "Absent",
    "ConditionalLikelihood",
    "ConditionedUnits",
    "ImportanceSample",
    "LinearUnits",
    "MarginalLikelihood",
    "NestedUnits",
    "NewUnits",
    "Posterior",
    "PosteriorNumbers",
    "SeenUnits",
    "StoredPosterior",
    "Units",
    "WeightedUnits",
    "gaussian_sample",
    "globals_table",
    "log_densities",
    "marginal_sample",
    "matched_normal",
    "numbers_of_posterior",
    "pareto_smoothed",
    "records_frame",
    "weighted_quantiles",
]
