"""The pytest plugin: right guides pass, planted bugs fail with the table, and other tests notice nothing of it."""

import textwrap
from importlib.metadata import entry_points

import pytest

from laplace_amort.testing import pytest_plugin  # pytester forgets what suites import; numpy cannot be loaded twice

pytest_plugins = ["pytester"]

# A suite as a user would write it. BUG is replaced by a line of the guide.
SUITE = """
    import pyro, torch
    import pyro.distributions as dist
    import pytest
    from laplace_amort import LogJoint, SoftAbs, dual_path_param, observed_information

    def model(z):
        mu = pyro.sample("mu", dist.Normal(0., 1.))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, 1.))
            pyro.sample("z", dist.Poisson(y.exp()), obs=z)

    def guide(z):
        log_joint = LogJoint(model, z)
        mu = dual_path_param("mu_hat", torch.tensor(0.3))
        y_hat = 0.5 * mu.mean + 0.3 * torch.log1p(z)
        precision = observed_information(log_joint, mu.curvature, y_hat)
        {bug}
        loc = torch.cat([mu.mean.reshape(1), y_hat])
        normal = dist.MultivariateNormal(loc, precision_matrix=precision)
        log_joint.sample_sites(pyro.sample("joint", normal, infer={{"is_auxiliary": True}}))

    @pytest.mark.parametrize("counts", [[1., 4.], [0., 2., 3.]])
    def test_guide(laplace_amort_check, counts):
        assert laplace_amort_check(model, guide, torch.tensor(counts)).ok
"""
DETACHED = "y_hat = y_hat.detach()"
# The curvature of a function of mu alone, in which the mode moves along.
SEEN = """
        (slope,) = torch.autograd.grad(log_joint(mu.mean, y_hat), mu.mean, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, mu.mean, create_graph=True)
        precision = torch.cat([torch.cat([-curvature.reshape(1), precision[0, 1:]])[None], precision[1:]])
"""


def run(pytester, source, *arguments):
    """Run a suite in this process, whose conftest.py asks for the plugin as the page says."""
    pytester.makeconftest('pytest_plugins = ["laplace_amort.testing.pytest_plugin"]')
    pytester.makepyfile(textwrap.dedent(source))
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


def test_pytest_loads_nothing_by_itself():
    """An entry point would load torch at every start of pytest."""
    assert "laplace_amort" not in {point.value.partition(".")[0] for point in entry_points(group="pytest11")}


def test_a_right_guide_passes_for_every_parameter(pytester):
    run(pytester, SUITE.format(bug="")).assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("bug", "row", "hint"),
    [(DETACHED, "*mean of 'y'*FAILED*", "*A path is missing*"), (SEEN, "*partial Hessian*FAILED*", "*Is the Hessian*")],
    ids=["mode detached", "curvature sees the mode"],
)
def test_a_planted_bug_fails_with_the_table_and_the_cure(pytester, bug, row, hint):
    result = run(pytester, SUITE.format(bug=bug))
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*check*where*found*expected*verdict*", row, "* of * checks passed*", hint])
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")  # no traceback through the plugin


def test_what_cannot_be_checked_fails_with_the_reason(pytester):
    source = """
        import pyro, pyro.distributions as dist

        def test_guide(laplace_amort_check):
            laplace_amort_check(lambda: pyro.sample("x", dist.Normal(0., 1.)), lambda: None)
    """
    result = run(pytester, source)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*the guide draws no continuous site*"])


def test_settings_are_passed_on(pytester):
    source = (
        SUITE.format(bug="")
        + """
    def test_tolerance(laplace_amort_check):
        from laplace_amort.testing import CheckSettings
        laplace_amort_check(model, guide, torch.tensor([1.]), settings=CheckSettings(tolerance=1e-30))
    """
    )
    result = run(pytester, source, "-k", "tolerance")
    result.assert_outcomes(failed=1, deselected=2)


def test_the_state_is_clean_inside_and_put_back_after(pytester):
    source = """
        import pyro, torch
        import pyro.distributions as dist

        torch.set_default_dtype(torch.float32)
        pyro.enable_validation(False)
        pyro.clear_param_store()
        mine = pyro.param("mine", torch.ones(2))
        pyro.set_rng_seed(3)
        state = torch.get_rng_state()

        def test_inside(laplace_amort_check):
            assert torch.get_default_dtype() is torch.float64
            assert not list(pyro.get_param_store().keys())
            assert dist.Normal(0., 1.)._validate_args
            first = torch.rand(())
            torch.manual_seed(0)
            assert torch.equal(first, torch.rand(()))
            pyro.param("theirs", torch.zeros(1))

        def test_after():
            assert torch.get_default_dtype() is torch.float32
            assert list(pyro.get_param_store().keys()) == ["mine"]
            assert torch.equal(pyro.param("mine"), mine)
            assert not dist.Normal(0., 1.)._validate_args
            assert torch.equal(torch.get_rng_state(), state)
    """
    run(pytester, source).assert_outcomes(passed=2)


def test_the_state_is_put_back_when_a_test_fails(pytester):
    source = """
        import pyro, torch
        torch.set_default_dtype(torch.float32)
        pyro.clear_param_store()

        def test_inside(laplace_amort_check):
            pyro.param("theirs", torch.zeros(1))
            raise KeyError("a bug of the test")

        def test_after():
            assert torch.get_default_dtype() is torch.float32
            assert not list(pyro.get_param_store().keys())
    """
    run(pytester, source).assert_outcomes(passed=1, failed=1)


def test_it_adds_no_options_and_acts_on_no_test_by_itself():
    assert not [name for name in vars(pytest_plugin) if name.startswith("pytest_")]
    definition = pytest_plugin.laplace_amort_check
    marker = getattr(definition, "_fixture_function_marker", None) or definition._pytestfixturefunction
    assert not marker.autouse
