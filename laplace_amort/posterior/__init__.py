"""What one has after a fit: draws, moments, predictions, tables and files."""

from laplace_amort.posterior import markup
from laplace_amort.posterior.draws import gaussian_sample
from laplace_amort.posterior.likelihood import ConditionalLikelihood, MarginalLikelihood
from laplace_amort.posterior.marginal import log_densities, marginal_sample
from laplace_amort.posterior.posterior import Posterior
from laplace_amort.posterior.predictive import ConditionedUnits, NewUnits, SeenUnits, Units
from laplace_amort.posterior.psis import K_GOOD, pareto_smoothed
from laplace_amort.posterior.quantiles import weighted_quantiles
from laplace_amort.posterior.stored import Absent, PosteriorNumbers, StoredPosterior, StoredRows, numbers_of_posterior
from laplace_amort.posterior.tables import PROBABILITIES, GlobalsTable, records_frame
from laplace_amort.posterior.unit_draws import LinearUnits, NestedUnits, WeightedUnits
from laplace_amort.posterior.weighted import ImportanceSample

__all__ = [
    "K_GOOD",
    "PROBABILITIES",
    "Absent",
    "ConditionalLikelihood",
    "ConditionedUnits",
    "GlobalsTable",
    "ImportanceSample",
    "LinearUnits",
    "MarginalLikelihood",
    "NestedUnits",
    "NewUnits",
    "Posterior",
    "PosteriorNumbers",
    "SeenUnits",
    "StoredPosterior",
    "StoredRows",
    "Units",
    "WeightedUnits",
    "gaussian_sample",
    "log_densities",
    "marginal_sample",
    "markup",
    "numbers_of_posterior",
    "pareto_smoothed",
    "records_frame",
    "weighted_quantiles",
]
