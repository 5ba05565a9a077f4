"""The next modes are guessed from the last ones and their derivative."""

import copy

import torch

from laplace_amort.guide.warm_start import WarmStart


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_linear_modes_are_known_everywhere_after_one_look():
    base, regression, theta = random(5, 2), random(5, 2, 3, seed=1), random(3, seed=2)
    warm_start = WarmStart(torch.zeros(5, 2), global_dim=3)
    warm_start.remember(torch.arange(5), theta, base - regression @ theta, regression)
    elsewhere = random(3, seed=3)
    torch.testing.assert_close(warm_start.at(torch.arange(5), elsewhere), base - regression @ elsewhere)


def test_units_of_a_minibatch_are_remembered_and_the_others_kept():
    start = random(4, 1)
    warm_start = WarmStart(start, global_dim=1)
    units, theta = torch.tensor([2, 0]), torch.tensor([0.5])
    warm_start.remember(units, theta, torch.tensor([[1.0], [2.0]]), torch.ones(2, 1, 1))
    assert torch.equal(warm_start.at(units, theta), torch.tensor([[1.0], [2.0]]))
    assert torch.equal(warm_start.at(torch.tensor([1, 3]), theta), start[[1, 3]])
    assert torch.equal(warm_start.at(torch.tensor([2]), theta + 0.25), torch.tensor([[0.75]]))


def test_it_has_no_graph_no_parameters_and_no_state():
    warm_start = WarmStart(torch.zeros(3, 1).requires_grad_(), global_dim=2)
    theta = torch.ones(2, requires_grad=True)
    warm_start.remember(torch.arange(3), theta, theta.sum().expand(3, 1), theta.expand(3, 1, 2))
    assert not warm_start.at(torch.arange(3), theta).requires_grad
    assert list(warm_start.parameters()) == []
    assert warm_start.state_dict() == {}
    assert torch.equal(copy.deepcopy(warm_start).slope, warm_start.slope)


def test_other_units_start_at_the_average():
    warm_start = WarmStart(torch.tensor([[1.0], [3.0]]), global_dim=1)
    warm_start.remember(
        torch.tensor([0, 1]), torch.zeros(1), torch.tensor([[1.0], [3.0]]), torch.tensor([[[2.0]], [[4.0]]])
    )
    other = warm_start.resized(3)
    assert torch.equal(other.at(torch.arange(3), torch.tensor([0.5])), torch.full((3, 1), 2.0 - 3.0 * 0.5))
    other.remember(torch.tensor([1]), torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, 1, 1))
    assert other.at(torch.arange(3), torch.zeros(1)).flatten().tolist() == [2.0, 0.0, 2.0]


def test_without_globals():
    warm_start = WarmStart(torch.ones(2, 1), global_dim=0)
    warm_start.remember(torch.tensor([0]), torch.zeros(0), torch.zeros(1, 1), torch.zeros(1, 1, 0))
    assert warm_start.at(torch.arange(2), torch.zeros(0)).flatten().tolist() == [0.0, 1.0]
