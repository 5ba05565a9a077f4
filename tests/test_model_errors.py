"""What a first model may have wrong: a logistic regression with an intercept of each group, and each slip by name."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from laplace_amort import AutoLaplaceFamily, LogJoint, ModelError

GROUP = torch.arange(12) % 4
Z = (torch.arange(12) % 3 == 0).double()


def intercepts():
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", 4):
        return pyro.sample("y", dist.Normal(mu, 1.0))


def in_the_plate_of_the_groups(z=Z):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", 4):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Bernoulli(logits=y[GROUP]), obs=z)


def observed(z=Z):
    y = intercepts()
    with pyro.plate("answers", 12):
        pyro.sample("z", dist.Bernoulli(logits=y[GROUP]), obs=z)


def not_observed(z=Z):
    y = intercepts()
    with pyro.plate("answers", 12):
        pyro.sample("z", dist.Bernoulli(logits=y[GROUP]))


def single_precision(z=Z):
    design = torch.nn.functional.one_hot(GROUP).float()
    y = intercepts()
    with pyro.plate("answers", 12):
        pyro.sample("z", dist.Bernoulli(logits=design @ y), obs=z)


def without_plates(z=Z):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    y = pyro.sample("y", dist.Normal(mu, 1.0).expand([4]).to_event(1))
    with pyro.plate("answers", 12):
        pyro.sample("z", dist.Bernoulli(logits=y[GROUP]), obs=z)


SLIPS = {
    "observations in the plate of the units": (
        in_the_plate_of_the_groups,
        Z,
        ["site 'z' has 12 elements", "plate 'groups' of size 4", "with pyro.plate('z_plate', 12):", "y[unit_of_each]"],
    ),
    "no obs": (
        not_observed,
        Z,
        ["latent site 'z' is discrete (Bernoulli, in plate 'answers')", "obs= is missing", "dist.MixtureSameFamily("],
    ),
    "integers": (
        observed,
        Z.long(),
        ["observed site 'z' (Bernoulli) has data of torch.int64", "obs=data.to(torch.get_default_dtype())"],
    ),
    "two precisions": (
        single_precision,
        Z,
        ["after site 'y' (torch.float64)", "must have the same dtype", "data = data.to(torch.get_default_dtype())"],
    ),
    "no plate": (
        without_plates,
        Z,
        ["no latent site lies in a plate (mu, y)", "with pyro.plate('units', num_units):", "AutoLaplaceApproximation("],
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_the_message_has_site_plate_and_the_line_to_type(slip):
    model, z, parts = SLIPS[slip]
    with pytest.raises(ModelError) as caught:
        AutoLaplaceFamily(model)(z)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_the_line_to_type_works():
    AutoLaplaceFamily(observed)(Z.long().to(torch.get_default_dtype()))


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_errors_of_the_model_itself_pass(kind):
    def model():
        raise kind("of the user")

    with pytest.raises(kind, match="of the user") as caught:
        LogJoint(model)
    assert not isinstance(caught.value, ModelError)


def test_errors_of_a_density_itself_pass():
    class Refuses(dist.Normal):
        def log_prob(self, value):
            raise RuntimeError("of the user, not of a dtype")

    def model():
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", Refuses(y, 1.0), obs=torch.zeros(()))

    with pytest.raises(RuntimeError, match="of the user") as caught:
        LogJoint(model)(torch.zeros(1))
    assert not isinstance(caught.value, ModelError)
