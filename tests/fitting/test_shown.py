"""What is printed of a fit: the verdict, the posterior's table, and how it was found; reprs; notebooks."""

import re
from html.parser import HTMLParser

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fit_models import Interrupt, gaussian, guide_for, kinked, nowhere, poisson, poisson_counts

from laplace_amort import (
    Diagnosis,
    Finding,
    FitStatus,
    FixedDrawELBO,
    Ladder,
    Level,
    MarginalLaplace,
    Posterior,
    Verdict,
    diagnose,
    fit,
)
from laplace_amort.fitting.objectives.laplace import LaplaceFunction

Z = torch.tensor([1.0, 3.0, -0.5, 2.0, 0.3, 1.1, 0.2, -1.0], dtype=torch.float64)


def heavy(z, prior=None):
    """Nothing is known of ``nu`` but its prior, of which a multiple, a logarithm, and nothing else are named."""
    nu = pyro.sample("nu", prior or dist.HalfCauchy(1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2 * nu)
    pyro.deterministic("square", mu**2)
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def rows(shown):
    return {line.split()[0]: line.split()[1:] for line in shown.splitlines() if re.match(r"\S+ +[-\d]", line)}


class Cells(HTMLParser):
    """Tags in their order, of which every one must be closed, and the words in the cells of each row."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.classes = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.classes += [value for name, value in attrs if name == "class"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_verdict_table_and_how_it_was_found():
    result = fit(gaussian, Z)
    verdict, table, how = str(result).split("\n\n")
    assert verdict == str(result.judgement)
    assert table == str(result.table()) == result.posterior.summary()
    assert how == result.how()
    assert how.startswith("found by Ladder(")
    for said in (
        "which took MarginalLaplace()",
        f"CONVERGED: {result.status}",
        f"objective {result.objective:.6g}",
        f"{len(result.history)} evaluations",
        result.posterior.how(),
        *result.notes,
    ):
        assert said in how
    assert "Gaussian" not in table


def test_it_says_nothing_twice():
    """Repairs and kinks are reasons of the verdict."""
    result = fit(kinked, torch.ones(4), objective=MarginalLaplace())
    assert result.notes
    kinks = [note for note in result.notes if note in str(result.judgement)]
    assert kinks
    for note in kinks:
        assert str(result).count(note) == 1
        assert note in result.headline()


def test_an_elbo_is_labelled_as_the_gaussian_that_it_is():
    result = fit(gaussian, Z, objective=FixedDrawELBO(accuracy=0.2))
    label = "Gaussian approximation at the optimum\n"
    assert label in str(result)
    assert label in str(result.posterior)
    assert "<caption>Gaussian approximation at the optimum</caption>" in result._repr_html_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_that_do_not_exist_are_no_numbers(dtype):
    torch.set_default_dtype(dtype)
    result = fit(heavy, Z.to(dtype))
    assert result.verdict is Verdict.NO_MOMENTS
    shown = rows(str(result))
    assert shown["nu"][:2] == shown["double"][:2] == ["-", "-"]
    assert "-" not in shown["nu"][2:] + shown["double"][2:] + shown["mu"] + shown["square"]
    assert "double is a function of nu, and may have no moments" in str(result)
    frame = result.table([0.5]).to_frame()
    assert frame.loc[["nu", "double"], ["mean", "sd"]].isna().all(axis=None)
    assert frame.loc["double", "50%"] == pytest.approx(2 * frame.loc["nu", "50%"], rel=1e-5)
    assert not frame.loc[["mu", "square"]].isna().any(axis=None)


def test_a_mean_that_exists_is_shown_without_a_standard_deviation():
    result = fit(heavy, Z, prior=dist.StudentT(1.9))
    assert result.verdict is Verdict.NO_MOMENTS
    shown = rows(str(result))
    assert shown["nu"][1] == "-"
    assert shown["nu"][0] != "-"
    assert shown["double"][:2] == ["-", "-"]


def test_without_such_tails_there_is_a_number_everywhere():
    result = fit(heavy, Z, prior=dist.HalfNormal(1.0))
    assert result.verdict.ok
    assert "-" not in [cell for row in rows(str(result)).values() for cell in row]


def test_where_there_is_no_posterior():
    result = fit(nowhere, Z)
    assert result.gaussian is None
    shown = str(result)
    assert shown.startswith("NO_POSTERIOR: there is no posterior\n")
    assert "global " not in shown
    assert f"{result.status.name}: {result.status}" in shown
    with pytest.raises(ValueError, match="there is no posterior"):
        result.table()
    assert Cells(result._repr_html_()).rows == []
    assert repr(result).startswith(f"FitResult(NO_POSTERIOR, {result.status.name}, Ladder(")


def test_a_posterior_that_cannot_be_had_is_one_sentence(monkeypatch):
    result = fit(gaussian, Z, objective=MarginalLaplace(), check=False)

    def fails(*_):
        raise torch.linalg.LinAlgError("the draws are singular")

    monkeypatch.setattr(MarginalLaplace, "posterior", fails)
    assert result.summary().split("\n\n")[1] == "there is no posterior: the draws are singular"
    assert '<p class="no-table">there is no posterior: the draws are singular</p>' in result._repr_html_()


def test_an_interrupted_fit_shows_the_gaussian_as_such(monkeypatch):
    Interrupt(monkeypatch, LaplaceFunction, "_evaluate", 3)
    result = fit(heavy, Z)
    assert result.status is FitStatus.INTERRUPTED
    assert "Gaussian approximation where the fit was interrupted\n" in str(result)
    assert "posterior" not in vars(result)
    assert rows(str(result))["mu"]


# ----------------------------------------------------------------------------------------------------------------- repr


def test_reprs_are_one_line_of_what_is_known():
    result = fit(poisson, poisson_counts().double(), objective=MarginalLaplace())
    bare = "FitResult(CONVERGED, MarginalLaplace(), 2 globals, 40 units"
    assert repr(result) == f"{bare})"
    assert set(vars(result)) & {"posterior", "judgement"} == set()
    name, k_hat = result.verdict.name, f"k-hat {result.posterior.k_hat:.2g}"
    assert repr(result) == f"{bare}, {k_hat})".replace("(C", f"({name}, C")
    number = len(result.posterior.globals_.draws)
    assert repr(result.posterior) == f"Posterior(2 globals, 40 units, {number} draws, {k_hat})"
    assert repr(result.problem) == "Problem(poisson, 2 globals, 40 units)"
    # Where the draws have no weights, there is nothing to say of these.
    assert "k-hat" not in repr(fit(gaussian, Z, objective=FixedDrawELBO(accuracy=0.2)).posterior)
    assert repr(result.optima) == f"[Optimum(CONVERGED, objective {result.objective:.6g}, 1 start)]"
    assert repr(diagnose(result, simulations=0)).startswith("Diagnosis(good, ")
    assert repr(Diagnosis((Finding("k-hat", Level.BAD, "0.9", "heavy"),))) == "Diagnosis(bad, 1 finding)"
    for thing in (result.posterior.globals_, result.posterior.units, diagnose(result, simulations=0).unit_tails):
        assert "\n" not in repr(thing)
        assert not re.search(r" at 0x|array|tensor", repr(thing))


def test_the_gaussian_is_labelled_wherever_it_is_shown():
    result = fit(gaussian, Z, objective=MarginalLaplace())
    assert repr(result.gaussian) == "LaplaceGaussian(approximation at the optimum, 1 global, 8 units)"
    loc, sd = result.gaussian.global_loc.item(), result.standard_errors()["mu"].item()
    assert str(result.gaussian).splitlines() == [
        "Gaussian approximation at the optimum, in unconstrained space: 1 global, 8 units",
        f"    mu: {loc:.4g}, sd {sd:.2g}",
    ]


def test_a_gaussian_of_many_globals_is_no_page():
    def many(z):
        b = pyro.sample("b", dist.Normal(torch.zeros(40), 1.0).to_event(1))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(b.sum(-1), 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    lines = str(guide_for(many).gaussian(Z)).splitlines()
    assert len(lines) == 14
    assert lines[-1] == "    and 28 more"


# ------------------------------------------------------------------------------------------------------------ notebooks


def test_notebooks_show_the_same():
    result = fit(gaussian, Z, objective=Ladder())
    html = result._repr_html_()
    assert f"<strong>RIGHT: {Verdict.RIGHT}</strong>. Estimated: " in html
    cells = Cells(html)
    assert "verdict ok" in cells.classes
    assert cells.rows[0] == ["global", "mean", "sd", "5 %", "50 %", "95 %"]
    assert cells.rows[1] == ["mu", *rows(str(result))["mu"]]
    assert Cells(result.posterior._repr_html_()).rows == cells.rows


def test_notebooks_show_reasons_with_code():
    html = fit(heavy, Z)._repr_html_()
    assert "verdict not-ok" in Cells(html).classes
    assert "<code>result.posterior.quantiles([0.05, 0.5, 0.95])</code>" in html
    assert [row[:3] for row in Cells(html).rows if row[0] == "nu"] == [["nu", "-", "-"]]


def test_what_users_name_is_escaped():
    def odd(z):
        mu = pyro.sample("<script>mu & co</script>", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    result = fit(odd, Z, objective=MarginalLaplace())
    html = result._repr_html_() + result.posterior._repr_html_()
    assert "<script>" not in html
    assert html.count('<th scope="row">&lt;script&gt;mu &amp; co&lt;/script&gt;</th>') == 2
    finding = Finding("<b>", Level.DOUBTFUL, "1 < 2", "a & b")
    shown = Diagnosis((finding,), "fit(model, *args, starts=20)")._repr_html_()
    assert Cells(shown).rows[1] == ["<b>", "doubtful", "1 < 2", "a & b"]
    assert "<code>fit(model, *args, starts=20)</code>" in shown
    assert "<strong>It may not fit: &lt;b&gt;.</strong>" in shown


def test_a_file_says_how_far_to_trust_it():
    result = fit(heavy, Z)
    attrs = result.to_arviz(num_samples=10, prior_samples=0, log_likelihood=None).attrs
    assert attrs["verdict"] == "NO_MOMENTS"
    assert attrs["verdict_message"].startswith(f"{Verdict.NO_MOMENTS}\nnu has no mean")
    assert attrs["errors"] == str(result.errors)
    assert isinstance(result.posterior, Posterior)
