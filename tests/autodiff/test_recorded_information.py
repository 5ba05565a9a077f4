"""Recorded derivatives are those by passes back, with their own derivatives; what would not be is refused."""

import pytest
import torch

from laplace_amort.autodiff import arrowhead_information, record, record_information
from laplace_amort.autodiff.information import first_derivatives
from laplace_amort.errors import InformationError, RecordingError

T = torch.tensor([0.3, -0.2], dtype=torch.float64)
Y = torch.tensor([[0.5, -0.3], [1.0, 0.2], [-0.4, 0.1]], dtype=torch.float64)
DATA = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64)


def poisson(t, y):
    rates = y.sum(-1)
    prior = -((y - t[0]) ** 2 * torch.exp(-2 * t[1])).sum() / 2 - t[1] * y.numel() - (t**2).sum() / 8
    return prior + (DATA * rates - rates.exp()).sum()


def saved_results(t, y):
    """Operations of which torch saves the result, detached: a second derivative hangs on it."""
    return (t[0] * y.tanh()).sum() + (y.sigmoid() * t[1].exp()).sum() - (y**2 + 1).sqrt().sum() - (t**2).sum()


def detached(t, y):
    """The log joint itself detaches: that is no identity."""
    return -((y - t[0]) ** 2 * y.exp().detach()).sum() - (t**2).sum() + (t[1] * y**3).sum()


def linear_in_units(t, y):
    return (t.sum() * y).sum() - (t**4).sum()


def without_border(t, y):
    return -(t**4).sum() - y.cosh().sum()


FUNCTIONS = [poisson, saved_results, detached, linear_in_units, without_border]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_recorded_derivatives_are_those_by_passes_back(function):
    recording = record(function, T, Y)
    information = record_information(recording, T, Y)
    at = [(value + 0.1).requires_grad_() for value in (T, Y)]
    slopes = first_derivatives(function, *at)
    gradient, tail = information.look(*at)
    torch.testing.assert_close(gradient, slopes.in_local, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(information.gradient(*at), slopes.in_local, rtol=1e-12, atol=1e-12)
    blocks = slopes.blocks()
    torch.testing.assert_close(tail, blocks.tail, rtol=1e-12, atol=1e-12)
    for one, other in zip(information.blocks(*at), blocks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert one.shape == other.shape
    for name in ("head", "tail"):
        block = getattr(information.blocks(*at), name)
        assert torch.equal(block, block.mT)


@pytest.mark.parametrize("function", [poisson, saved_results, without_border])
def test_their_derivatives_are_exact(function):
    information = record_information(record(function, T, Y), T, Y)
    at = [value.clone().requires_grad_() for value in (T, Y)]
    assert torch.autograd.gradcheck(lambda *at: tuple(information.blocks(*at)), at)
    assert torch.autograd.gradcheck(information.gradient, at)


def test_what_passes_back_would_cost_is_gone():
    """Seeds of zeros and ones take no operations."""
    information = record_information(record(poisson, T, Y), T, Y)
    names = [str(node.target) for node in information._look.graph.nodes if node.op == "call_function"]
    assert names.count("aten.mul.Tensor") <= 6
    assert not {"aten.ones_like.default", "aten.zeros_like.default", "aten.clone.default"} & set(names)


def test_information_uses_them_and_refuses_what_is_not_finite():
    recording = record(poisson, T, Y)
    recording.information = record_information(recording, T, Y)
    for one, other in zip(arrowhead_information(recording, T, Y), arrowhead_information(poisson, T, Y), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with pytest.raises(InformationError, match="with respect to argument"):
        arrowhead_information(recording, T, Y + 800)
    with pytest.raises(InformationError, match="argument 'global_' is nan"):
        arrowhead_information(recording, T * torch.nan, Y)


def test_parameters_are_read_in_every_call():
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    recording = record(lambda t, y: -(scale * (y - t[0]) ** 2).sum() - (t**2).sum(), T, Y)
    information = record_information(recording, T, Y)
    with torch.no_grad():
        scale.fill_(3.0)
    tail = information.blocks(T, Y).tail
    torch.testing.assert_close(tail, 6 * torch.eye(2, dtype=torch.float64).expand(3, -1, -1))
    (slope,) = torch.autograd.grad(tail.sum(), scale)
    assert slope.item() == pytest.approx(12.0)


def test_many_passes_are_not_recorded():
    recording = record(lambda t, y: -(t**2).sum() - y.cosh().sum(), torch.zeros(20), torch.zeros(3, 1))
    with pytest.raises(RecordingError, match="21 passes are more than are recorded"):
        record_information(recording, torch.zeros(20), torch.zeros(3, 1))


def test_wrong_derivatives_are_refused(monkeypatch):
    """Planted: every detaching is taken for torch's own."""
    from laplace_amort.autodiff.recorded_information import _Interpreter

    recording = record(detached, T, Y)
    monkeypatch.setattr(_Interpreter, "call_function", lambda self, target, args, kwargs: target(*args, **kwargs))
    with pytest.raises(RecordingError, match="not those of the recorded model"):
        record_information(recording, T, Y)
