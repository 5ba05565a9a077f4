"""The random models of benchmarks/silent.py: two densities of one model, gold of known answers, and what is counted."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from scipy.special import logsumexp

SEEDS = range(32)  # two of each likelihood


@pytest.fixture(scope="module")
def silent():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("silent")


@pytest.fixture(scope="module")
def silent_gold(silent):
    return importlib.import_module("silent_gold")


@pytest.fixture(scope="module")
def silent_density(silent):
    return importlib.import_module("silent_density")


def log_joints(case, rng):
    """The log density of the model and that in NumPy, at one point near the truth."""
    density = case.density
    center = density.unconstrain({name: value[0] for name, value in case.truth.items()})
    values, _ = density.constrain((center + 0.3 * rng.normal(size=density.dim))[None])
    u = rng.normal(size=(density.num_units, density.w.shape[1])) @ density.root(values)[0].T
    sites, jacobian = {name: value[0] for name, value in values.items()}, 0.0
    for name, site in density.sites.items():
        sites[name] = u[:, list(site.columns)]
        if site.fixed is not None:
            sites[name] = sites[name] + values[site.fixed[0]][0]
        if site.standard:
            sites[name] = sites[name] / density.scale(values)[0]
            jacobian = density.num_units * np.log(density.scale(values)[0]).sum()
        if len(site.columns) == 1:
            sites[name] = sites[name][:, 0]
    data = {name: torch.from_numpy(np.asarray(value)) for name, value in sites.items()}
    trace = pyro.poutine.trace(pyro.poutine.condition(case.model, data=data)).get_trace(*case.args())
    return float(trace.log_prob_sum()), density.log_joint(values, u) + jacobian


@pytest.mark.parametrize("seed", SEEDS)
def test_the_density_is_that_of_the_model_up_to_a_constant(silent, seed):
    case, rng = silent.draw_case(seed), np.random.default_rng(seed)
    found = np.array([log_joints(case, rng) for _ in range(4)])
    # torch's log Bessel function of VonMises has an error of 2e-7 for each observation.
    atol = 3e-7 * len(case.density.z) if case.label["likelihood"] == "VonMises" else 1e-8
    np.testing.assert_allclose(np.diff(found[:, 0]), np.diff(found[:, 1]), atol=atol)
    assert np.ptp(found[:, 0]) > 1.0  # points that tell densities apart


def test_seeds_draw_all_kinds(silent):
    labels = [silent.draw_case(seed).label for seed in range(300)]
    assert len({label["likelihood"] for label in labels}) >= 12
    assert {label["k"] for label in labels} == {1, 2, 3}
    assert len({label["scales"] for label in labels}) >= 5
    assert {label["strength"] for label in labels} == {"weak", "medium", "strong"}
    assert {label["dtype"] for label in labels} == {"float32", "float64"}
    assert {label["ragged"] for label in labels} == {True, False}
    assert min(label["units"] for label in labels) == 6
    assert max(label["units"] for label in labels) > 200


def test_a_seed_draws_the_same_model_again(silent):
    one, other = silent.draw_case(7), silent.draw_case(7)
    assert one.label == other.label
    for a, b in zip(one.arrays, other.arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def normal_seed(silent, k):
    return next(seed for seed in range(0, 800, 16) if silent.draw_case(seed).label["k"] == k)


def normal_log_marginal(density, y):
    """The log density of globals of a model with normal observations: the data are normal given them."""
    values, jacobian = density.constrain(y)
    found = density.log_prior(values) + jacobian
    same = density.group[:, None] == density.group
    for place, (mean, root, sigma) in enumerate(
        zip(density.beta(values) @ density.x.T, density.root(values), values["sigma"], strict=True)
    ):
        design = density.w @ root
        cov = same * (design @ design.T) + sigma**2 * np.eye(len(density.z))
        off = density.z - mean
        found[place] -= off @ np.linalg.solve(cov, off) / 2 + np.linalg.slogdet(cov)[1] / 2
    return found


@pytest.mark.parametrize("k", [1, 2, 3])
def test_log_marginal_of_a_normal_model_is_exact(silent, silent_gold, k):
    case = silent.draw_case(normal_seed(silent, k))
    density, rng = case.density, np.random.default_rng(0)
    center = density.unconstrain({name: value[0] for name, value in case.truth.items()})
    y = center + 0.5 * rng.normal(size=(5, density.dim))
    found = silent_gold.Units(density).log_posterior(y, 5)
    np.testing.assert_allclose(found, normal_log_marginal(density, y), rtol=1e-8)


def conjugate(silent_density, num_units=12, each=3):
    """Normal observations with known scales, of which the posterior of the intercept and the slope is normal."""
    priors = importlib.import_module("silent_priors")
    rng = np.random.default_rng(1)

    class Fixed(priors.Real):
        """A prior that holds a number where it is: the scale of what is called known."""

    narrow = {"tau": Fixed(1e-6, loc=0.7), "sigma": Fixed(1e-6, loc=0.5)}
    group = np.repeat(np.arange(num_units), each)
    x = np.stack([np.ones(len(group)), rng.normal(size=len(group))], axis=-1)
    z = x @ [1.0, -0.5] + 0.7 * rng.normal(size=num_units)[group] + 0.5 * rng.normal(size=len(group))
    known = priors.Real(2.0, size=2)
    density = silent_density.Hierarchy(
        {"beta": known, **narrow},
        (("beta", 0), ("beta", 1)),
        (("tau", None),),
        None,
        "Normal",
        x,
        x[:, :1],
        z,
        group,
        num_units,
        {"u": silent_density.UnitSite((0,))},
    )
    truth = {"beta": np.array([[1.0, -0.5]]), "tau": np.array([0.7]), "sigma": np.array([0.5])}
    cov = 0.49 * (group[:, None] == group) + 0.25 * np.eye(len(group))
    precision = x.T @ np.linalg.solve(cov, x) + np.eye(2) / 4
    mean = np.linalg.solve(precision, x.T @ np.linalg.solve(cov, z))
    beta_cov = np.linalg.inv(precision)
    design = (group[:, None] == np.arange(num_units)).astype(float)
    gain = 0.49 * design.T @ np.linalg.inv(cov)
    units = gain @ (z - x @ mean)
    units_cov = 0.49 * np.eye(num_units) - gain @ design * 0.49 + gain @ x @ beta_cov @ x.T @ gain.T
    return density, truth, (mean, beta_cov), (units, np.sqrt(np.diag(units_cov)))


def test_gold_of_a_conjugate_model_is_right(silent_gold, silent_density):
    density, truth, (mean, cov), (unit_mean, unit_sd) = conjugate(silent_density)
    found = silent_gold.gold(3, density, truth)
    assert found.dropped == ""
    assert found.names[:2] == ["beta[0]", "beta[1]"]
    sd = np.sqrt(np.diag(cov))
    # 2500 effective draws at least: five standard errors of the means and of the standard deviations.
    np.testing.assert_allclose((found.mean[:2] - mean) / sd, 0.0, atol=0.1)
    np.testing.assert_allclose(found.sd[:2] / sd, 1.0, atol=0.07)
    # Units are averaged over 400 draws of the globals, and vary but little with these.
    np.testing.assert_allclose((np.array(found.units["u"][0]) - unit_mean) / unit_sd, 0.0, atol=0.15)
    np.testing.assert_allclose(np.array(found.units["u"][1]) / unit_sd, 1.0, atol=0.1)


@pytest.mark.parametrize(("family", "dim"), [("Poisson", 2), ("NegativeBinomial", 3)])
def test_gold_agrees_with_a_grid(silent, silent_gold, family, dim):
    first = list(importlib.import_module("silent_likelihoods").LIKELIHOODS).index(family)
    cases = map(silent.draw_case, range(first, 800, 16))
    case = next(case for case in cases if case.density.dim == dim and case.label["units"] < 40)
    found = silent_gold.gold(case.seed, case.density, case.truth)
    assert found.dropped == ""
    units = silent_gold.Units(case.density)
    proposal = silent_gold._mode(units, case.density.unconstrain({n: v[0] for n, v in case.truth.items()}), 7)
    side = np.linspace(-8, 8, 65 if case.density.dim == 2 else 33)
    grid = np.stack(np.meshgrid(*[side] * case.density.dim), axis=-1).reshape(-1, case.density.dim)
    y = proposal[0] + grid @ proposal[1].T
    log = units.log_posterior(y, 11)
    weight = np.exp(log - logsumexp(log))
    for name, mean, sd in zip(found.names, found.mean, found.sd, strict=True):
        x = silent_gold._elements(case.density, y)[name]
        true_mean = weight @ x
        true_sd = np.sqrt(weight @ (x - true_mean) ** 2)
        assert abs(mean - true_mean) / true_sd < 0.1
        assert abs(sd / true_sd - 1) < 0.08


def test_gold_notices_a_mode_that_the_rules_miss(silent_gold, silent_density):
    density, truth, *_ = conjugate(silent_density, num_units=3, each=1)
    far = silent_gold.Units(density)
    y = density.unconstrain({name: value[0] for name, value in truth.items()})
    log, error = far.sampled(y, 4000, np.random.default_rng(0))
    near = far.integrals(y[None], 7).log[0]
    assert (np.abs(log - near) < 5 * error).all()
    assert (np.abs(log - (near - np.log(2))) > 4 * error + 0.1).all()  # what a rule with half of the mass would have


# ------------------------------------------------------------------------------------------------------------- counts


KNOWN = {
    "names": ["mu", "tau[0]"],
    "mean": [1.0, 2.0],
    "sd": [0.5, 0.1],
    "heavy": [False, False],
    "quantiles": [[[0, 1]] * 3] * 2,
    "units": {"u": [[0.0, 1.0], [1.0, 1.0]]},
}


def posterior_of(mu=1.0, mu_sd=0.5, tau=2.0, u=(0.0, 1.0)):
    means = {"mu": torch.tensor(mu), "tau": torch.tensor([tau]), "u": torch.tensor(u)}
    sds = {"mu": torch.tensor(mu_sd), "tau": torch.tensor([0.1]), "u": torch.ones(2)}
    return SimpleNamespace(mean=lambda: means, std=lambda: sds, k_hat=0.1)


@pytest.fixture
def planted(silent, monkeypatch):
    """Count a fit that has a given posterior and says a given thing of itself."""

    def count(posterior, ok):
        result = SimpleNamespace(
            status=SimpleNamespace(ok=ok, name="SAID"), notes=["a note"], gaussian=object(), posterior=posterior
        )
        monkeypatch.setattr(silent, "fitted", lambda case, objective: result)
        case = SimpleNamespace(seed=0)
        return silent.judged(case, KNOWN, "default", torch.float64, 60)

    return count


@pytest.mark.parametrize(
    ("posterior", "ok", "outcome"),
    [
        (posterior_of(), True, "right"),
        (posterior_of(mu=1.04, mu_sd=0.46), True, "right"),
        (posterior_of(), False, "cried wolf"),
        (posterior_of(mu=1.06), True, "silent"),
        (posterior_of(mu=1.06), False, "warned"),
        (posterior_of(mu_sd=0.44), True, "silent"),
        (posterior_of(tau=float("nan")), True, "silent"),
        (posterior_of(tau=2.02), True, "silent"),
    ],
)
def test_what_is_wrong_and_says_nothing_is_silent(planted, posterior, ok, outcome):
    assert planted(posterior, ok).outcome == outcome


def test_the_worst_miss_has_a_name(planted):
    found = planted(posterior_of(tau=2.03), True)
    assert found.where == "mean of tau[0]"
    assert found.worst == pytest.approx(3.0, rel=1e-4)
    assert found.units == 0.0


def test_units_have_their_own_miss(planted):
    found = planted(posterior_of(u=(0.3, 1.0)), True)
    assert found.outcome == "right"
    assert found.units == pytest.approx(1.5, rel=1e-5)


def test_a_fit_that_raises_is_counted_as_crashed(silent, monkeypatch):
    def raises(case, objective):
        raise RuntimeError("planted")

    monkeypatch.setattr(silent, "fitted", raises)
    found = silent.judged(SimpleNamespace(seed=0), KNOWN, "default", torch.float64, 60)
    assert (found.outcome, found.notes[0]) == ("crashed", "RuntimeError: planted")


def test_a_fit_without_end_is_given_up(silent, monkeypatch):
    def waits(case, objective):
        while True:
            pass

    monkeypatch.setattr(silent, "fitted", waits)
    assert silent.judged(SimpleNamespace(seed=0), KNOWN, "default", torch.float64, 1).outcome == "no end"


def test_counts_add_up(silent, planted, capsys):
    outcomes = [planted(posterior_of(), True), planted(posterior_of(mu=2.0), True), planted(posterior_of(), False)]
    assert silent.counts(outcomes) == {"right": 1, "silent": 1, "cried wolf": 1}
    silent.print_tables(outcomes)
    assert "silent: seed 0 by default: mean of mu misses 20.00 times what is right" in capsys.readouterr().out


def test_a_right_quantile_is_where_its_probability_is(silent):
    pytest.importorskip("pandas")
    import pandas

    known = KNOWN | {"heavy": [True, False], "quantiles": [[[-1.0, 1.0], [2.0, 4.0], [8.0, 10.0]]] * 2}

    def posterior(quantile):
        frame = pandas.DataFrame([[0.0, 1.0, quantile, 3.0, 9.0]], index=["mu"])
        found = posterior_of()
        return SimpleNamespace(mean=found.mean, std=found.std, to_frame=lambda probabilities: frame)

    assert silent.misses_of_globals(posterior(0.5), known)["5% of mu"] == pytest.approx(0.5)
    assert silent.misses_of_globals(posterior(1.5), known)["5% of mu"] == pytest.approx(1.5)
    assert "mean of mu" not in silent.misses_of_globals(posterior(0.5), known)


def test_a_file_of_gold_is_read_by_its_version(silent, tmp_path):
    path = tmp_path / "gold.jsonl"
    rows = [{"version": version, "seed": seed} for version, seed in ((silent.VERSION, 1), (silent.VERSION - 1, 2))]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(silent.known_gold(path)) == [1]
