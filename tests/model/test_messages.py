"""What a first model may have wrong: a logistic regression with an intercept of each group, and each slip by name."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.provokers import OwnBernoulli

from laplace_amort import AutoLaplaceFamily, LogJoint, MarginalLaplace, ModelError, fit

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


def observed(z=Z, kind=dist.Bernoulli):
    y = intercepts()
    with pyro.plate("answers", 12):
        pyro.sample("z", kind(logits=y[GROUP]), obs=z)


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


def with_covariate(z=Z, x=Z, index=GROUP, size=12):
    y = intercepts()
    with pyro.plate("answers", size):
        pyro.sample("z", dist.Bernoulli(logits=y[index] + x), obs=z)


def in_single_states(z=Z):
    y = intercepts()
    with pyro.plate("answers", 12):
        pyro.sample("z", dist.Categorical(logits=torch.stack([y[GROUP], -y[GROUP]], -1)), obs=z)


def of_trials(z=Z):
    y = intercepts()
    with pyro.plate("answers", 12):
        pyro.sample("z", dist.Binomial(1, logits=y[GROUP]), obs=z)


def with_matrix(z=Z, design=None):
    y = intercepts()
    with pyro.plate("answers", 12):
        pyro.sample("z", dist.Bernoulli(logits=design @ y), obs=z)


def cluster_of_each_group(z=Z):
    """The table of shapes that Pyro appends is indented, as names are long."""
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    with pyro.plate("groups_of_answers", 4):
        pyro.sample("cluster", dist.Bernoulli(share))


def holed(value, index=5):
    value = value.clone()
    value[index] = float("nan")
    return value


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
    "integers, in a density of the user's own": (
        lambda z: observed(z, OwnBernoulli),
        Z.long(),
        ["observed site 'z' (OwnBernoulli) has data of torch.int64", "obs=data.to(torch.get_default_dtype())"],
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
    "NumPy": (
        lambda z: observed(z.numpy()),
        Z,
        ["observed site 'z' has data that are no tensor, but ndarray", "torch.as_tensor("],
    ),
    "a covariate of NumPy": (
        lambda z: with_matrix(z, torch.eye(12, 4).numpy()),
        Z,
        ["no tensors after site 'y'", "torch.as_tensor(data, dtype=torch.get_default_dtype())"],
    ),
    "labels of 1 and 2": (
        observed,
        Z + 1,
        ["site 'z' (Bernoulli) has 4 of 12 values that are impossible, the first 2 at index [0]", "obs=data - 1)"],
    ),
    "classes from 1": (in_single_states, Z + 1, ["site 'z' (Categorical) has 4 of 12 values", "obs=data - 1)"]),
    "more than the trials": (
        of_trials,
        Z * 3,
        ["site 'z' (Binomial) has 4 of 12 values", "the first 3 at index [0]", "(..., validate_args=False)"],
    ),
    "an answer is missing": (
        observed,
        holed(Z),
        [
            "site 'z' (Bernoulli) has 1 of 12 values",
            "the first nan at index [5]",
            "dist...mask(~data.isnan()), obs=data.nan_to_num(0))",
            "obs_mask=~data.isnan())",
        ],
    ),
    "a covariate is missing": (
        with_covariate,
        (Z, holed(Z, 7)),
        ["'logits' of a distribution Bernoulli after site 'y' is NaN", "x of the model is NaN at index [7], and 1 of"],
    ),
    "a covariate outside of the arguments is missing": (
        lambda z: with_covariate(z, holed(Z)),
        Z,
        ["'logits' of a distribution Bernoulli after site 'y' is NaN", "data.isnan().nonzero()"],
    ),
    "numbers of groups from 1": (
        with_covariate,
        (Z, Z, GROUP + 1),
        [
            "looks up element 4 after site 'y', and there are 4, from 0 to 3",
            "torch.unique(unit, return_inverse=True)[1]",
        ],
    ),
    "numbers of groups in floating point": (
        with_covariate,
        (Z, Z, GROUP.double()),
        ["an index after site 'y' is no integer", "unit = unit.long()"],
    ),
    "columns of other lengths": (
        with_covariate,
        (Z[:11], Z, GROUP, 11),
        ["site 'z' has 12 elements, and lies in plate 'answers' of size 11", "'z': (11,), 'x': (12,)"],
    ),
    "a table of shapes below": (cluster_of_each_group, Z, ["latent site 'cluster' is discrete"]),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_the_message_has_site_plate_and_the_line_to_type(slip):
    model, z, parts = SLIPS[slip]
    with pytest.raises(ModelError) as caught:
        AutoLaplaceFamily(model)(*(z if isinstance(z, tuple) else (z,)))
    assert "Trace Shapes" not in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_the_reason_why_a_model_is_not_recorded_has_no_table_of_shapes():
    """Pyro appends one to every error that passes its handlers, those of the recorder among them."""

    def branching(z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = 1.0 if mu > 1e9 else 2.0
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            pyro.sample("z", dist.Normal(y, scale), obs=z)

    result = fit(branching, AutoLaplaceFamily(branching), Z, objective=MarginalLaplace(), progress=False)
    (note,) = [note for note in result.notes if "ran the model in Python" in note]
    assert note.endswith("to branch on it?")
    assert all("Trace Shapes" not in note for note in result.notes)


def test_the_line_to_type_works():
    AutoLaplaceFamily(observed)(Z.long().to(torch.get_default_dtype()), OwnBernoulli)


def test_data_that_can_be_are_taken():
    def weighed(z):
        y = intercepts()
        with pyro.plate("answers", 12):
            pyro.sample("z", dist.Bernoulli(logits=y[GROUP], validate_args=False), obs=z)

    def masked(z):
        y = intercepts()
        with pyro.plate("answers", 12):
            pyro.sample("z", dist.Bernoulli(logits=y[GROUP]).mask(~z.isnan()), obs=z.nan_to_num())

    for model, z in ((weighed, 0.9 * Z), (masked, holed(Z))):
        pyro.clear_param_store()
        AutoLaplaceFamily(model)(z)


def test_masked_out_data_are_not_looked_at():
    def model(z, kept):
        y = intercepts()
        with pyro.plate("answers", 12), pyro.poutine.mask(mask=kept):
            pyro.sample("z", dist.Bernoulli(logits=y[GROUP]), obs=z)

    kept = torch.ones(12, dtype=torch.bool)
    kept[0] = False
    z = Z.clone()
    z[0] = 2.0
    LogJoint(model, z, kept).check_data()
    with pytest.raises(ModelError, match="the first 2 at index"):
        LogJoint(model, z, ~kept).check_data()


def test_the_data_of_every_fit_are_looked_at():
    guide = AutoLaplaceFamily(observed)
    guide(Z)
    with pytest.raises(ModelError, match="4 of 12 values that are impossible"):
        fit(observed, guide, Z + 1)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, IndexError, TypeError])
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
