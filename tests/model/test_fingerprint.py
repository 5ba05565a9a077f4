"""What of a call is seen, and that looking at it neither takes long nor changes anything."""

import math

import numpy
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from laplace_amort.model import Fingerprint


def model(*args, **kwargs):
    pass


def same(first, second):
    return Fingerprint(model, first, {}).matches(Fingerprint(model, second, {}))


TENSOR, ARRAY = torch.zeros(3), numpy.zeros(3)


@pytest.mark.parametrize(
    "args", [(), (1, 0.5, "a", None, True), (math.nan,), (TENSOR,), ({"a": [TENSOR, (1, 2)]},), (ARRAY,), (torch.sin,)]
)
def test_the_same_is_the_same(args):
    assert same(args, args)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1,), (1.0,)),
        ((1,), (True,)),
        ((1, 2), ((1, 2),)),
        (([1],), ((1,),)),
        ((TENSOR,), (TENSOR.clone(),)),
        ((ARRAY,), (ARRAY + 1,)),
        (({"a": 1},), ({"b": 1},)),
    ],
)
def test_the_other_is_another(first, second):
    assert not same(first, second)


@pytest.mark.parametrize(
    "argument", [object(), iter([]), numpy.zeros(20_000), [0.0] * 5000, {1, 2}, numpy.array([[]], object)]
)
def test_what_may_change_unseen_is_never_the_same(argument):
    assert not same((argument,), (argument,))


def test_writing_is_seen_and_other_memory_is():
    for write in (lambda x: x.add_(1), lambda x: x[0].fill_(1), lambda x: setattr(x, "data", torch.ones(3))):
        tensor = torch.zeros(3)
        before = Fingerprint(model, (tensor,), {})
        write(tensor)
        assert not before.matches(Fingerprint(model, (tensor,), {}))


def test_what_is_gone_is_not_the_same():
    before = Fingerprint(model, (torch.zeros(3),), {})
    assert not before.matches(before)


def test_parameters_move_and_stay_the_same():
    parameter = torch.zeros(3, requires_grad=True)
    before = Fingerprint(model, (parameter,), {})
    with torch.no_grad():
        parameter.add_(1)
    assert before.matches(Fingerprint(model, (parameter,), {}))


def test_inference_tensors_are_never_the_same():
    with torch.inference_mode():
        tensor = torch.zeros(3)
    assert not same((tensor,), (tensor,))


def test_things_that_hold_each_other_end():
    first = {}
    first["self"] = first

    def around():
        return first, around

    assert Fingerprint(around, (), {}).matches(Fingerprint(around, (), {}))
    assert not Fingerprint(model, (first,), {}).complete


def test_a_guide_around_the_model_does_not_count():
    guide = AutoNormal(model)

    def around():
        return guide

    before = Fingerprint(around, (), {})
    guide.register_buffer("more", torch.zeros(2))
    assert before.matches(Fingerprint(around, (), {}))


class Settings:
    scale = 1.0

    @property
    def doubled(self):
        raise AssertionError("properties are not asked")


def test_attributes_of_objects_and_classes_are_seen_and_properties_are_not_asked():
    settings = Settings()

    def around():
        return settings.scale, settings.doubled

    before = Fingerprint(around, (), {})
    assert before.matches(Fingerprint(around, (), {}))
    settings.scale = 2.0
    assert not before.matches(Fingerprint(around, (), {}))


def test_conditioned_data_are_seen():
    data = {"z": torch.zeros(2)}
    conditioned = pyro.poutine.condition(model, data=data)
    before = Fingerprint(conditioned, (), {})
    assert before.matches(Fingerprint(conditioned, (), {}))
    data["z"] = torch.ones(2)
    assert not before.matches(Fingerprint(conditioned, (), {}))


def test_another_default_dtype_is_another_call():
    before, kind = Fingerprint(model, (), {}), torch.get_default_dtype()
    other = torch.float32 if kind == torch.float64 else torch.float64
    try:
        torch.set_default_dtype(other)
        assert not before.matches(Fingerprint(model, (), {}))
    finally:
        torch.set_default_dtype(kind)
