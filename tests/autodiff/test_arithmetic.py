"""Functions in double precision whatever their tensors are, and what they are told that cannot be in it."""

import copy
import pickle

import numpy
import pytest
import torch
from torch import nn

from laplace_amort.autodiff import AsWritten, InDouble, narrowed

TENTH = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float32)
EXACT = TENTH.double()
WEIGHT = torch.eye(3, dtype=torch.float32)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32) * 2


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.to(torch.float32) * 2

    @staticmethod
    def setup_context(ctx, inputs, output): ...

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


SAME = {
    "an operator": (lambda c: c * 3.0, lambda c: c * 3.0),
    "a function of a list": (lambda c: torch.cat([c, c]), lambda c: torch.cat([c, c])),
    "a product of matrices": (lambda c: WEIGHT @ c, lambda c: WEIGHT.double() @ c),
    "a function of nn": (lambda c: nn.functional.softmax(c, 0), lambda c: nn.functional.softmax(c, 0)),
    "a cast by name": (lambda c: c.to(torch.float32).exp(), lambda c: c.exp()),
    "a cast by keyword": (lambda c: c.to(dtype=torch.float32).exp(), lambda c: c.exp()),
    "a cast by method": (lambda c: c.float().half().bfloat16().exp(), lambda c: c.exp()),
    "a cast to that of another": (lambda c: c.type_as(WEIGHT).exp(), lambda c: c.exp()),
    "a cast by the name of a type": (lambda c: c.type("torch.FloatTensor").exp(), lambda c: c.exp()),
    "a function with a gradient of its own": (lambda c: Doubled.apply(c), lambda c: c * 2),
    "a constant made inside": (lambda c: c + torch.tensor(0.7), lambda c: c + 0.7),
    "a constant of a dtype": (
        lambda c: c + torch.full((3,), 0.7, dtype=torch.float32),
        lambda c: c + 0.7,
    ),
    "a constant like another": (lambda c: c + WEIGHT.new_tensor([0.7]), lambda c: c + 0.7),
    "its own rounding error": (
        lambda c: c + torch.finfo(c.dtype).eps,
        lambda c: c + torch.finfo(torch.float64).eps,
    ),
    "NumPy": (lambda c: torch.as_tensor(c.numpy() * 3), lambda c: c * 3),
    "an array": (lambda c: torch.as_tensor(numpy.asarray(c)).exp(), lambda c: c.exp()),
    "a part that is written to": (_written := lambda c: _write(c), _written),
    "numbers at random": (
        lambda c: c + torch.randn(3, generator=torch.Generator().manual_seed(0)),
        lambda c: c + torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    ),
}


def _write(c):
    found = torch.zeros(3)
    found[1:] = c[:2]
    found += 1
    return found


@pytest.fixture(autouse=True)
def _torch_as_it_comes():
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", SAME)
def test_what_is_computed_is_what_exact_numbers_give(name):
    function, exact = SAME[name]
    with InDouble():
        found = function(TENTH)
    torch.set_default_dtype(torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact(EXACT), rtol=1e-15, atol=1e-15)


def test_arguments_are_converted_in_lists_and_dictionaries_and_nothing_else():
    index, mask = torch.tensor([1]), torch.tensor([True])
    found = InDouble().of((TENTH, {"a": [TENTH.half(), index]}, mask, "text", None))
    assert found[0].dtype == found[1]["a"][0].dtype == torch.float64
    assert found[1]["a"][1] is index
    assert found[2] is mask
    assert found[3:] == ("text", None)


def test_a_leaf_has_a_twin_that_gets_the_gradient():
    leaf = torch.ones(3, requires_grad=True)
    twin = torch.full((3,), 1 + 1e-12, dtype=torch.float64, requires_grad=True)
    with InDouble([(leaf, twin)]):
        value = (leaf * TENTH).sum()
    (gradient,) = torch.autograd.grad(value, twin)
    assert torch.equal(gradient, EXACT)
    assert value.dtype == torch.float64
    assert torch.equal(value, (twin * EXACT).sum())


def test_data_that_change_in_place_are_converted_again():
    data, double = torch.ones(3), InDouble()
    with double:
        before = data * 1
    data.mul_(2)
    with double:
        assert torch.equal(data * 1, 2 * before)


def test_what_is_outside_is_written_to_as_it_is():
    memory = torch.zeros(3)
    with InDouble():
        memory += TENTH
        memory[0] = 5.0
    assert memory.dtype == torch.float32
    assert memory.tolist()[0] == 5.0


def test_inside_itself_it_is_the_same_and_ends_once(monkeypatch):
    double = InDouble()
    with double:
        with double:
            assert (TENTH * 1).dtype == torch.float64
        assert (TENTH * 1).dtype == torch.get_default_dtype() == torch.float64
    assert (TENTH * 1).dtype == torch.get_default_dtype() == torch.float32
    with pytest.raises(ZeroDivisionError), double:
        _ = 1 / 0
    assert (TENTH * 1).dtype == torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_has_the_twins_of_copied_leaves(copied):
    leaf, twin = torch.ones(1), torch.full((1,), 2.0, dtype=torch.float64)
    other = copied(InDouble([(leaf, twin)]))
    ((leaf, _),) = other.leaves
    with other:
        assert float(leaf * 1) == 2.0


def test_under_inference_mode_nothing_is_kept_that_a_graph_could_not_hold():
    double, y = InDouble(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode(), double:
        _ = TENTH * 1
    with double:
        (y * TENTH).sum().backward()
    assert torch.equal(y.grad, EXACT)


def test_as_written_changes_nothing():
    with AsWritten() as none:
        assert none is None
        assert (TENTH * 1).dtype == torch.float32
    assert AsWritten().of(TENTH) is TENTH


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda: EXACT.exp(), ""),
        (lambda: TENTH.exp() + EXACT, ""),
        (lambda: EXACT > 0, ""),
        (lambda: EXACT.float(), "aten._to_copy.default"),
        (lambda: torch.zeros(3).copy_(EXACT), "aten.copy_.default"),
        (lambda: scripted(EXACT), "aten._to_copy.default"),
    ],
)
def test_what_loses_digits_is_seen(function, said):
    found, operation = narrowed(function)
    assert operation == said
    assert isinstance(found, torch.Tensor)


def test_what_is_scripted_is_seen_inside_too():
    with InDouble():
        _, operation = narrowed(lambda: scripted(EXACT))
        assert operation == "aten._to_copy.default"
        _, operation = narrowed(lambda: scripted(EXACT))  # when it has been optimized
        assert operation == "aten._to_copy.default"
