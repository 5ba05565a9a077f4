"""What the ``test_pyro_*.py`` files share: a model with two guides, gradients by Pyro and by hand, recorders.

The expression is built by hand from the log densities in the traces and differentiated apart; Pyro's own gradient must
equal that. Nothing here is stochastic: both sides see the same draws.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim

ELBOS = (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO)
DATA = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def model(num_units=3, subsample_size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("units", num_units, subsample_size=subsample_size):
        y = pyro.sample("y", dist.Normal(mu, 1.5))
        pyro.sample("z", dist.Normal(y, 0.5), obs=DATA)


def guide(num_units=3, subsample_size=None, rsample=True):
    loc = pyro.param("loc", lambda: torch.tensor([0.3, -0.2, 0.1, 0.7]))
    scale = pyro.param("log_scale", lambda: torch.tensor([-0.3, 0.2, -0.1, 0.4])).exp()
    pyro.sample("mu", dist.Normal(loc[0], scale[0]).has_rsample_(rsample))
    with pyro.plate("units", num_units, subsample_size=subsample_size):
        pyro.sample("y", dist.Normal(loc[1:], scale[1:]).has_rsample_(rsample))


def score_guide():
    guide(rsample=False)


def leaves():
    return dict(pyro.get_param_store().named_parameters())


def pyro_gradient(elbo, model_fn, guide_fn, seed=1):
    """The loss that Pyro returns and what its backward leaves in ``.grad``; with no seed, for the next draws."""
    if seed is not None:
        pyro.set_rng_seed(seed)
    for leaf in leaves().values():
        leaf.grad = None
    loss = elbo.loss_and_grads(model_fn, guide_fn)
    return loss, {name: leaf.grad for name, leaf in leaves().items()}


def first_traces(elbo, model_fn, guide_fn, seed=1):
    pyro.set_rng_seed(seed)
    return next(elbo._get_traces(model_fn, guide_fn, (), {}))


def by_hand(surrogate):
    gradients = torch.autograd.grad(surrogate, list(leaves().values()), retain_graph=True, allow_unused=True)
    return dict(zip(leaves(), gradients, strict=True))


def sample_sites(trace):
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def minus_elbo(model_trace, guide_trace):
    return guide_trace.log_prob_sum() - model_trace.log_prob_sum()


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def assert_differ(actual, expected):
    assert any((actual[name] - expected[name]).abs().max() > 1e-3 for name in actual)


class Recorder(PyroOptim):
    """An optimizer that writes down every gradient it is shown."""

    def __init__(self, lr=0.0):
        super().__init__(torch.optim.SGD, {"lr": lr})
        self.seen, self.kept = [], []

    def __call__(self, params, *args, **kwargs):
        names = {pyro.get_param_store().param_name(leaf): leaf for leaf in params}
        self.kept.append({name: leaf.grad for name, leaf in names.items()})
        self.seen.append({name: None if leaf.grad is None else leaf.grad.clone() for name, leaf in names.items()})
        super().__call__(params, *args, **kwargs)


def backward_events(monkeypatch):
    """A list that gains ``("backward", retain_graph)`` at every call of ``Tensor.backward``; make it a fixture."""
    log, original = [], torch.Tensor.backward

    def backward(self, gradient=None, retain_graph=None, **kwargs):
        log.append(("backward", retain_graph))
        return original(self, gradient, retain_graph, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return log
