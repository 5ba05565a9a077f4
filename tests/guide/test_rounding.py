"""Rounding errors are measured, and flat latents found, in the models that have them."""

import functools

import pytest
import torch
from helpers.causes import (
    ANSWERS,
    COUNTS,
    HEIGHT,
    MASKED,
    YEAR,
    counts,
    crossed,
    hidden_data,
    hidden_prior,
    in_single,
)

from laplace_amort import AutoLaplaceFamily
from laplace_amort.guide.flat import find_flat_latent
from laplace_amort.guide.problem import Problem
from laplace_amort.guide.rounding import find_coarseness


def problem_of(model, *args):
    return Problem(AutoLaplaceFamily(model), args, {})


def test_float32_inside_of_a_model_is_measured():
    found = find_coarseness(problem_of(in_single, HEIGHT, YEAR))
    assert found is not None
    assert found.noise > 1e4 * found.expected


EXACT = {
    "the same in double": (functools.partial(in_single, number=torch.Tensor.double), HEIGHT, YEAR),
    "counts": (counts, COUNTS),
    "crossed": (crossed, ANSWERS),
}


@pytest.mark.parametrize("name", EXACT)
def test_rounding_errors_of_their_own_digits_are_none(name):
    assert find_coarseness(problem_of(*EXACT[name])) is None


def test_a_flat_latent_is_found():
    found = find_flat_latent(problem_of(hidden_prior, MASKED))
    assert (found.site, found.number, found.of) == ("u", 1, 20)
    assert "unit 3 of plate 'units'" in found.unit


@pytest.mark.parametrize("case", [(hidden_data, MASKED), (counts, COUNTS)])
def test_latents_with_a_prior_are_not_flat(case):
    assert find_flat_latent(problem_of(*case)) is None
