"""A Pyro model as a function of two tensors, globals and units."""

from laplace_amort.model.calls import UnitModels, all_plates
from laplace_amort.model.fingerprint import Fingerprint
from laplace_amort.model.functions import GlobalFunctions, find_functions
from laplace_amort.model.handlers import SubsampledPlate
from laplace_amort.model.layout import UnitLayout, find_layout
from laplace_amort.model.log_joint import LogJoint
from laplace_amort.model.observed import ObservedSite, observed_sites, with_data_completed, with_data_drawn
from laplace_amort.model.parameters import prior_for_parameter
from laplace_amort.model.particles import takes_particles
from laplace_amort.model.simulated import simulated_units
from laplace_amort.model.sites import plates_of, undressed
from laplace_amort.model.terms import unit_terms
from laplace_amort.model.unit_model import UnitModel

__all__ = [
    "Fingerprint",
    "GlobalFunctions",
    "LogJoint",
    "ObservedSite",
    "SubsampledPlate",
    "UnitLayout",
    "UnitModel",
    "UnitModels",
    "all_plates",
    "find_functions",
    "find_layout",
    "observed_sites",
    "plates_of",
    "prior_for_parameter",
    "simulated_units",
    "takes_particles",
    "undressed",
    "unit_terms",
    "with_data_completed",
    "with_data_drawn",
]
