"""Data without a density are named, and the lines to type work."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from laplace_amort import AutoLaplaceFamily, LogJoint, ModelError

NUM = 12
UNIT = torch.arange(NUM) % 4
Y = torch.linspace(0.05, 0.95, NUM, dtype=torch.float64)


def model(fn, data, obs_mask=None):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("units", 4):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", NUM):
        pyro.sample("y", fn(u[..., UNIT], tau), obs=data, obs_mask=obs_mask)


def put(value, index=3, data=Y):
    data = data.clone()
    data[index] = value
    return data


def beta(u, tau):
    return dist.Beta(tau * u.sigmoid(), tau * (-u).sigmoid())


def dirichlet(u, tau):
    return dist.Dirichlet(tau.unsqueeze(-1) * (1 + u.exp()).unsqueeze(-1) * torch.ones(3))


PARTS = torch.stack([Y / 2, Y / 4, 1 - 0.75 * Y], -1)

# A distribution, data, parts of the message, and the code of its lines: data that are moved, a mask that leaves out.
EDGES = {
    "beta, one": (
        beta,
        put(1.0),
        ["'y' (Beta) has 1 of 12 values that are on the edge", "the first 1 at index [3]", "(0, 1), without the ends"],
        lambda data: (data * (len(data) - 1) + 0.5) / len(data),
        "data = (data * (len(data) - 1) + 0.5) / len(data)",
        lambda data: (data > 0) & (data < 1),
        "mask((data > 0) & (data < 1))",
    ),
    "beta, zero": (
        lambda u, tau: dist.Beta(u.exp(), u.exp()),  # at latents of zero the density is flat, and knows no edge
        put(0.0),
        ["'y' (Beta) has 1 of 12", "the first 0 at index [3]"],
        lambda data: (data * (len(data) - 1) + 0.5) / len(data),
        "+ 0.5) / len(data)",
        lambda data: (data > 0) & (data < 1),
        "mask((data > 0) & (data < 1))",
    ),
    "gamma": (
        lambda u, tau: dist.Gamma(tau, u.exp()),
        put(0.0),
        ["'y' (Gamma) has 1 of 12", "above 0"],
        lambda data: data.clamp(min=data[data > 0].min() / 2),
        "data = data.clamp(min=data[data > 0].min() / 2)",
        lambda data: data > 0,
        "mask(data > 0)",
    ),
    "log-normal": (
        lambda u, tau: dist.LogNormal(u, tau),
        put(0.0),
        ["'y' (LogNormal) has 1 of 12"],
        lambda data: data.clamp(min=data[data > 0].min() / 2),
        "data = data.clamp(min=data[data > 0].min() / 2)",
        lambda data: data > 0,
        "mask(data > 0)",
    ),
    "dirichlet": (
        dirichlet,
        put(torch.tensor([0.5, 0.5, 0.0]), data=PARTS),
        ["'y' (Dirichlet) has 1 of 36 values", "the first 0 at index [3, 2]"],
        lambda data: (data * (len(data) - 1) + 1 / data.shape[-1]) / len(data),
        "data = (data * (len(data) - 1) + 1 / data.shape[-1]) / len(data)",
        lambda data: (data > 0).all(-1),
        "mask((data > 0).all(-1))",
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_values_at_the_edge_are_named_and_the_lines_work(name):
    fn, data, parts, moved, move, kept, mask = EDGES[name]
    with pytest.raises(ModelError) as caught:
        AutoLaplaceFamily(model)(fn, data)
    assert [part for part in [*parts, move, mask] if part not in str(caught.value)] == []
    for again, its_data in ((fn, moved(data)), (lambda u, tau: fn(u, tau).mask(kept(data)), data)):
        pyro.clear_param_store()
        AutoLaplaceFamily(model)(again, its_data)


FINE = {
    "a power law that ends at one": (lambda u, tau: dist.Beta(u.exp(), torch.ones(NUM)), put(1.0)),
    "an exponential at zero": (lambda u, tau: dist.Exponential(u.exp()), put(0.0)),
    "a gamma of concentration one at zero": (lambda u, tau: dist.Gamma(1.0, u.exp()), put(0.0)),
    "a half-normal at zero": (lambda u, tau: dist.HalfNormal(u.exp()), put(0.0)),
    "a bound that follows from a latent": (lambda u, tau: dist.Uniform(0.0, 1 + u.exp()), put(1.0)),
}


@pytest.mark.parametrize("name", FINE)
def test_edges_that_have_a_density_are_taken(name):
    fn, data = FINE[name]
    LogJoint(model, fn, data).check_data()
    AutoLaplaceFamily(model)(fn, data)


# A distribution, data, and the lines of the message, typed: one with a mask, one with obs_mask.
MISSING = {
    "normal": (
        lambda u, tau: dist.Normal(u, tau),
        put(torch.nan),
        "dist...mask(~data.isnan()), obs=data.nan_to_num(0))",
        lambda fn, data: fn.mask(~data.isnan()),
        lambda data: data.nan_to_num(0),
        lambda data: ~data.isnan(),
    ),
    "gamma": (
        lambda u, tau: dist.Gamma(tau, u.exp()),
        put(torch.nan),
        "dist...mask(~data.isnan()), obs=data.nan_to_num(1))",
        lambda fn, data: fn.mask(~data.isnan()),
        lambda data: data.nan_to_num(1),
        lambda data: ~data.isnan(),
    ),
    "infinite": (
        lambda u, tau: dist.Normal(u, tau),
        put(-torch.inf),
        "dist...mask(data.isfinite()), obs=data.nan_to_num(0, 0, 0))",
        lambda fn, data: fn.mask(data.isfinite()),
        lambda data: data.nan_to_num(0, 0, 0),
        lambda data: data.isfinite(),
    ),
    "an event of several": (
        lambda u, tau: dist.Normal(u.unsqueeze(-1) + torch.zeros(3), tau.unsqueeze(-1)).to_event(1),
        put(torch.tensor([0.1, torch.nan, 0.2]), data=PARTS),
        "dist...mask(~data.isnan()).to_event(1), obs=data.nan_to_num(0))",
        lambda fn, data: fn.base_dist.mask(~data.isnan()).to_event(1),
        lambda data: data.nan_to_num(0),
        lambda data: (~data.isnan()).all(-1),
    ),
    "a simplex": (
        dirichlet,
        put(torch.tensor([0.1, torch.nan, 0.2]), data=PARTS),
        "dist...mask((~data.isnan()).all(-1)), obs=torch.where((~data.isnan()).all(-1)[..., None], data, 0.333333))",
        lambda fn, data: fn.mask((~data.isnan()).all(-1)),
        lambda data: torch.where((~data.isnan()).all(-1)[..., None], data, 0.333333),
        lambda data: (~data.isnan()).all(-1),
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_no_number_is_named_and_the_lines_work(name):
    fn, data, line, masked, filled, seen = MISSING[name]
    with pytest.raises(ModelError) as caught:
        AutoLaplaceFamily(model)(fn, data)
    said = str(caught.value)
    assert "observed site 'y' (" in said
    assert "at index [3" in said
    assert line in said
    assert "obs_mask=" in said
    found = LogJoint(model, lambda u, tau: masked(fn(u, tau), data), filled(data))
    found.check_data()
    imputed = LogJoint(model, fn, filled(data), seen(data))
    imputed.check_data()
    point = torch.linspace(-1.0, 1.0, 5)
    if name == "an event of several":  # by obs_mask it is left out as a whole
        assert found(point) != imputed(point)
    else:
        torch.testing.assert_close(found(point), imputed(point))


def test_a_part_of_a_multivariate_normal_has_a_distribution_of_its_own():
    covariance = torch.eye(3) + 0.5
    data = put(torch.tensor([0.1, torch.nan, 0.2]), data=PARTS)
    with pytest.raises(ModelError, match=r"dist.NanMaskedMultivariateNormal\(...\), obs=data"):
        AutoLaplaceFamily(model)(
            lambda u, tau: dist.MultivariateNormal(u.unsqueeze(-1).expand(NUM, 3), covariance), data
        )
    AutoLaplaceFamily(model)(
        lambda u, tau: dist.NanMaskedMultivariateNormal(u.unsqueeze(-1).expand(NUM, 3), covariance), data
    )


def test_obs_mask_that_says_too_much_is_seen():
    fn, data = MISSING["normal"][:2]
    seen = torch.ones(NUM, dtype=torch.bool)
    with pytest.raises(ModelError) as caught:
        AutoLaplaceFamily(model)(fn, data, seen)
    assert "and obs_mask says that they are seen" in str(caught.value)
    assert "pyro.sample('y', ..., obs=data, obs_mask=seen & ~data.isnan())" in str(caught.value)
    AutoLaplaceFamily(model)(fn, data, seen & ~data.isnan())


@pytest.mark.parametrize(("value", "index"), [(-0.5, 3), (1.5, 7)])
def test_values_outside_of_a_support_are_named_and_the_line_works(value, index):
    data = put(value, index)
    with pytest.raises(ModelError) as caught:
        AutoLaplaceFamily(model)(beta, data)
    said = str(caught.value)
    assert f"1 of 12 values that are impossible, the first {value:g} at index [{index}]" in said
    assert "pyro.sample('y', dist.Beta(...).mask((data > 0) & (data < 1)), obs=data)" in said
    AutoLaplaceFamily(model)(lambda u, tau: beta(u, tau).mask((data > 0) & (data < 1)), data)


def test_in_single_precision_as_well():
    torch.set_default_dtype(torch.float32)
    with pytest.raises(ModelError, match="on the edge of the support"):
        AutoLaplaceFamily(model)(beta, put(1.0).float())
