"""Values and gradients at many draws: in chunks, draw by draw, and by plain autograd, all the same."""

import pytest
import torch
from helpers.models import normals
from helpers.strategies import standard_normal
from helpers.unit_models import UNIT_MODELS

from laplace_amort import AutoLaplaceFamily
from laplace_amort.autodiff import batching
from laplace_amort.autodiff.batching import values_and_gradients
from laplace_amort.autodiff.recording import Recording, record

NAMES = ["normal", "binomial_slopes", "categorical_probs", "with_params", "module", "without_globals", "non_centered"]
DRAWS = 7
CHUNKS = [1, 2, 3, DRAWS, 100]  # draws in each


class Problem:
    """A model, live and recorded, draws around a point, and the leaves of the model."""

    def __init__(self, name):
        case = UNIT_MODELS[name]()
        guide = AutoLaplaceFamily(case.model, unit_plate=case.unit_plate)
        self.live = guide.unit_model(*case.args, **case.kwargs)
        self.global_ = 0.3 * normals(DRAWS, case.global_dim)
        self.local = 0.3 * normals(DRAWS, case.num_units, case.local_dim, seed=1)
        self.recorded = self.live.recorded(self.global_[0], self.local[0])
        self.parameters = list(self.live.density.parameters().values())

    def gradients(self, model, parameters="all"):
        return values_and_gradients(
            model, self.global_, self.local, self.parameters if parameters == "all" else parameters
        )

    def by_autograd(self):
        """One draw after another, with nothing of the room under test."""
        found = []
        for global_, local in zip(self.global_, self.local, strict=True):
            leaves = [global_.clone().requires_grad_(), local.clone().requires_grad_(), *self.parameters]
            value = self.live.log_joint(*leaves[:2])
            found.append([value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)])
        values, in_global, in_local, *rest = zip(*found, strict=True)
        return [*map(torch.stack, (values, in_global, in_local)), *(torch.stack(part).sum(0) for part in rest)]


def flat(found):
    return [*found[:3], *found.in_parameters]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def set_chunk(monkeypatch, problem, draws):
    monkeypatch.setattr(batching, "_CHUNK_BYTES", draws * problem.recorded.recording.num_bytes)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_live_and_plain_autograd_agree(name, monkeypatch):
    problem = Problem(name)
    expected = problem.by_autograd()
    assert expected[2].abs().max() > 0.1
    assert_same(flat(problem.gradients(problem.live)), expected)
    for draws in CHUNKS:
        set_chunk(monkeypatch, problem, draws)
        assert_same(flat(problem.gradients(problem.recorded)), expected)


@pytest.mark.parametrize("name", ["with_params", "module"])
def test_parameters_of_the_model(name):
    """Their gradient is that of the sum over draws, at their present values; those given are those differentiated."""
    problem = Problem(name)
    assert problem.parameters
    for model in (problem.live, problem.recorded):
        expected = problem.by_autograd()
        found = problem.gradients(model)
        assert [part.shape for part in found.in_parameters] == [leaf.shape for leaf in problem.parameters]
        assert all(part.abs().max() > 1e-3 for part in found.in_parameters)
        assert_same(flat(problem.gradients(model, parameters=problem.parameters[:1])), expected[:4])
        assert problem.gradients(model, parameters=[]).in_parameters == []
        with torch.no_grad():
            for leaf in problem.parameters:
                leaf -= 0.2
        assert_same(flat(problem.gradients(model)), problem.by_autograd())
        assert (problem.gradients(model).values - found.values).abs().max() > 1e-3
    assert all(leaf.grad is None for leaf in problem.parameters)


def test_a_parameter_that_is_not_used_has_a_gradient_of_zero():
    problem = Problem("normal")
    other = torch.ones(2, 3, requires_grad=True)
    for model in (problem.live, problem.recorded):
        (gradient,) = problem.gradients(model, parameters=[other]).in_parameters
        assert torch.equal(gradient, torch.zeros(2, 3))


@pytest.mark.parametrize("how", ["live", "recorded"])
def test_values_alone(how):
    problem = Problem("with_params")
    model = getattr(problem, how)
    found = problem.gradients(model, parameters=None)
    torch.testing.assert_close(found.values, problem.by_autograd()[0], rtol=1e-12, atol=1e-12)
    assert found.in_global.numel() == found.in_local.numel() == len(found.in_parameters) == 0


@pytest.mark.parametrize("how", ["live", "recorded"])
@pytest.mark.parametrize("enabled", [True, False])
def test_no_graph_is_left_and_none_is_needed(how, enabled):
    problem = Problem("with_params")
    global_, local = problem.global_.clone().requires_grad_(), problem.local.clone().requires_grad_()
    for parameters in (problem.parameters, None):
        with torch.set_grad_enabled(enabled):
            found = values_and_gradients(getattr(problem, how), global_, local, parameters)
        assert not any(part.requires_grad for part in flat(found))
    assert global_.grad is None


class Counting(Recording):
    """A recording that knows how many draws it was asked for at a time."""

    def __init__(self, recording):
        super().__init__(recording.operations, recording.num_bytes)
        self.sizes = []

    def __call__(self, global_, local):
        self.sizes.append(torch._C._functorch.get_unwrapped(global_).shape[0])
        return super().__call__(global_, local)


@pytest.mark.parametrize(
    ("num_bytes", "sizes"), [(0.5, [1] * 7), (1, [1] * 7), (2.9, [2, 2, 2, 1]), (4, [4, 3]), (7, [7]), (1e6, [7])]
)
def test_chunks_fit_into_memory(num_bytes, sizes, monkeypatch):
    """As many draws at a time as fit, never fewer than one."""
    problem = Problem("normal")
    problem.recorded.recording = counting = Counting(problem.recorded.recording)
    monkeypatch.setattr(batching, "_CHUNK_BYTES", int(num_bytes * counting.num_bytes))
    problem.gradients(problem.recorded)
    assert counting.sizes == sizes


def test_a_recording_without_results_is_one_chunk():
    """Nothing but views of the argument: it takes no memory."""

    class Model:
        recording = many = record(lambda theta, y: y[0, 0], torch.zeros(1), torch.zeros(2, 1))

    assert Model.recording.num_bytes == 0
    found = values_and_gradients(Model(), torch.zeros(3, 1), standard_normal(3, 2, 1, seed=0), [])
    assert torch.equal(found.in_local, torch.tensor([[1.0], [0.0]]).expand(3, 2, 1))


def test_float32():
    torch.set_default_dtype(torch.float32)
    problem = Problem("normal")
    found = problem.gradients(problem.recorded)
    assert all(part.dtype == torch.float32 for part in flat(found))
    for one, other in zip(flat(found), problem.by_autograd(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- planted bugs


def test_a_lost_chunk_is_found(monkeypatch):
    """Planted: gradients in parameters are those of the last chunk, and not of the sum over all."""
    problem = Problem("with_params")
    set_chunk(monkeypatch, problem, 2)
    expected = problem.by_autograd()
    stack = torch.stack
    monkeypatch.setattr(batching.torch, "stack", lambda column: stack(column[-1:]))
    found = problem.gradients(problem.recorded)
    monkeypatch.undo()
    assert_same(found[:3], expected[:3])
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(found.in_parameters, expected[3:], strict=True))
