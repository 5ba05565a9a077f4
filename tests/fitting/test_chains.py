"""Chains and fields are refused in a plate of their elements, and fitted as one unit, as the message writes them."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import laplace_amort
from laplace_amort import LaplaceAmortError, fit

COUNTS = torch.tensor([3.0, 2.0, 4.0, 6.0, 5.0, 9.0, 7.0, 4.0, 5.0, 2.0, 1.0, 2.0], dtype=torch.float64)
TIMES = torch.arange(12, dtype=torch.float64)
COVARIANCE = (-((TIMES[:, None] - TIMES) ** 2) / 8).exp() + 0.01 * torch.eye(12, dtype=torch.float64)


def chain_in_a_plate(data):
    sd = pyro.sample("sd", dist.LogNormal(-1.0, 1.0))
    with pyro.plate("times", len(data)):
        x = pyro.sample("x", dist.Normal(0.0, 3.0))
        pyro.sample("data", dist.Poisson(x.exp()), obs=data)
    pyro.factor("walk", dist.Normal(x[..., :-1], sd).log_prob(x[..., 1:]).sum(-1))


def chain_in_a_loop(data):
    sd, x = pyro.sample("sd", dist.LogNormal(-1.0, 1.0)), torch.tensor(0.0)
    for t in pyro.markov(range(len(data))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, sd))
        pyro.sample(f"data_{t}", dist.Poisson(x.exp()), obs=data[t])


def field(data):
    values = pyro.sample("field", dist.MultivariateNormal(torch.zeros(12), COVARIANCE))
    pyro.sample("data", dist.Poisson(values.exp()).to_event(1), obs=data)


REFUSED = {"plate": chain_in_a_plate, "loop": chain_in_a_loop, "field": field}


def refusal(model):
    with pytest.raises(LaplaceAmortError, match="is one unit in a plate of size 1") as caught:
        fit(model, COUNTS, progress=False)
    return [line[4:] for line in str(caught.value).splitlines() if line.startswith("    ")]


def lines_of_one_unit(model):
    lines = refusal(model)
    begin = lines.index("with pyro.plate('one', 1):")
    end = next(i for i, line in enumerate(lines) if line.startswith("fit("))
    return lines[begin:end], lines[end]


@pytest.mark.parametrize("name", REFUSED)
def test_a_chain_as_the_message_writes_it(name):
    lines, call = lines_of_one_unit(REFUSED[name])

    def model(data):
        sd = pyro.sample("sd", dist.LogNormal(-1.0, 1.0))
        exec("\n".join(lines), {"pyro": pyro, "dist": dist, "sd": sd, "data": data})

    names = {name: getattr(laplace_amort, name) for name in laplace_amort.__all__}
    result = eval(call, {**names, "model": model, "args": (COUNTS,)})
    assert result.status.ok
    assert result.optima[0].globals_["sd"].isfinite()


def test_a_field_as_the_message_writes_it():
    lines, call = lines_of_one_unit(field)
    (line,) = [line.partition("of a field: ")[2] for line in lines if "of a field: " in line]

    def model(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("one", 1):
            names = {"mean": mu.unsqueeze(-1) * torch.ones(12), "covariance": COVARIANCE}
            values = eval(line, {"pyro": pyro, "dist": dist, **names})
            pyro.sample("data", dist.Poisson(values.exp()).to_event(1), obs=data)

    names = {name: getattr(laplace_amort, name) for name in laplace_amort.__all__}
    assert eval(call, {**names, "model": model, "args": (COUNTS,)}).status.ok


@pytest.mark.parametrize(("name", "number"), [("plate", 12), ("loop", 12), ("field", 12)])
def test_what_it_costs_is_said(name, number):
    with pytest.raises(LaplaceAmortError, match=f"a dense matrix of its {number} elements in every step"):
        fit(REFUSED[name], COUNTS, progress=False)
