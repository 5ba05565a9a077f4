"""Which rows a table has: elements that vary, correlations of a factor, and what a model computes from globals."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fit_models import guide_for
from pyro.infer.reparam import LocScaleReparam
from pyro.poutine import reparam

from laplace_amort import FixedDrawELBO, MarginalLaplace, fit

Z = torch.tensor([1.0, 3.0, -0.5, 2.0, 0.3, 1.1], dtype=torch.float64)
PAIRS = torch.tensor([[1.0, 0.8], [3.0, 2.2], [-0.5, 0.1], [2.0, 1.0], [0.3, 0.9], [1.1, 1.4]], dtype=torch.float64)


def posterior_of(model, *args, objective=None):
    return fit(model, *args, objective=objective or MarginalLaplace()).posterior


def rows(table):
    """Numbers by name of a table that is printed."""
    lines = [re.split(r" {2,}", line.strip()) for line in str(table).splitlines()]
    start = next(index for index, line in enumerate(lines) if line[0] == "global")
    found = {}
    for line in lines[start + 2 :]:
        if len(line) != len(lines[start]):
            break
        found[line[0]] = line[1:]
    return found


def with_functions(z):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("effect", a.exp() * 3.0)
    pyro.deterministic("pair", torch.stack([2 * a, torch.ones_like(a)], -1))
    pyro.deterministic("matrix", b.unsqueeze(-1) * b.unsqueeze(-2), event_dim=2)
    pyro.deterministic("constant", torch.tensor(5.0))
    pyro.deterministic("step", b[..., 0] > 0.1)
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(a + b.sum(-1), 1.0))
        pyro.deterministic("inside", y + a)
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)
    pyro.deterministic("of_units", y.sum() + a)
    pyro.deterministic("of_units_without_a_graph", y.detach().sum() + a)
    pyro.deterministic("of_units_far_away", a + (y > 100).any())
    written = torch.zeros(2)
    written[0], written[1] = y[..., 0], a
    pyro.deterministic("of_units_in_place", written)
    with pyro.plate("rows", 6):
        pyro.deterministic("row", a * torch.arange(6.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=torch.zeros(6))


def test_deterministic_sites_that_depend_on_globals_alone():
    posterior = posterior_of(with_functions, Z)
    matrix = [f"matrix[{i}, {j}]" for i in range(2) for j in range(2)]
    names = ["a", "b[0]", "b[1]", "effect", "pair[0]", *matrix, "step"]
    table = posterior.table([0.1, 0.5])
    assert table.names == names
    frame = posterior.to_frame([0.1, 0.5])
    assert (list(frame.index), list(frame.columns)) == (names, ["mean", "sd", "10%", "50%"])
    # The draws are those of the globals: what is linear in these, or monotone, has the same numbers.
    assert list(frame.loc["pair[0]"]) == pytest.approx((2 * frame.loc["a"]).tolist())
    globals_, weights = posterior.weighted_globals()
    effect = 3 * globals_[:, 0].exp()
    mean = float(weights @ effect)
    assert frame.loc["effect", "mean"] == pytest.approx(mean)
    assert frame.loc["effect", "sd"] == pytest.approx(float(weights @ (effect - mean) ** 2) ** 0.5)
    assert frame.loc["matrix[0, 1]", "mean"] == pytest.approx(float(weights @ (globals_[:, 1] * globals_[:, 2])))
    assert frame.loc["step", "mean"] == pytest.approx(float(weights @ (globals_[:, 1] > 0.1).to(weights)))
    assert rows(posterior)["effect"] == [f"{x:.4g}" for x in posterior.to_frame().loc["effect"]]


def test_the_constrained_site_of_a_reparameterized_model_has_its_row():
    def model(z):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("arms", 3):
            arm = pyro.sample("arm", dist.Normal(0.0, tau))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(arm.sum(-1, keepdim=True), 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    moved = reparam(model, {"arm": LocScaleReparam(0.0)})
    found = fit(moved, Z, guide=guide_for(moved, unit_plate="units"), objective=MarginalLaplace())
    names = ["tau", *(f"arm_decentered[{i}]" for i in range(3)), *(f"arm[{i}]" for i in range(3))]
    assert found.posterior.table().names == names


def test_correlations_stand_for_a_cholesky_factor():
    def model(z, shapes=()):
        factor = pyro.sample("L", dist.LKJCholesky(2, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2)).to_event(1))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.MultivariateNormal(torch.ones(2), scale_tril=tau.unsqueeze(-1) * factor))
            pyro.sample("z", dist.Normal(y, 0.5).to_event(1), obs=z)

    posterior = posterior_of(model, PAIRS)
    frame = posterior.to_frame()
    assert list(frame.index) == ["corr(L)[1, 0]", "tau[0]", "tau[1]"]
    # Of two variables the correlation is an element of the factor.
    assert list(frame.loc["corr(L)[1, 0]"][:2]) == pytest.approx(
        [float(part["L"][1, 0]) for part in (posterior.mean(), posterior.std())]
    )
    assert "corr(L)[1, 0]" in rows(posterior)


def test_several_factors_have_their_batch_in_the_index():
    def model(z):
        with pyro.plate("groups", 2):
            factor = pyro.sample("L", dist.LKJCholesky(3, 1.0))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(factor[..., 0, 2, :].sum(-1) + factor[..., 1, 1, :].sum(-1), 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    found = fit(model, Z, guide=guide_for(model, unit_plate="units"), objective=MarginalLaplace()).posterior
    below = [(1, 0), (2, 0), (2, 1)]
    assert found.table().names == [f"corr(L)[{group}, {i}, {j}]" for group in range(2) for i, j in below]
    globals_, weights = found.weighted_globals()
    factors = found.gaussian.constrained_globals(globals_)["L"]
    expected = weights @ (factors[:, 1, 2] * factors[:, 1, 1]).sum(-1)
    assert found.to_frame().loc["corr(L)[1, 2, 1]", "mean"] == pytest.approx(float(expected))


def test_a_correlation_matrix_has_its_lower_triangle():
    def model(z):
        matrix = pyro.sample("C", dist.LKJ(2, torch.tensor(2.0)))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.MultivariateNormal(torch.ones(2), matrix))
            pyro.sample("z", dist.Normal(y, 0.5).to_event(1), obs=z)

    assert posterior_of(model, PAIRS).table().names == ["C[1, 0]"]


def test_a_small_global_is_no_constant():
    def model(z):
        tiny = pyro.sample("tiny", dist.Normal(0.0, 1e-12))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(1e12 * tiny + weights[..., 0], 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    assert posterior_of(model, Z).table().names == ["tiny", "weights[0]", "weights[1]"]


def test_large_sites_are_left_out_with_a_line_that_has_them():
    def model(z):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.deterministic("curve", a * torch.arange(65.0))
        pyro.deterministic("design", torch.arange(65.0))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(a, 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    result = fit(model, Z, objective=MarginalLaplace())
    table = result.posterior.table()
    assert table.names == ["a"]
    (note,) = table.notes
    assert note == "'curve' has 65 elements, too many for this table: result.predictive()()['curve']"
    assert eval(note.partition("table: ")[2], {"result": result}).shape[-1] == 65


def branching(z, bad=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    if bad is not None and float(a.detach()) > bad:
        raise ZeroDivisionError("a is too large")
    pyro.deterministic("double", 2 * a)
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(a, 1.0 if float(a.detach()) > -30 else 2.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def test_a_model_that_is_not_recorded_is_run_at_some_draws():
    result = fit(branching, Z, objective=FixedDrawELBO(accuracy=0.2))
    table = result.posterior.table()
    assert table.names == ["a", "double"]
    assert table.notes == ("double: from 256 draws, as each of them takes a run of the model in Python",)
    frame = table.to_frame()
    assert frame.loc["double", "mean"] == pytest.approx(2 * frame.loc["a", "mean"], abs=0.2 * frame.loc["a", "sd"])
    assert frame.loc["double", "sd"] == pytest.approx(2 * frame.loc["a", "sd"], rel=0.2)


def test_a_model_that_does_not_run_at_every_draw_says_so():
    result = fit(branching, Z, 30.0, objective=FixedDrawELBO(accuracy=0.2))
    posterior = result.posterior
    posterior.gaussian.unit_model.density.args = (Z, posterior.mean()["a"].item() + 0.01)
    table = posterior.table()
    assert table.names == ["a"]
    assert "deterministic sites are not in this table, as the model does not run at every draw" in table.notes[0]
    assert "a is too large" in table.notes[0]


def test_a_site_without_a_value_at_some_draws_has_no_numbers():
    def model(z):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.deterministic("root", a.detach().sqrt())
        pyro.deterministic("far", 1e200 * a)
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(a, 3.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z - z.mean())

    shown = rows(posterior_of(model, Z))
    assert shown["root"] == ["-"] * 5
    assert "-" not in [shown["a"][0], shown["far"][0]]


def test_float32():
    torch.set_default_dtype(torch.float32)
    posterior = posterior_of(with_functions, Z.float())
    frame = posterior.to_frame()
    assert "effect" in frame.index
    assert frame.loc["pair[0]", "mean"] == pytest.approx(2 * frame.loc["a", "mean"], rel=1e-5)
    assert frame.loc["a", "mean"] == float(posterior.mean()["a"])


def test_of_new_units():
    posterior = posterior_of(with_functions, Z)
    other = posterior.posterior_for(Z[:2])
    assert other.table().names == posterior.table().names


def test_without_globals():
    def model(z):
        pyro.deterministic("constant", torch.tensor(1.0))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    posterior = posterior_of(model, Z)
    assert posterior.table().names == []
    assert str(posterior.table()) == "there are no globals"
