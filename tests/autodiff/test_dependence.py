"""What a run looks at, and how much memory it takes."""

import pyro.distributions as dist
import pytest
import torch

from laplace_amort.autodiff import watched

A = torch.tensor([1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "looks"),
    [
        (lambda a: a.exp().sum(), False),
        (lambda a: a * 2 if bool((a > 0).all()) else a, True),
        (lambda a: a * float(a[0]), True),
        (lambda a: a * float(A[0] + 1), False),
        (lambda a: torch.zeros(2).copy_(a)[0].item(), True),
        (lambda a: a.detach().clone().tolist(), True),
        (lambda a: a * max(a.detach().numpy()), True),
        (lambda a: dist.Normal(0.0, a, validate_args=True).log_prob(a), False),
        (lambda a: torch.linalg.cholesky(torch.diag(a)), False),
    ],
)
def test_who_looks_at_the_value_of_an_argument(function, looks):
    assert bool(watched(function, A.clone()).looked) == looks


def test_memory_is_that_of_all_results():
    run = watched(lambda a: (a + 1) * 2, A.clone())
    assert run.num_bytes == 2 * A.numel() * 8
    assert torch.equal(run.result, (A + 1) * 2)


def test_what_follows_from_an_argument():
    """Also by operations that have no graph, such as comparisons."""
    run = watched(lambda a: [(a > 1.5).any(), a.detach() + 1, torch.ones(2), A * 2], A.clone())
    assert run.follows == [True, True, False, False]
