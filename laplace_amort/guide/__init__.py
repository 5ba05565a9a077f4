"""The amortized Laplace family: a Gaussian with one parameter, and a guide at given data."""

from laplace_amort.guide import routes
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.collapse import find_collapse
from laplace_amort.guide.flat import find_flat_latent
from laplace_amort.guide.gaussian import LaplaceGaussian, is_elementwise, is_exponential, is_identity, of_one_event
from laplace_amort.guide.heads import Head, JointCurvature, KnownCurvature, MarginalCurvature
from laplace_amort.guide.own import KNOWN_SETTINGS, PLAIN_SETTINGS, own_guide
from laplace_amort.guide.params import dual_path_param
from laplace_amort.guide.problem import Problem
from laplace_amort.guide.rounding import find_coarseness
from laplace_amort.guide.vector import set_vector, to_vector

__all__ = [
    "KNOWN_SETTINGS",
    "PLAIN_SETTINGS",
    "AutoLaplaceFamily",
    "Head",
    "JointCurvature",
    "KnownCurvature",
    "LaplaceGaussian",
    "MarginalCurvature",
    "Problem",
    "dual_path_param",
    "find_coarseness",
    "find_collapse",
    "find_flat_latent",
    "is_elementwise",
    "is_exponential",
    "is_identity",
    "of_one_event",
    "own_guide",
    "routes",
    "set_vector",
    "to_vector",
]
