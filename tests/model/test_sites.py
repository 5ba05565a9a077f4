"""What distributions are without their wrappers, and what elements of sites are called."""

import itertools

import pyro.distributions as dist
import pytest
import torch

from laplace_amort.model.sites import undressed
from laplace_amort.types import element_names

PLAIN = dist.Normal(torch.zeros(3), 1.0)
WRAPPERS = {
    "to_event": lambda fn: fn.to_event(len(fn.batch_shape)),
    "mask": lambda fn: fn.mask(False),
    "expand": lambda fn: dist.ExpandedDistribution(fn, (2, *fn.batch_shape)),
}


@pytest.mark.parametrize("order", list(itertools.permutations(WRAPPERS)))
def test_wrappers_are_undone_in_any_order(order):
    fn = PLAIN
    for name in order:
        fn = WRAPPERS[name](fn)
    assert undressed(fn) is PLAIN


@pytest.mark.parametrize("fn", [PLAIN, dist.LogNormal(0.0, 1.0), dist.Delta(torch.zeros(2))])
def test_what_has_no_wrapper_is_left(fn):
    """The base of a transformed distribution is another distribution."""
    assert undressed(fn) is fn


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)])
def test_elements_are_named_in_the_order_in_which_they_are_stored(shape):
    names = element_names("B", shape)
    value = torch.arange(torch.Size(shape).numel()).reshape(shape)
    assert len(names) == value.numel()
    for position, name in enumerate(names):
        index = tuple(int(part) for part in name[2:-1].split(",") if part)
        assert value[index] == position
