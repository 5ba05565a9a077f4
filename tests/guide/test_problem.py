"""What a problem refuses and names, of models that take only some of their units and have globals of several shapes."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints, transforms

from laplace_amort import AutoLaplaceFamily
from laplace_amort.errors import ModelError
from laplace_amort.guide import Problem
from laplace_amort.guide.gaussian import is_exponential

Z = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


def model(units=None, items=None):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    weights = pyro.sample("B", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("units", 4, subsample_size=units, dim=-1) as index:
        y = pyro.sample("y", dist.Normal(weights.sum() + shares[0], tau))
        with pyro.plate("items", 5, subsample_size=items, dim=-2):
            pyro.sample("z", dist.Normal(y, 1.0), obs=Z[index].expand(items or 5, -1))


def problem_of(**kwargs):
    pyro.clear_param_store()
    return Problem(AutoLaplaceFamily(model, unit_plate="units"), (), kwargs)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [({"units": 2}, "2 of 4 units of plate 'units'"), ({"items": 3}, "3 of 5 elements of plate 'items'")],
)
def test_a_minibatch_is_refused_with_its_sizes_and_the_line_to_type(sizes, said):
    message = f"the model takes {said} at a time, and this needs all of them:\n    do_that()"
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        problem_of(**sizes).refuse_minibatch("and this needs all of them:\n    do_that()")


def test_all_units_are_no_minibatch():
    problem_of().refuse_minibatch("and this needs all of them")


def test_globals_are_named_by_element_in_the_order_of_the_vector():
    problem = problem_of()
    assert problem.global_elements() == ["tau", "B[0, 0]", "B[0, 1]", "shares[0]", "shares[1]"]
    assert len(problem.global_elements()) == len(problem.loc)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (biject_to(constraints.positive), True),
        (biject_to(constraints.independent(constraints.positive, 1)), True),
        (biject_to(constraints.greater_than(2.0)), True),
        (biject_to(constraints.real), False),
        (biject_to(constraints.unit_interval), False),
        (transforms.SoftplusTransform(), False),
        (None, False),
    ],
)
def test_which_coordinates_are_logarithms(transform, expected):
    assert is_exponential(transform) is expected
