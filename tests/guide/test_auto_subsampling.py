"""Minibatches: the guide of each is the dense one of its units, and all of them average to the guide of the whole."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.dense_twin import DenseTwin, joint_curvature, loss_and_gradients, marginal_curvature, standard_noise
from helpers.models import counts, normals
from helpers.oracles import Figures, relative_error
from helpers.unit_models import UnitCase
from pyro.infer import Trace_ELBO

import laplace_amort.guide.family
from laplace_amort.autodiff.information import ArrowheadBlocks, arrowhead_information
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.heads import JointCurvature, MarginalCurvature
from laplace_amort.linalg.arrowhead import Arrowhead
from laplace_amort.linalg.repair import RepairReport
from laplace_amort.model.layout import UnitLayout
from laplace_amort.model.unit_model import UnitModel
from laplace_amort.units.modes import FreeMode

figures = Figures()


def poisson(z, size=None, subsample=None, seen=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.Gamma(8.0, 8.0))
    with pyro.plate("units", len(z), subsample_size=size, subsample=subsample) as index:
        if seen is not None:
            seen.append(index.tolist())
        y = pyro.sample("y", dist.LogNormal(mu, tau))
        pyro.sample("z", dist.Poisson(y), obs=z[index])


def visits(z, size=None, num_visits=None, subsample=None):
    """Units of two dimensions at dim -2; the plate of observations inside may be subsampled as well."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", z.shape[-2], subsample_size=size, subsample=subsample, dim=-2) as i:
        level = pyro.sample("level", dist.Normal(mu, 0.5))
        spread = pyro.sample("spread", dist.LogNormal(-0.5, 0.4))
        with pyro.plate("visits", z.shape[-1], subsample_size=num_visits, dim=-1) as j:
            pyro.sample("z", dist.Normal(level, spread), obs=z[i.unsqueeze(-1), j])


def separate_visits(z, unit, num_visits):
    """The units are whole; observations in a plate of their own are subsampled."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", 3):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
    with pyro.plate("visits", len(z), subsample_size=num_visits) as j:
        pyro.sample("z", dist.Poisson(y[..., unit[j]].exp()), obs=z[j])


def poisson_case(num_units=5, **kwargs):
    return UnitCase(poisson, (counts(num_units),), 2, num_units, 1, kwargs=kwargs)


def visits_case(**kwargs):
    return UnitCase(visits, (normals(4, 3),), 1, 4, 2, ("mu",), ("level", "spread"), kwargs)


CASES = {
    "drawn by Pyro": lambda: poisson_case(size=2),
    "all but one": lambda: poisson_case(size=4),
    "one": lambda: poisson_case(size=1),
    "given by the model": lambda: poisson_case(subsample=torch.tensor([3, 0, 4])),
    "whole plate in another order": lambda: poisson_case(subsample=torch.tensor([3, 0, 4, 1, 2])),
    "dim -2": lambda: visits_case(size=3),
    "observations subsampled": lambda: visits_case(num_visits=2),
    "both subsampled": lambda: visits_case(size=3, num_visits=2),
    "separate observations": lambda: UnitCase(separate_visits, (counts(6), torch.arange(6) % 3, 4), 1, 3, 1, ("mu",)),
}
HEADS = {"joint": (JointCurvature, joint_curvature), "marginal": (MarginalCurvature, marginal_curvature)}


def differences(case, guide, head=joint_curvature, elbo=Trace_ELBO()):  # noqa: B008
    """Relative errors of the loss and of its gradient against the dense guide of the same minibatch and noise."""
    guide(*case.args, **case.kwargs)
    batch = case._replace(num_units=guide.layout.num_units)
    noise = standard_noise(elbo.num_particles, batch)
    loss, gradients = loss_and_gradients(elbo, batch, guide, noise)
    indices = {name: plate.indices for name, plate in guide.plates.items()}
    twin = DenseTwin(batch, guide.loc, guide.tail_repair, guide.head_repair, head, indices)
    loc, leaves = guide.loc.detach().clone().requires_grad_(), {}
    if isinstance(guide.mode, FreeMode):
        leaves["AutoLaplaceFamily.mode.loc"] = free = guide.mode.loc.detach().clone().requires_grad_()
        twin.mode = lambda theta: free[indices["units"]].reshape(-1)
    leaves["AutoLaplaceFamily.loc"] = loc
    expected = twin.losses(loc, noise).mean()
    expected.backward()
    yield relative_error(loss, expected)
    assert set(gradients) == set(leaves)
    yield max(relative_error(gradients[name], leaf.grad) for name, leaf in leaves.items())


def check(case, guide, *options):
    for what, error in zip(("loss", "gradient"), differences(case, guide, *options), strict=True):
        assert figures.add(f"{what} of a minibatch", error) < 1e-9, what


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CASES)
def test_a_minibatch_has_the_loss_and_gradient_of_its_dense_twin(name, head):
    strategy, oracle = HEADS[head]
    case = CASES[name]()
    check(case, AutoLaplaceFamily(case.model, head=strategy()), oracle)


@pytest.mark.parametrize("name", ["drawn by Pyro", "dim -2", "observations subsampled"])
def test_vectorized_particles_share_a_minibatch(name):
    case = CASES[name]()
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True)
    check(case, AutoLaplaceFamily(case.model), joint_curvature, elbo)


@pytest.mark.parametrize("name", ["given by the model", "dim -2"])
def test_free_modes_of_a_minibatch(name):
    case = CASES[name]()
    check(case, AutoLaplaceFamily(case.model, mode=FreeMode()))


def test_batches_of_changing_size():
    """Two epochs of 5 units in batches of 2: the last is short."""
    guide = AutoLaplaceFamily(poisson)
    for _ in range(2):
        for batch in torch.randperm(5).split(2):
            check(poisson_case(subsample=batch), guide)
            assert str(guide.layout).startswith(f"unit plate 'units': {len(batch)} of 5 units, dim -1")


def test_plates_made_by_the_user():
    def create_plates(z, **kwargs):
        return pyro.plate("units", 5, subsample=torch.tensor([4, 2]), dim=-1)

    guide = AutoLaplaceFamily(poisson, create_plates=create_plates)
    check(poisson_case(), guide)
    assert guide.plates["units"].indices.tolist() == [4, 2]


def test_guide_inner_runs_and_model_see_the_same_units():
    case, seen = poisson_case(12), []
    guide = AutoLaplaceFamily(case.model)
    loss = Trace_ELBO(num_particles=3).differentiable_loss
    loss(case.model, guide, *case.args, size=3)
    batches = []
    for _ in range(4):
        seen.clear()
        loss(case.model, guide, *case.args, size=3, seen=seen)
        # In each particle the guide looks for sites, with any units; then there is one minibatch for all runs.
        runs = [(batch, len(list(group))) for batch, group in itertools.groupby(seen)]
        assert [count for _, count in runs[::2]] == [1, 1, 1]
        assert min(count for _, count in runs[1::2]) > 2
        assert runs[-1][0] == guide.plates["units"].indices.tolist()
        batches += [tuple(batch) for batch, _ in runs[1::2]]
    assert len(batches) == 12
    assert len(set(batches)) > 6  # each particle has its own


def with_other_units(self, global_, local):
    """An inner run whose minibatch is not that of the guide."""
    others = self.density.with_indices(units=(self.units + 1) % 5)
    return others.evaluate(self.layout.to_sites(global_, local))


def test_other_units_in_the_inner_run_are_found(monkeypatch):
    case = CASES["drawn by Pyro"]()
    guide = AutoLaplaceFamily(case.model)
    monkeypatch.setattr(UnitModel, "log_joint", with_other_units)
    assert min(differences(case, guide)) > 1e-3


# ------------------------------------------------------------------------------------------------ means over batches

MINIBATCHES = {"one": 1, "two": 2, "three": 3, "four": 4}


class Untouched:
    """No repair, and no complaint: the mean of repaired matrices is not the repaired mean."""

    def prepare(self, size, like):
        return self

    def __call__(self, matrix, scale=None):
        return matrix, RepairReport(0.0, 0.0, 0.0, 0, 1)


def make_whole():
    """A guide for batches that a list dictates, started away from the prior mean, and the case of the whole plate."""
    batch = []

    def create_plates(*args, **kwargs):
        return pyro.plate("units", 5, subsample=torch.tensor(batch), dim=-1)

    batch[:] = range(5)
    case = poisson_case()
    guide = AutoLaplaceFamily(case.model, create_plates=create_plates, repair=Untouched())
    guide(*case.args)
    guide.loc.data = torch.tensor([0.4, -0.2])
    return case, guide, batch


def unbiased(case, guide):
    """What a minibatch estimates without bias: S, f, and the sums of what belongs to each unit."""
    gaussian = guide.gaussian(*case.args, **case.kwargs)
    precision, weight = gaussian.precision, gaussian.unit_model.layout.weight
    return {
        "marginal precision of the globals": precision.schur_complement,
        "log joint": gaussian.unit_model.log_joint(gaussian.global_loc, gaussian.local_loc),
        "precision of the units": weight * precision.tail.sum(0),
        "border": weight * precision.border.sum(0),
        "regression": weight * precision.regression.sum(0),
        "mode": weight * gaussian.local_loc.sum(0),
        "head less what the units explain": precision.head - (precision.border.mT @ precision.regression).sum(0),
    }


def mean_of_all_batches(case, guide, batch, size):
    found = []
    for chosen in itertools.combinations(range(5), size):
        batch[:] = chosen
        found.append(unbiased(case, guide))
    return {name: sum(values[name] for values in found) / len(found) for name in found[0]}


def largest_error(actual, expected):
    return max(relative_error(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", MINIBATCHES)
def test_all_minibatches_average_to_the_whole(size):
    """Nothing is random here: the mean is over every minibatch that there is."""
    case, guide, batch = make_whole()
    whole = unbiased(case, guide)
    mean = mean_of_all_batches(case, guide, batch, MINIBATCHES[size])
    assert figures.add("mean of all minibatches", largest_error(mean, whole)) < 1e-9


def unscaled_at_once(log_joint, global_, local):
    """Weights taken out before the Schur complement is formed."""
    head, border, tail = arrowhead_information(log_joint, global_, local)
    return ArrowheadBlocks(head, border / 2.5, tail / 2.5)


def only(field):
    """One-sided: the weight taken out of one of border and tail."""

    def information(log_joint, global_, local):
        blocks = arrowhead_information(log_joint, global_, local)
        return blocks._replace(**{field: getattr(blocks, field) / 2.5})

    return information


def without_weight(self, global_, local, original=UnitModel._run):
    """The inner run does not know that a minibatch stands for more."""
    others = self.density.with_indices(units=self.units)
    with pyro.poutine.scale(scale=1.0):
        return original(UnitModel(others, self.layout, self.units), global_, local) / self.layout.weight


def unscale_by(power):
    original = Arrowhead.unscale
    return lambda self, weight: original(self, weight**power)


GUIDE = laplace_amort.guide.family
WRONG_WEIGHTS = {
    "units keep the weight": (Arrowhead, "unscale", unscale_by(0)),
    "squared": (Arrowhead, "unscale", unscale_by(2)),
    "inverse": (Arrowhead, "unscale", unscale_by(-1)),
    "only of the border": (GUIDE, "arrowhead_information", only("border")),
    "only of the tail": (GUIDE, "arrowhead_information", only("tail")),
    "before the Schur complement": (GUIDE, "arrowhead_information", unscaled_at_once),
    "layout without weight": (UnitLayout, "weight", property(lambda self: 1.0)),
    "log joint without weight": (UnitModel, "_run", without_weight),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_wrong_weights_do_not_average_to_the_whole(wrong, monkeypatch):
    case, guide, batch = make_whole()
    whole = unbiased(case, guide)
    monkeypatch.setattr(*WRONG_WEIGHTS[wrong])
    assert largest_error(mean_of_all_batches(case, guide, batch, 2), whole) > 1e-3


def z_scores(case, guide, whole, num_batches=60):
    """Standardized differences between the means over random minibatches and the whole, 7 numbers."""
    names = "marginal precision of the globals", "log joint", "precision of the units", "border"

    def row(values):
        flat = torch.cat([values[name].reshape(-1) for name in names])
        return torch.cat([flat[:2], flat[3:]])  # S is symmetric

    rows = torch.stack([row(unbiased(case, guide)) for _ in range(num_batches)])
    return (rows.mean(0) - row(whole)) / (rows.std(0) / num_batches**0.5 + 1e-9)  # some are the same in all


@pytest.mark.parametrize("wrong", ["", "squared", "only of the border"])
@torch.no_grad()
def test_minibatches_drawn_by_pyro_have_the_mean_of_the_whole(wrong, monkeypatch):
    """False-alarm rate below 2e-5: one of seven t variables with 59 degrees of freedom exceeds 5.4 in size."""
    case, guide, _ = make_whole()
    whole = unbiased(case, guide)
    case = case._replace(kwargs={"size": 2})
    drawing = AutoLaplaceFamily(case.model, repair=Untouched())
    drawing(*case.args, **case.kwargs)
    drawing.loc.copy_(guide.loc)
    if wrong:
        monkeypatch.setattr(*WRONG_WEIGHTS[wrong])
    assert (float(z_scores(case, drawing, whole).abs().max()) > 5.4) is bool(wrong)
