"""What AutoLaplaceFamily cannot do is refused by name, with the line to type instead; edge cases next to it work."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import MODELS, counts, nested_plates, normals, sequential, subsampled_twice
from helpers.unit_models import FAMILY_MODELS, vectors
from helpers.unit_models import batches as poisson
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_value

from laplace_amort import (
    InformationError,
    LaplaceAmortError,
    ModelError,
    ModeNotFoundError,
    NotPositiveDefiniteError,
    StructureError,
)
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.heads import JointCurvature, MarginalCurvature
from laplace_amort.linalg.repair import NoRepair
from laplace_amort.units.closed_form import ClosedFormMode
from laplace_amort.units.modes import FreeMode


def discrete(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        side = pyro.sample("side", dist.Bernoulli(0.5))
        y = pyro.sample("y", dist.Normal(mu + side, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def random_walk(z):
    """Latents of one plate, each hanging on the one before."""
    with pyro.plate("times", len(z)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(x.cumsum(-1), 0.5), obs=z)


def sum_to_zero(z):
    """A soft constraint over all units, on the second of two sites."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(x + effect, 0.5), obs=z)
    pyro.factor("balance", -((effect.sum(-1) / 0.1) ** 2))


def crossed(z, size=None):
    """Two crossed plates with latents: items answer for all persons."""
    persons = pyro.plate("persons", z.shape[-2], subsample_size=size, dim=-2)
    items = pyro.plate("items", z.shape[-1], subsample_size=size, dim=-1)
    with persons as i:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with items as j:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with persons, items:
        pyro.sample("z", dist.Normal(ability - difficulty, 1.0), obs=z[i[:, None], j])


def no_plate(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(z)):
        pyro.sample("z", dist.Normal(mu, tau), obs=z)


def everything_observed(z):
    with pyro.plate("units", len(z)):
        pyro.sample("z", dist.Normal(0.0, 1.0), obs=z)


def random_model(z):
    """Draws a number that is no site."""
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(torch.randn(()), 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def traced():
    SVI(poisson, AutoLaplaceFamily(poisson), pyro.optim.Adam({}), JitTrace_ELBO()).step(counts(4))


def inference_mode(method, *args):
    guide = AutoLaplaceFamily(poisson)
    with torch.inference_mode():
        getattr(guide, method)(*args, counts(4))


def one_after_the_other(guide, *calls):
    for z in calls:
        guide(z)


def without_repair(case):
    """Where the spread is 3, the curvature of the profile is not positive; by default the start would be drawn."""
    start = init_to_value(values={"tau": torch.tensor(3.0)})
    return AutoLaplaceFamily(case.model, repair=NoRepair(), init_loc_fn=start)(*case.args)


REFUSED = {
    "discrete latent": (
        lambda: AutoLaplaceFamily(discrete)(normals(4)),
        ModelError,
        "latent site 'side' is discrete (Bernoulli, in plate 'units'), and a Hessian needs continuous latents.",
    ),
    "sequential plate": (
        lambda: AutoLaplaceFamily(sequential)(normals(3)),
        ModelError,
        "latent site 'y_0' lies in the sequential plate 'units', a loop in Python over the units. Vectorize it:\n"
        "    with pyro.plate('units', num_units):",
    ),
    "time series": (
        lambda: AutoLaplaceFamily(random_walk)(normals(4)),
        StructureError,
        "x",
    ),
    "sum to zero": (
        lambda: AutoLaplaceFamily(sum_to_zero)(normals(4)),
        StructureError,
        "effect",
    ),
    "two crossed subsampled plates": (
        lambda: AutoLaplaceFamily(crossed)(normals(4, 3), 2),
        ModelError,
        "latent site 'difficulty' is global, but lies in plate 'items' too, which subsamples 2 of 3; of plates with "
        "latents only the unit plate 'persons' can be subsampled. Use the whole plate, or make it the unit plate:\n"
        "    unit_plate='items'",
    ),
    "nested subsampled plates": (
        lambda: AutoLaplaceFamily(subsampled_twice)(normals(5, 4)),
        ModelError,
        "only the unit plate 'groups' can be subsampled",
    ),
    "no plate": (
        lambda: AutoLaplaceFamily(no_plate)(normals(4)),
        ModelError,
        "no latent site lies in a plate (mu, tau), so there are no units. If each unit has a latent, sample it in a "
        "plate (not by .expand or .to_event):\n    with pyro.plate('units', num_units):",
    ),
    "no latent": (
        lambda: AutoLaplaceFamily(everything_observed)(normals(4)),
        ModelError,
        "the model has no latent sample site: every one is observed",
    ),
    "misspelled unit plate": (
        lambda: AutoLaplaceFamily(poisson, unit_plate="unit")(counts(4)),
        ModelError,
        "no latent site lies in a plate named 'unit'; the plates that hold latents are 'units':\n"
        "    unit_plate='units'",
    ),
    "another unit plate": (
        lambda: AutoLaplaceFamily(nested_plates, unit_plate="answers")(normals(2, 3)),
        ModelError,
        "the plates that hold latents are 'groups', 'units'",
    ),
    "random model": (
        lambda: AutoLaplaceFamily(random_model)(normals(4)),
        ModelError,
        "it draws random numbers elsewhere than in its visible latent sites",
    ),
    "jit": (traced, InformationError, "JitTrace_ELBO cannot run this guide. Use Trace_ELBO() instead"),
    "inference mode": (
        lambda: inference_mode("__call__"),
        InformationError,
        "inference_mode switches off for good. Use no_grad instead:\n    with torch.no_grad(): ...",
    ),
    "inference mode, median": (lambda: inference_mode("median"), InformationError, "with torch.no_grad(): ..."),
    "inference mode, quantiles": (
        lambda: inference_mode("quantiles", [0.5]),
        InformationError,
        "with torch.no_grad(): ...",
    ),
    "marginal head with free modes": (
        lambda: AutoLaplaceFamily(poisson, FreeMode(), head=MarginalCurvature())(counts(4)),
        ModelError,
        "NewtonMode()",
    ),
    "free modes for other units": (
        lambda: one_after_the_other(AutoLaplaceFamily(poisson, FreeMode()), counts(4), counts(6)),
        ModelError,
        "FreeMode",
    ),
    "another model": (
        lambda: one_after_the_other(AutoLaplaceFamily(vectors), counts(3, 2), counts(3, 4)),
        ModelError,
        "If it is this guide whose model has changed, make a new one",
    ),
    "closed form that overflows": (
        lambda: AutoLaplaceFamily(poisson, ClosedFormMode(lambda values, z: {"y": (z - z[2]).reciprocal()}))(
            torch.tensor([1.0, 2.0, 3.0, 4.0])
        ),
        ModeNotFoundError,
        "the closed form is not finite for 1 of 4 units:\n    unit 2 of plate 'units' ('y'): 'y' is inf",
    ),
    "no repair where one is needed": (
        lambda: without_repair(MODELS["eight_schools"]()),
        NotPositiveDefiniteError,
        "SoftAbs()",
    ),
    "closed form with a site too few": (
        lambda: AutoLaplaceFamily(poisson, ClosedFormMode(lambda values, z: {}))(counts(4)),
        LaplaceAmortError,
        "y",
    ),
    "closed form of a wrong shape": (
        lambda: AutoLaplaceFamily(poisson, ClosedFormMode(lambda values, z: {"y": values["mu"]}))(counts(4)),
        LaplaceAmortError,
        "y",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    refused, error, message = REFUSED[name]
    with pytest.raises(error, match=re.escape(message)):
        refused()


def test_a_refused_call_does_not_spoil_the_next():
    """The first call with data that the model cannot take; then a right one."""
    guide, z = AutoLaplaceFamily(crossed), normals(4, 3)
    with pytest.raises(ModelError, match="subsamples"):
        guide(z, 2)
    expected = AutoLaplaceFamily(crossed).median(z)
    for name, value in guide.median(z).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------ what looks alike, and works


def test_two_crossed_plates_work_whole_and_subsampled_in_one():
    z = normals(4, 3)
    guide = AutoLaplaceFamily(crossed)
    assert guide(z)["ability"].shape == (4, 1)
    assert "unit plate 'persons'" in str(guide.layout)
    first = guide.gaussian(z).precision.to_dense()
    pyro.clear_param_store()
    other = AutoLaplaceFamily(crossed, unit_plate="items")
    assert other(z)["difficulty"].shape == (3,)
    assert "global, 4 in all: ability (4, 1)" in str(other.layout)
    # Exactly the same Gaussian, with the roles exchanged: the model is Gaussian, and both stand at zero.
    order = torch.tensor([3, 4, 5, 6, 0, 1, 2])
    torch.testing.assert_close(other.gaussian(z).precision.to_dense(), first[order][:, order], rtol=1e-9, atol=1e-9)


def test_a_second_plate_without_latents_may_be_subsampled():
    """Observations subsampled on their own: the indices are shared, the weight is the model's."""
    rows = []

    def model(z, unit):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", 3):
            y = pyro.sample("y", dist.Normal(mu, 0.7))
        with pyro.plate("rows", len(z), subsample_size=4) as indices:
            rows.append(indices.tolist())
            pyro.sample("z", dist.Normal(y[..., unit[indices]], 0.5), obs=z[indices])

    guide = AutoLaplaceFamily(model)
    z, unit = normals(9), torch.arange(9) % 3
    for _ in range(2):
        rows.clear()
        trace = poutine.trace(guide).get_trace(z, unit)
        indices = trace.nodes["rows"]["value"].tolist()
        poutine.replay(model, trace=trace)(z, unit)
        assert all(row == indices for row in rows[1:])  # the first run only looks at the sites
        assert len(rows) > 3


def test_no_grad_is_no_inference_mode():
    guide, z = AutoLaplaceFamily(poisson), counts(4)
    with torch.no_grad():
        values = guide(z)
        loss = Trace_ELBO().loss(poisson, guide, z)
    assert not any(value.requires_grad for value in values.values())
    assert loss == loss


@pytest.mark.parametrize("head", [JointCurvature(), MarginalCurvature()])
@pytest.mark.parametrize("name", ["one unit", "without globals", "lonely global", "masked"])
def test_edge_cases_work_with_both_heads(name, head):
    case = FAMILY_MODELS[name]()
    guide = AutoLaplaceFamily(case.model, head=head)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(3, vectorize_particles=True))
    assert torch.tensor([svi.step(*case.args) for _ in range(3)]).isfinite().all()
    assert all(value.isfinite().all() for value in guide.median(*case.args).values())


def test_a_global_without_units_has_no_border():
    guide, z = AutoLaplaceFamily(FAMILY_MODELS["lonely global"]().model), counts(4)
    gaussian = guide.gaussian(z)
    assert list(gaussian.unit_model.layout.global_sites) == ["mu", "bias"]
    assert (gaussian.precision.border[..., 1] == 0).all()
    assert (gaussian.precision.border[..., 0] != 0).all()
