"""What one has after a fit: draws, moments, predictions, tables and files."""

from laplace_amort.posterior.export import Container, export, installed_container
from laplace_amort.posterior.importance import ImportanceSample, matched_normal
from laplace_amort.posterior.likelihood import ConditionalLikelihood, LogLikelihood, MarginalLikelihood
from laplace_amort.posterior.posterior import Posterior, gaussian_sample, marginal_sample
from laplace_amort.posterior.predictive import ConditionedUnits, NewUnits, SeenUnits, Units, posterior_for, predictive
from laplace_amort.posterior.psis import K_GOOD, pareto_smoothed
from laplace_amort.posterior.quantiles import weighted_quantiles
from laplace_amort.posterior.tables import globals_table, records_frame, require_pandas
from laplace_amort.posterior.unit_draws import LinearUnits, NestedUnits, WeightedUnits

__all__ = [
    "K_GOOD",
    "ConditionalLikelihood",
    "ConditionedUnits",
    "Container",
    "ImportanceSample",
    "LinearUnits",
    "LogLikelihood",
    "MarginalLikelihood",
    "NestedUnits",
    "NewUnits",
    "Posterior",
    "SeenUnits",
    "Units",
    "WeightedUnits",
    "export",
    "gaussian_sample",
    "globals_table",
    "installed_container",
    "marginal_sample",
    "matched_normal",
    "pareto_smoothed",
    "posterior_for",
    "predictive",
    "records_frame",
    "require_pandas",
    "weighted_quantiles",
]
