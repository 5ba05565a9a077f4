"""Ecological inference: the distribution, the models, the scores, and real precincts whose tables are known."""

import dataclasses
import itertools

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine

from laplace_amort import LogJoint
from laplace_amort.cli.main import main
from laplace_amort.examples import ecological, ecological_demo
from laplace_amort.examples.ecological import PrecinctVotes, choice_rates, draw_choices, overall_rates
from laplace_amort.examples.ecological_plots import tables_figure
from laplace_amort.examples.ecological_scores import Score, TableEstimates, log_evidence, overall_table, score_table

MODELS = [ecological.model, ecological.contextual_model, ecological.shared_scale_model]
VOTERS = torch.tensor([[30.0, 12.0, 0.0], [5.0, 80.0, 4.0], [200.0, 1.0, 7.0], [0.0, 9.0, 0.0]])
VOTES = torch.tensor([[20.0, 12.0, 10.0], [50.0, 30.0, 9.0], [8.0, 100.0, 100.0], [2.0, 3.0, 4.0]])
# Of the contextual model, by 4 chains of NUTS: benchmarks/ecological.py.
NUTS_MEAN = torch.tensor([[0.1613, 0.462, 0.3767], [0.0574, 0.9125, 0.03], [0.0448, 0.8947, 0.0605]])
NUTS_SD = torch.tensor([[0.0044, 0.007, 0.0039], [0.0149, 0.0238, 0.0127], [0.0091, 0.0187, 0.0123]])


def arguments():
    return VOTERS.double(), VOTES.double()


@pytest.fixture(scope="module")
def found():
    """Both models on the real precincts, fitted once."""
    return ecological_demo.run(progress=False)


def test_margins_of_the_truth_are_the_data():
    voters, votes = ecological.data()
    assert voters.shape == votes.shape == (212, 3)
    assert torch.equal(ecological.truth().sum(-1), voters)
    assert torch.equal(ecological.truth().sum(-2), votes)


def test_log_prob_is_that_of_the_mixture():
    voters, votes = arguments()
    logits = torch.randn(4, 3, 3)
    rates = ((voters / voters.sum(-1, keepdim=True)).unsqueeze(-1) * logits.softmax(-1)).sum(-2)
    expected = scipy.stats.multinomial.logpmf(votes.numpy(), voters.sum(-1).numpy(), rates.numpy())
    torch.testing.assert_close(PrecinctVotes(voters, logits).log_prob(votes), torch.from_numpy(expected))


def test_probabilities_sum_to_one():
    voters = torch.tensor([[3.0, 1.0]])
    logits = torch.tensor([[[0.3, -1.0, 2.0], [1.0, 0.0, -0.5]]])
    counts = [c for c in itertools.product(range(5), repeat=3) if sum(c) == 4]
    values = torch.tensor(counts, dtype=torch.float64).unsqueeze(1)
    total = PrecinctVotes(voters, logits).log_prob(values).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


def test_a_race_that_is_absent_has_no_say_and_no_nan():
    voters, votes = arguments()
    logits = torch.randn(4, 3, 3, requires_grad=True)
    PrecinctVotes(voters, logits).log_prob(votes).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[0, 2].any()
    assert logits.grad[0, 1].any()


def test_votes_are_drawn_at_the_rates_of_the_mixture():
    """A chi-square of 200000 votes in each of four precincts; falsely alarmed once in 100000 times."""
    pyro.set_rng_seed(0)
    voters = 1000 * VOTERS.double()
    votes = PrecinctVotes(voters, torch.randn(4, 3, 3)).sample((50,))
    assert votes.shape == (50, 4, 3)
    assert torch.equal(votes.sum(-1), voters.sum(-1).expand(50, 4))
    pyro.set_rng_seed(0)
    logits = torch.randn(4, 3, 3)
    rates = ((voters / voters.sum(-1, keepdim=True)).unsqueeze(-1) * logits.softmax(-1)).sum(-2)
    for total, rate in zip(votes.sum(0), rates, strict=True):
        assert scipy.stats.chisquare(total.numpy(), (total.sum() * rate).numpy()).pvalue > 2.5e-6


def test_shapes_broadcast_and_expand():
    voters, votes = arguments()
    many = PrecinctVotes(voters, torch.zeros(5, 4, 3, 3))
    assert many.batch_shape == (5, 4)
    assert many.expand([2, 5, 4]).log_prob(votes).shape == (2, 5, 4)
    assert many.sample().shape == (5, 4, 3)


def test_no_voters_at_all_are_refused():
    with pytest.raises(ValueError, match="voters"):
        PrecinctVotes(torch.tensor([[-1.0, 2.0]]), torch.zeros(1, 2, 2))


def test_contrasts_of_one_scale_are_those_of_independent_logits():
    voters, votes = arguments()
    log_joint = LogJoint(ecological.shared_scale_model, voters, votes)
    contrast = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    # alpha (3), then beta (3 x 3): mu_rc = alpha_c - alpha_0 + beta_rc - beta_r0.
    parts = torch.cat([torch.kron(torch.ones(3, 1), contrast), torch.kron(torch.eye(3), contrast)], dim=-1)
    prior = dist.MultivariateNormal(torch.zeros(6), 16.0 * parts @ parts.T)
    noise = dist.MultivariateNormal(torch.zeros(2), 0.3**2 * contrast @ contrast.T)
    eta, mu = torch.randn(4, 3, 2), torch.randn(6)
    expected = (
        prior.log_prob(mu)
        + noise.log_prob(eta - mu.reshape(3, 2)).sum()
        + dist.LogNormal(-2.5, 1.2).log_prob(torch.tensor(0.3))
        + torch.tensor(0.3).log()  # of the Jacobian
        + PrecinctVotes(voters, torch.nn.functional.pad(eta, (1, 0))).log_prob(votes).sum()
    )
    values = {"mu": mu, "sigma": torch.tensor(0.3).log(), "eta": eta}
    torch.testing.assert_close(log_joint.evaluate(values), expected)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_particles_at_once_are_particles_one_by_one(model):
    args = arguments()
    singles = [poutine.trace(model).get_trace(*args) for _ in range(3)]
    values = {
        name: torch.stack([trace.nodes[name]["value"] for trace in singles]) for name in singles[0].stochastic_nodes
    }
    for name in set(values) - {"eta", "precincts"}:
        values[name] = values[name].unsqueeze(1)  # (S, 1), as Pyro has it where there is a plate inside
    together = poutine.trace(poutine.condition(model, {k: v for k, v in values.items() if k != "precincts"}))
    expected = sum(trace.log_prob_sum() for trace in singles)
    torch.testing.assert_close(together.get_trace(*args).log_prob_sum(), expected)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_models_draw_votes(model):
    voters, _ = arguments()
    trace = pyro.poutine.trace(model).get_trace(voters)
    votes = trace.nodes["votes"]["value"]
    assert torch.equal(votes.sum(-1), voters.sum(-1))


def test_means_are_linear_in_the_shares():
    voters, votes = arguments()
    site = poutine.trace(ecological.contextual_model).get_trace(voters, votes).nodes
    shares = voters / voters.sum(-1, keepdim=True) - voters.sum(0) / voters.sum()
    mean = site["mu"]["value"] + torch.einsum("rcs,ns->nrc", site["gamma"]["value"], shares[:, 1:])
    torch.testing.assert_close(site["eta"]["fn"].base_dist.loc, mean)
    scale = site["sigma"]["value"][:, None] * site["correlation"]["value"]
    covariance = site["eta"]["fn"].base_dist.covariance_matrix
    torch.testing.assert_close(covariance, (scale @ scale.T).expand(4, 3, 2, 2))


def test_tables_are_drawn_with_the_voters_that_there_are():
    """The mean of 4000 tables against the rates, falsely alarmed at 6 standard errors."""
    pyro.set_rng_seed(0)
    voters, _ = arguments()
    rates = torch.randn(4, 3, 3).softmax(-1)
    tables = draw_choices(voters, rates.expand(4000, 4, 3, 3))
    assert torch.equal(tables.sum(-1), voters.expand(4000, 4, 3))
    expected, error = voters.unsqueeze(-1) * rates, (voters.unsqueeze(-1) * rates * (1 - rates) / 4000).sqrt()
    assert ((tables.mean(0) - expected).abs() <= 6 * error).all()


def estimates_at(rates, voters, label="planted"):
    return TableEstimates.of_rates(label, 1.0, rates.expand(400, *rates.shape), voters)


def test_scores_tell_right_from_wrong():
    pyro.set_rng_seed(0)
    voters = torch.full((40, 2), 1e6)
    rates = torch.rand(40, 2, 3).softmax(-1)
    truth = (rates * voters.unsqueeze(-1)).round()
    right = Score.of(estimates_at(rates, voters), truth)
    assert right.overall_error < 0.01
    assert right.precinct_error < 0.1
    wrong = Score.of(estimates_at(rates.roll(1, dims=-1), voters), truth)
    assert wrong.overall_covered == 0
    assert wrong.precinct_covered < 5  # two shares of a race may be alike
    shift = (rates.roll(1, dims=-1).mean(0) - rates.mean(0)).abs().mean()
    assert abs(wrong.overall_error - 100 * float(shift)) < 0.02


def test_cells_of_few_voters_do_not_count():
    voters = torch.tensor([[1000.0, 49.0], [1000.0, 50.0]])
    rates = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).expand(2, 2, 2)
    truth = torch.stack([torch.tensor([[500.0, 500.0], [49.0, 0.0]]), torch.tensor([[500.0, 500.0], [25.0, 25.0]])])
    assert Score.of(estimates_at(rates, voters), truth).precinct_covered == 100


def test_the_contextual_model_finds_the_truth_and_the_plain_one_does_not(found):
    plain, contextual = (Score.of(estimates, found.truth) for estimates in found.estimates)
    assert plain.overall_covered <= 3
    assert contextual.overall_covered == 9
    assert contextual.overall_error < 0.5 * plain.overall_error
    assert contextual.precinct_covered > 90


def test_the_evidence_knows_it_without_the_truth(found):
    plain, contextual = (log_evidence(estimates.fit) for estimates in found.estimates)
    assert contextual > plain + 5


def test_the_gaussian_is_near_the_posterior_of_nuts(found):
    """Means within 0.75 posterior standard deviations; too wide, as the page says, by 1.8 at most."""
    overall = found.estimates[1].overall
    assert ((overall.mean(0) - NUTS_MEAN).abs() < 0.75 * NUTS_SD).all()
    ratio = overall.std(0) / NUTS_SD
    assert (ratio > 0.9).all()
    assert (ratio < 2.0).all()


def test_what_it_says(found):
    text = str(found)
    assert "same everywhere: CONVERGED" in text
    assert "do not believe them" in text
    assert "contextual: CONVERGED; 9 of 9" in text
    assert "log evidence of 'contextual' is" in text
    stopped = dataclasses.replace(found, estimates=[], interrupted=True)
    assert "nothing was fitted" in str(stopped)


def test_tables_hold_the_numbers(found):
    table = overall_table(found.estimates, found.truth)
    share = 100 * float(found.truth[:, 1, 1].sum() / found.truth[:, 1].sum())
    row = next(line for line in table.splitlines() if line.startswith("black   dem"))
    assert f" {share:.1f} " in row
    assert f"{100 * float(found.estimates[1].overall[:, 1, 1].mean()):.1f} (" in row
    assert "9 of 9" in score_table(found.estimates, found.truth)
    assert "truth" not in overall_table(found.estimates, None)


def test_the_figure_shows_estimates_and_truth(found):
    figure = tables_figure(found.estimates, found.truth)
    upper, lower = (part.get_axes() for part in figure.subfigs)
    assert [axes.get_title() for axes in upper] == ["neither", "Democrat", "Republican"]
    truths = [axes.collections[0].get_segments() for axes in upper]
    overall = found.truth.sum(0) / found.truth.sum((0, 2)).unsqueeze(-1)
    for c, segments in enumerate(truths):
        assert [segment[0][0] for segment in segments] == pytest.approx((100 * overall[:, c]).tolist())
    score = Score.of(found.estimates[1], found.truth)
    assert score.precinct_covered > 0
    counts = [tuple(map(int, axes.get_title().split("\n")[1].split(" in ")[0].split(" of "))) for axes in lower]
    enough = found.truth.sum(-1) >= 50
    assert [of for _, of in counts] == enough.sum(0).tolist()
    assert all(0.8 * of < held <= of for held, of in counts)


def test_the_command_prints_and_draws(found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ecological_demo, "run", lambda **_: found)
    path = tmp_path / "senc.png"
    assert main(["demo", "senc", "--plot", str(path)]) == 0
    assert "9 of 9" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_keeps_what_was_found(found, monkeypatch):
    calls = iter(found.estimates[:1])

    def one_then_stop(*_, **__):
        try:
            return next(calls)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(ecological_demo, "fit_tables", one_then_stop)
    stopped = ecological_demo.run(progress=False)
    assert stopped.interrupted
    assert [estimates.label for estimates in stopped.estimates] == ["same everywhere"]
    assert "log evidence of" not in str(stopped)


def test_estimates_of_others_have_no_fit():
    voters, _ = arguments()
    with pytest.raises(ValueError, match="'theirs' was not fitted here"):
        _ = estimates_at(torch.rand(4, 3, 3).softmax(-1), voters, "theirs").fit


def test_rates_of_all_voters_are_weighted_by_voters():
    voters, _ = arguments()
    rates = choice_rates(torch.randn(7, 4, 3, 2))
    expected = sum(voters[i, :, None] * rates[:, i] for i in range(4)) / voters.sum(0)[:, None]
    torch.testing.assert_close(overall_rates(rates, voters), expected)
