"""Functions of globals and units, and their derivatives: two paths, information, recordings."""

from laplace_amort.autodiff.arithmetic import Arithmetic, AsWritten, InDouble, narrowed
from laplace_amort.autodiff.batching import Gradients, SeparableDensity, at_points, values_and_gradients
from laplace_amort.autodiff.constants import state_of
from laplace_amort.autodiff.dependence import watched
from laplace_amort.autodiff.derivatives import differentiate, refuse_without_autograd, reverse_passes
from laplace_amort.autodiff.graph import ancestors_of
from laplace_amort.autodiff.information import (
    ArrowheadBlocks,
    FirstDerivatives,
    arrowhead_information,
    first_derivatives,
    local_curvature,
    local_information,
    observed_information,
    subsample_information,
)
from laplace_amort.autodiff.path_checks import check_paths
from laplace_amort.autodiff.paths import CURVATURE, DualPath, DualPathParam, dual_path, is_dual_edge
from laplace_amort.autodiff.points import fixed_normal, nearby
from laplace_amort.autodiff.recorded_information import record_information
from laplace_amort.autodiff.recording import Recording, record
from laplace_amort.autodiff.structure import as_one_unit, check_structure

__all__ = [
    "CURVATURE",
    "Arithmetic",
    "ArrowheadBlocks",
    "AsWritten",
    "DualPath",
    "DualPathParam",
    "FirstDerivatives",
    "Gradients",
    "InDouble",
    "Recording",
    "SeparableDensity",
    "ancestors_of",
    "arrowhead_information",
    "as_one_unit",
    "at_points",
    "check_paths",
    "check_structure",
    "differentiate",
    "dual_path",
    "first_derivatives",
    "fixed_normal",
    "is_dual_edge",
    "local_curvature",
    "local_information",
    "narrowed",
    "nearby",
    "observed_information",
    "record",
    "record_information",
    "refuse_without_autograd",
    "reverse_passes",
    "state_of",
    "subsample_information",
    "values_and_gradients",
    "watched",
]
