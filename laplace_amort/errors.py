"""Errors and warnings: every message names the site, argument or unit, the value, and the line to type instead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch

__all__ = [
    "NUMERICAL_ERRORS",
    "GuideCheckError",
    "InformationError",
    "LaplaceAmortError",
    "ModeNotFoundError",
    "ModeWarning",
    "ModelError",
    "NeedsModelError",
    "NotPositiveDefiniteError",
    "PathError",
    "PathLeakError",
    "PathMissingWarning",
    "PrecisionError",
    "RecordingError",
    "ResumeError",
    "StructureError",
]


class LaplaceAmortError(Exception):
    """Base class of every error this package raises on purpose (besides plain ``TypeError``/``ValueError``)."""


class PathError(LaplaceAmortError, RuntimeError):
    """The two paths of a dual-path parameter cannot be examined, for instance because no graph was recorded."""


class PathLeakError(PathError):
    """A tensor that must not depend on the curvature path (or on the raw parameter) does."""


class PathMissingWarning(UserWarning):
    """A tensor that should depend on the mean path does not, so the ELBO gradient lacks a term."""


class InformationError(LaplaceAmortError, RuntimeError):
    """The observed information of a log joint density cannot be formed."""


class NotPositiveDefiniteError(LaplaceAmortError, ArithmeticError):
    """A precision matrix is not positive definite, and a repair would have to change it past its bound."""


class ModelError(LaplaceAmortError, RuntimeError):
    """A Pyro model has something that this package cannot handle; the message names the site or plate."""


class StructureError(LaplaceAmortError, ValueError):
    """The information of a model is no block arrowhead: units are not independent of each other given the globals."""


class RecordingError(LaplaceAmortError, RuntimeError):
    """A log joint cannot be recorded as a fixed list of tensor operations; a fit then runs the model itself."""


class PrecisionError(LaplaceAmortError, ArithmeticError):
    """A model is another function in double precision, or loses digits there."""


class ResumeError(LaplaceAmortError, ValueError):
    """A fit cannot go on from what was saved, because it is the state of another fit."""


class NeedsModelError(LaplaceAmortError, RuntimeError):
    """Something was asked of a fit that was read from a file, and the model is needed for it."""


class ModeNotFoundError(LaplaceAmortError, ArithmeticError):
    """The conditional mode of some units was not found.

    :param str message: what went wrong, where, and the cure.
    :param list units: indices of the units in their plate.
    :param status: of each of them.
    """

    def __init__(self, message: str, units: Sequence[int] = (), status: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.units = list(units)
        self.status = list(status)


class ModeWarning(UserWarning):
    """A conditional mode that the user supplied is not the mode."""


class GuideCheckError(LaplaceAmortError, AssertionError):
    """A guide failed :func:`laplace_amort.testing.check_guide`; the attribute ``report`` holds every row."""

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


NUMERICAL_ERRORS = (
    ModeNotFoundError,
    NotPositiveDefiniteError,
    InformationError,
    torch.linalg.LinAlgError,
    numpy.linalg.LinAlgError,
)
"""What is raised where a density overflows or a mode is lost: a place to step back from, not a mistake."""
