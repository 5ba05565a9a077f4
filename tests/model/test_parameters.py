"""Parameters that an objective refuses: the lines that make latents of them have the right support and shape."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from laplace_amort import MarginalLaplace, ModelError, fit

Z = torch.tensor([1.0, 3.0, -0.5, 2.0, 0.3, -1.0], dtype=torch.float64)
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)


def refused(model, *args):
    """The lines of the message, without the one that takes the ELBO."""
    with pytest.raises(ModelError, match=r"is a parameter\. Give it a prior") as caught:
        fit(model, *args, objective=MarginalLaplace(), progress=False)
    *lines, elbo = [line[4:] for line in str(caught.value).splitlines() if line.startswith("    ")]
    assert elbo == "fit(model, *args, objective=FixedDrawELBO())"
    return lines


def fitted(model, *args):
    return fit(model, *args, objective=MarginalLaplace(), check=False, progress=False)


# What a parameter is, and what its line must name.
SITES = {
    "real": (torch.tensor(0.5), constraints.real, "constraints.real, (), ()"),
    "vector": (torch.zeros(3), constraints.real, "constraints.real, (), (3,)"),
    "positive": (torch.tensor(1.0), constraints.positive, "constraints.positive, (), ()"),
    "matrix": (torch.ones(2, 2), constraints.positive, "constraints.positive, (), (2, 2)"),
    "above": (torch.tensor(3.0), constraints.greater_than(2.0), "constraints.greater_than(2.0), (), ()"),
    "interval": (torch.ones(2), constraints.interval(0.0, 5.0), "constraints.interval(0.0, 5.0), (), (2,)"),
    "unit interval": (torch.tensor(0.3), constraints.unit_interval, "constraints.interval(0.0, 1.0), (), ()"),
    "simplex": (torch.ones(3) / 3, constraints.simplex, "constraints.simplex, (), (3,)"),
    "ordered": (torch.arange(3.0), constraints.ordered_vector, "constraints.ordered_vector, (), (3,)"),
    "correlations": (torch.eye(2), constraints.corr_cholesky, "constraints.corr_cholesky, (), (2, 2)"),
}


@pytest.mark.parametrize("name", SITES)
def test_prior_of_a_param(name):
    value, support, said = SITES[name]

    def model(z, line=None):
        if line is None:
            theta = pyro.param("theta", value.double(), constraint=support)
        else:
            names = {"pyro": pyro, "dist": dist, "constraints": constraints}
            exec(line, names)
            theta = names["theta"]
        assert theta.shape[-value.dim() :] == value.shape or not value.dim()
        pyro.factor("weak", -(theta**2).sum() / 2)  # so that there is a maximum
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(theta.sum(), 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    (line,) = refused(model, Z)
    assert said in line
    result = fitted(model, Z, line)
    assert support.check(result.optima[0].globals_["theta"]).all()
    assert result.optima[0].globals_["theta"].shape == value.shape


def test_a_support_without_coordinates_has_no_line():
    def model(z):
        scale = pyro.param("scale", torch.eye(2), constraint=constraints.lower_cholesky)
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(0.0, scale[0, 0]))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    assert refused(model, Z) == []


class Regression(PyroModule):
    """A module that is the model."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.sd = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x, z):
        mean, sd = self.linear(x)[..., 0], self.sd
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mean, sd))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)


NAMES = {"PyroSample": PyroSample, "dist": dist, "constraints": constraints, "pyro": pyro}


def test_priors_of_a_module_that_is_the_model():
    model = Regression()
    shapes = {"linear.weight": (1, 2), "linear.bias": (1,), "sd": ()}
    for name in shapes:
        (line,) = refused(copy.deepcopy(model), X, Z)
        assert line.startswith(f"model.{name} = PyroSample(")
        exec(line, {**NAMES, "model": model})
        pyro.clear_param_store()
    result = fitted(model, X, Z)
    assert result.status.ok
    assert {name: tuple(value.shape) for name, value in result.optima[0].globals_.items()} == shapes
    assert result.optima[0].globals_["sd"] > 0


def test_priors_of_a_module_that_the_model_names():
    network = nn.Linear(2, 1)

    def registers(x, z):
        pyro.module("network", network)
        latents(x, z)

    def latents(x, z):
        mean = network(x)[..., 0]
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mean, 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    for name in ("weight", "bias"):
        *_, line = refused(registers, X, Z)
        assert (
            line
            == f"network.{name} = PyroSample(dist.Normal(0., 1.).expand({[1, 2] if name == 'weight' else [1]})"
            + (f".to_event({2 if name == 'weight' else 1}))")
        )
        pyro.clear_param_store()
        pyro.nn.module.to_pyro_module_(network)
        exec(line, {**NAMES, "network": network})
    assert fitted(latents, X, Z).status.ok
