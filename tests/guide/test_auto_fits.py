"""Whole fits: from a start where the information is indefinite, and in single precision."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guides import fixed_noise
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_mean, init_to_median, init_to_value

from laplace_amort import AutoLaplaceFamily, JointCurvature, MarginalCurvature, ModifiedCholesky, SoftAbs

HEADS = [JointCurvature(), MarginalCurvature()]
PARTICLES = 8
INDEFINITE = [init_to_value(values={"mu": torch.tensor(0.0), "tau": torch.tensor(tau)}) for tau in (0.2, 0.5)]


def hierarchy(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", z.shape[-1], dim=-1):
        y = pyro.sample("y", dist.Normal(mu, tau))
        with pyro.plate("counts", z.shape[-2], dim=-2):
            pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def data(num_units):
    generator = torch.Generator().manual_seed(1)
    y = 0.5 + 0.7 * torch.randn(num_units, generator=generator)
    return torch.poisson(y.exp().expand(3, -1), generator=generator)


def fit(guide, z, steps, lr, noise=None):
    """Losses of a fit with vectorized particles; with given noise for each step, or torch's own."""
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=2)
    guide(z)
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": lr}), elbo)
    losses = []
    for step in range(steps):
        if noise is None:
            losses.append(svi.step(z))
        else:
            with fixed_noise(noise[step]):
                losses.append(svi.step(z))
    return losses


@pytest.mark.parametrize("repair", [SoftAbs(), ModifiedCholesky()])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("init", [init_to_mean, init_to_median, *INDEFINITE])
def test_no_start_is_an_obstacle(init, head, repair):
    """Of 20000 units, at the prior and where the Schur complement is indefinite on the first step."""
    z = data(20_000)
    guide = AutoLaplaceFamily(hierarchy, head=head, repair=repair, init_loc_fn=init)
    losses = fit(guide, z, steps=3, lr=0.05)
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("init", INDEFINITE)
def test_these_starts_are_indeed_indefinite(init):
    gaussian = AutoLaplaceFamily(hierarchy, init_loc_fn=init).gaussian(data(20_000))
    assert gaussian.head_report.smallest_before < 0
    assert gaussian.head_report.num_repaired == 1
    assert gaussian.tail_report.num_repaired == 0  # a mode is a maximum


@pytest.mark.parametrize("head", HEADS)
def test_a_fit_in_float32_is_the_fit_in_float64(head):
    """With the same noise, after 60 steps: within 0.02 posterior standard deviations, and 1 % of these."""
    z = data(200)
    generator = torch.Generator().manual_seed(2)
    noise = [
        [torch.randn(PARTICLES, 2, generator=generator), torch.randn(PARTICLES, 200, generator=generator)]
        for _ in range(60)
    ]
    ends = {}
    for dtype in (torch.float64, torch.float32):
        pyro.clear_param_store()
        torch.set_default_dtype(dtype)
        guide = AutoLaplaceFamily(hierarchy, head=head)
        start = guide.gaussian(z.to(dtype)).global_loc.detach().double()
        fit(guide, z.to(dtype), 60, 0.05, noise)
        gaussian = guide.gaussian(z.to(dtype))
        assert gaussian.global_loc.dtype == dtype
        sd = gaussian.precision.global_variance().sqrt()
        ends[dtype] = gaussian.global_loc.detach().double(), sd.detach().double()
    (loc, sd), (loc32, sd32) = ends[torch.float64], ends[torch.float32]
    assert ((loc32 - loc).abs() / sd).max() < 0.02
    assert (sd32 / sd - 1).abs().max() < 0.01
    assert ((loc - start).abs() / sd).max() > 1  # the fit went somewhere
