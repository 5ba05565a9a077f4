"""Models in torch's default precision and their twins in double, at the same data: one fit must be the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from helpers.fit_models import poisson_counts
from laplace_amort import AutoLaplaceFamily, Boost, ClosedFormMode, FreeMode, NewtonMode, fit

# Numbers that float32 holds as they are.
X = torch.tensor([0.1, -0.4, 1.3, 0.7, -1.1, 0.2, 0.9, -0.6], dtype=torch.float32)
Z = torch.tensor([1.1, -0.3, 2.2, 0.4, -0.9, 0.8, 1.7, -1.2], dtype=torch.float32)
COUNTS = poisson_counts(8).to(torch.float32)
UNIT = torch.arange(24) % 8
LONG = (Z.repeat(3) + 0.3 * torch.linspace(-1, 1, 24, dtype=torch.float32) ** 3).float()

Made = tuple[Callable[..., Any], tuple[Any, ...]]


def _globals() -> tuple[Tensor, Tensor]:
    return pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau", dist.LogNormal(0.0, 0.5))


def plain(dtype: torch.dtype) -> Made:
    def model(z):
        mu, tau = _globals()
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, tau))
            pyro.sample("z", dist.Normal(y, 0.7), obs=z)

    return model, (Z.to(dtype),)


def far_from_zero(dtype: torch.dtype) -> Made:
    """A covariate such as a calendar year, of which squares lose digits."""

    def model(year, z):
        slope, start = pyro.sample("slope", dist.Normal(0.0, 5.0)), pyro.sample("start", dist.Normal(0.0, 1e4))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("units", 8):
            y = pyro.sample("y", dist.Normal(0.0, tau))
        with pyro.plate("rows", 24):
            pyro.sample("z", dist.Normal(start + slope * year + y[..., UNIT], 0.7), obs=z)

    year = 2000 + torch.arange(24) % 11
    return model, (year.to(dtype), LONG.to(dtype))


def counted(dtype: torch.dtype) -> Made:
    """Factorials of the data are computed from them."""

    def model(z):
        mu, tau = _globals()
        with pyro.plate("units", z.shape[-1], dim=-1):
            y = pyro.sample("y", dist.Normal(mu, tau))
            with pyro.plate("counts", len(z), dim=-2):
                pyro.sample("z", dist.Poisson(y.exp()), obs=z)

    return model, (COUNTS.to(dtype),)


def captured(dtype: torch.dtype) -> Made:
    """Constants, and a prior, that are made outside of the model."""
    design = torch.stack([torch.ones(8), X], -1).to(dtype)
    prior = dist.Normal(torch.tensor(0.0).to(dtype), 1.0).expand([2]).to_event(1)

    def model(z):
        beta, tau = pyro.sample("beta", prior), pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(beta @ design.T, tau))
            pyro.sample("z", dist.Normal(y, 0.7), obs=z)

    return model, (Z.to(dtype),)


def named_dtypes(dtype: torch.dtype) -> Made:
    """Casts to a dtype that the author had in mind."""

    def model(z):
        mu, tau = _globals()
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, tau).mask(torch.ones(len(z), dtype=torch.bool)))
            shift = torch.zeros(len(z), dtype=dtype) + (y * 0.1).to(dtype)
            pyro.sample("z", dist.Normal(y + shift, torch.full((len(z),), 0.7, dtype=dtype)), obs=z)

    return model, (Z.to(dtype),)


def labels_and_masks(dtype: torch.dtype) -> Made:
    """Integer labels, a boolean mask, and data in half precision."""

    def model(unit, seen, weight, z):
        mu, tau = _globals()
        with pyro.plate("units", 8):
            y = pyro.sample("y", dist.Normal(mu, tau))
        with pyro.plate("rows", len(z)), pyro.poutine.mask(mask=seen):
            pyro.sample("z", dist.Normal(y[..., unit], weight.to(z.dtype)), obs=z)

    weight = (0.5 + UNIT / 16).half()
    return model, (UNIT, UNIT != 3, weight if dtype == torch.float32 else weight.double(), LONG.to(dtype))


def arrays(dtype: torch.dtype) -> Made:
    """Data in NumPy's arrays, and in a dictionary."""

    def model(data):
        mu, tau = _globals()
        z = torch.as_tensor(data["z"])
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, tau))
            pyro.sample("z", dist.Normal(y, data["error"]), obs=z)

    kind = numpy.float32 if dtype == torch.float32 else numpy.float64
    error = torch.full((8,), 0.7, dtype=torch.float32).to(dtype)
    return model, ({"z": Z.numpy().astype(kind), "error": error},)


def module(dtype: torch.dtype) -> Made:
    """A module with a prior in the place of a weight."""
    net = PyroModule[nn.Linear](1, 1).to(dtype)
    net.weight = PyroSample(dist.Normal(torch.zeros(1, 1).to(dtype), 1.0).to_event(2))
    net.bias = PyroSample(dist.Normal(torch.zeros(1).to(dtype), 1.0).to_event(1))

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x, z):
            tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
            mean = self.net.weight[..., 0, 0].unsqueeze(-1) * x + self.net.bias
            with pyro.plate("units", len(z)):
                y = pyro.sample("y", dist.Normal(mean, tau))
                pyro.sample("z", dist.Normal(y, 0.7), obs=z)

    return Model(), (X.to(dtype), Z.to(dtype))


def branching(dtype: torch.dtype) -> Made:
    """Python looks at a latent: it cannot be recorded."""

    def model(z):
        mu, tau = _globals()
        with pyro.plate("units", z.shape[-1]):
            y = pyro.sample("y", dist.Normal(mu, tau if bool((mu > -30).all()) else 2 * tau))
            pyro.sample("z", dist.Poisson(y.exp()), obs=z[0])

    return model, (COUNTS.to(dtype),)


def parameters(dtype: torch.dtype) -> Made:
    """Parameters of the model itself: of Pyro's store, one of them positive, and weights of a network."""
    net = nn.Linear(1, 1).to(dtype)
    with torch.no_grad():
        net.weight.fill_(0.25)
        net.bias.fill_(0.5)

    def model(x, z):
        pyro.module("net", net)
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        noise = pyro.param("noise", torch.tensor(1.0).to(dtype), constraint=dist.constraints.positive)
        shift = pyro.param("shift", torch.tensor(0.5).to(dtype))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            mean = y + net(x.unsqueeze(-1)).squeeze(-1) + 0.1 * shift**2
            pyro.sample("z", dist.Normal(mean, noise + 0.3), obs=z)
        pyro.factor("known", -((shift - 0.3) ** 2) - net.bias.sum() ** 2 - net.weight.sum() ** 2 - noise**2)

    return model, (X.to(dtype), Z.to(dtype))


KINDS = [
    plain,
    far_from_zero,
    counted,
    captured,
    named_dtypes,
    labels_and_masks,
    arrays,
    module,
    branching,
]


def closed_form(sites: dict[str, Tensor], z: Tensor) -> dict[str, Tensor]:
    """The mode of :func:`plain`, with a product of a matrix and the data, which must be of one dtype."""
    share = 1 / (1 + 0.49 / sites["tau"].square())
    kept = torch.eye(len(z), dtype=z.dtype) @ z
    return {"y": share * kept + (1 - share) * (0 * kept + 1) * sites["mu"]}


GUIDES: dict[str, Callable[[Any], AutoLaplaceFamily]] = {
    "NewtonMode": AutoLaplaceFamily,
    "ClosedFormMode": lambda model: AutoLaplaceFamily(model, ClosedFormMode(closed_form)),
    "FreeMode": lambda model: AutoLaplaceFamily(model, FreeMode()),
    "Boost": lambda model: AutoLaplaceFamily(model, NewtonMode(), repair=Boost()),
}


def fitted(
    make: Callable[[torch.dtype], Made],
    dtype: torch.dtype,
    objective: Any,
    guide: Callable[[Any], AutoLaplaceFamily] = AutoLaplaceFamily,
    **options: Any,
) -> Any:
    """Fit a model under a default dtype, and leave that as it is then."""
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
    model, args = make(dtype)
    return fit(model, guide(model), *args, objective=objective, progress=False, **options)
