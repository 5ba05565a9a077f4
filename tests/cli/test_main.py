"""The command line: exit codes, what goes to stdout and what to stderr."""

import importlib.metadata
import io
import os
import subprocess
import sys
import textwrap

import pyro
import pytest
import torch
from helpers.demo_results import demo_result
from pyro.infer import SVI

import laplace_amort
from laplace_amort.cli import main as cli
from laplace_amort.examples import demo, svi_demo, titles

CASES = """\
import pyro
import pyro.distributions as dist
import torch
from laplace_amort import LogJoint, SoftAbs, dual_path_param, observed_information
from laplace_amort.testing import CheckSettings


def model(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def make_guide(detach=False, repair=None):
    def guide(z):
        log_joint = LogJoint(model, z)
        mu = dual_path_param("mu_hat", torch.tensor([0.3]))
        y_hat = ((mu.mean.detach() if detach else mu.mean) + z) / 2
        precision = observed_information(log_joint, mu.curvature, y_hat)
        if repair:
            precision, _ = repair(precision)
        joint = dist.MultivariateNormal(torch.cat([mu.mean, y_hat]), precision_matrix=precision)
        log_joint.sample_sites(pyro.sample("joint", joint, infer={"is_auxiliary": True}))

    return guide


def good():
    return model, make_guide(), (torch.tensor([1.0, -1.0]),)


def with_kwargs():
    return model, make_guide(), [], {"z": torch.tensor([1.0, -1.0])}


strong = SoftAbs(floor=2.0)


def other_repair():
    settings = {"settings": CheckSettings(repair=strong)}
    return model, make_guide(repair=strong), (torch.tensor([1.0, -1.0]),), settings


def untold_repair():
    return other_repair()[:3]


def detached():
    return model, make_guide(detach=True), (torch.tensor([1.0, -1.0]),)


def no_latent():
    def guide():
        pyro.sample("y", dist.Normal(pyro.param("mu_hat", torch.tensor(0.0)), 1.0))

    return (lambda: pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))), guide, ()


def no_sites():
    return model, (lambda z: None), (torch.tensor([1.0, -1.0]),)


def raising():
    raise ValueError("the data is gone")


def pair():
    return model, make_guide()


def bare():
    return model


def not_a_guide():
    return model, None, ()


def bare_argument():
    return model, make_guide(), torch.tensor([1.0, -1.0])


def wrong_kwargs():
    return model, make_guide(), (), ["z"]


number = 3
"""


@pytest.fixture(autouse=True)
def _few_particles(monkeypatch):
    """These tests look at streams and exit codes; the ELBOs may be rough."""
    monkeypatch.setattr(svi_demo, "_EVALUATION", (2, 10))


@pytest.fixture
def seen(monkeypatch):
    """What reaches the demo: its results are made once."""
    calls = []
    monkeypatch.setattr(demo, "run", lambda name, **kwargs: calls.append((name, kwargs)) or demo_result(name))
    return calls


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """A directory with a user's module in it, as the current one."""
    (tmp_path / "cases_of_a_user.py").write_text(CASES)
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("cases_of_a_user", None)


def run(capsys, *arguments):
    code = cli.main(arguments)
    return code, *capsys.readouterr()


def test_version_and_help(capsys):
    assert run(capsys, "--version") == (0, f"laplace-amort {laplace_amort.__version__}\n", "")
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert "laplace-amort check mymodel.py:case" in out
    assert "130  interrupted by Ctrl-C" in out
    code, out, _ = run(capsys, "check", "--help")
    assert code == 0
    assert "(model, guide, args, kwargs)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["demo", "schools"], "invalid choice: 'schools'"),
        (["demo", "--steps", "0"], "0 is not a positive number"),
        (["demo", "--steps", "9"], "--steps are those of SVI:\n    --svi"),
        (["demo", "--svi", "--plot", "a.png"], "--svi prints tables, and draws nothing: leave --plot out"),
        (["demo", "senc", "--svi"], "--svi is for multisite, epil, radon"),
        (["bench", "--sizes", "100"], "there is no command bench: how long fits take on this machine is measured by"),
        (["bench"], "benchmarks/step_cost.py of the repository"),
        (["demo", "--steps", "many"], "invalid"),
        (["demo", "--plot", "a.png", "--no-plot"], "not allowed with argument"),
        (["demo", "--plot", "nowhere/a.png"], "there is no directory nowhere to write the plot to"),
        (["demo", "--plot", "a.xyz"], "the plot's name a.xyz must end in one of"),
        (["demo", "--plot", "a"], "the plot's name a must end in one of"),
        (["check"], "required: FILE.py:FACTORY"),
        (["check", "cases_of_a_user"], "'cases_of_a_user' is not of the form MODULE:FACTORY or FILE.py:FACTORY"),
        (["check", "cases_of_a_user:"], "is not of the form MODULE:FACTORY"),
        (["check", "no_such_module:case"], "module 'no_such_module' cannot be imported: ModuleNotFoundError"),
        (["check", "no_such_file.py:case"], "there is no file no_such_file.py"),
        (["check", "broken_module.py:case"], "file 'broken_module.py' cannot be imported: ZeroDivisionError"),
        (["check", "broken_module:case"], "'broken_module' cannot be imported: ZeroDivisionError"),
        (["check", "cases_of_a_user:absent"], "'cases_of_a_user' has no 'absent'; its functions are: bare, "),
        (["check", "cases_of_a_user:number"], "'number' of 'cases_of_a_user' is a int, not a function"),
        (["check", "cases_of_a_user:raising"], "cases_of_a_user:raising() raised ValueError: the data is gone"),
        (["check", "cases_of_a_user:pair"], "must return (model, guide, args) or (model, guide, args, kwargs); it"),
        (["check", "cases_of_a_user:pair"], "it returned a tuple of 2"),
        (["check", "cases_of_a_user:bare"], "it returned a function"),
        (["check", "cases_of_a_user:not_a_guide"], "guide is a NoneType"),
        (["check", "cases_of_a_user:bare_argument"], "args is a Tensor, write (data,) for one argument"),
        (["check", "cases_of_a_user:wrong_kwargs"], "kwargs is a list of 1"),
    ],
)
def test_wrong_usage(cases, capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_factory_that_raises_shows_where(cases, capsys):
    _, _, err = run(capsys, "check", "cases_of_a_user:raising")
    assert "Traceback" in err
    assert 'raise ValueError("the data is gone")' in err


@pytest.mark.parametrize("factory", ["good", "with_kwargs", "other_repair"])
def test_check_of_a_right_guide(cases, capsys, factory):
    torch.set_default_dtype(torch.float32)
    pyro.param("mu_hat", torch.tensor([5.0]))
    path = list(sys.path)
    code, out, err = run(capsys, "check", f"cases_of_a_user:{factory}")
    assert (code, err) == (0, "")
    assert "ELBO gradient" in out
    assert "FAILED" not in out
    # It ran in float64, with parameters of its own, and left no trace.
    assert torch.get_default_dtype() == torch.float32
    assert pyro.param("mu_hat").tolist() == [5.0]
    assert sys.path == path


def test_check_takes_a_file(cases, capsys):
    path = list(sys.path)
    code, out, _ = run(capsys, "check", str(cases / "cases_of_a_user.py") + ":good")
    assert code == 0
    assert "ELBO gradient" in out
    assert sys.path == path
    assert "cases_of_a_user" not in sys.modules  # a file is not taken for an installed module of its name


@pytest.mark.parametrize("factory", ["detached", "untold_repair"])
def test_check_of_a_wrong_guide_prints_the_table_and_the_failure(cases, capsys, factory):
    code, out, err = run(capsys, "check", f"cases_of_a_user:{factory}")
    assert code == 1
    assert "FAILED" in out
    assert "ELBO gradient" in out
    assert "of the guide did not pass" in err


@pytest.mark.parametrize(
    ("factory", "message"), [("no_latent", "ModelError: the model has no latent"), ("no_sites", "draws no continuous")]
)
def test_check_of_what_cannot_be_checked(cases, capsys, factory, message):
    code, out, err = run(capsys, "check", f"cases_of_a_user:{factory}")
    assert (code, out) == (1, "")
    assert message in err


@pytest.mark.parametrize("name", demo.EXAMPLES)
def test_demo_prints_a_table_and_writes_its_plots(tmp_path, monkeypatch, capsys, seen, name):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "demo", name, "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith(f"{name}: ")
    sites = dict.fromkeys(site for _, site, _ in demo_result(name).yardstick.numbers("local"))
    plots = ["", "_family", *(f"_{site}" for site in sites)]
    assert out.endswith(f"\nPlot: {', '.join(f'{name}{addition}.png' for addition in plots)}\n")
    for addition in plots:
        assert (tmp_path / f"{name}{addition}.png").stat().st_size > 10_000


def test_demo_list_fits_nothing(capsys, monkeypatch):
    monkeypatch.delattr(demo, "run")
    code, out, err = run(capsys, "demo", "--list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == [*demo.EXAMPLES, "senc"]


def test_demo_options_reach_the_run(tmp_path, monkeypatch, capsys, seen):
    path = tmp_path / "own.pdf"
    code, out, _ = run(capsys, "demo", "--seed", "7", "--plot", str(path))
    assert code == 0
    assert seen == [("multisite", {"seed": 7, "progress": True})]
    assert path.read_bytes().startswith(b"%PDF")
    assert f"Plot: {path}, " in out
    drawn = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "demo", "--no-plot")
    assert code == 0
    assert "Plot" not in out
    assert sorted(tmp_path.iterdir()) == drawn


def test_options_of_svi_reach_the_run(tmp_path, monkeypatch, capsys):
    seen, original = [], svi_demo.run
    monkeypatch.setattr(
        svi_demo, "run", lambda *args, **kwargs: seen.append((args, kwargs)) or original(*args, **kwargs)
    )
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "demo", "--svi", "--steps", "2", "--seed", "7", "--quiet")
    assert (code, err) == (0, "")
    assert seen == [(("multisite",), {"steps": 2, "seed": 7, "progress": False})]
    assert out.startswith("multisite: ")
    assert out.count("NUTS") == 3
    assert "Plot" not in out
    assert list(tmp_path.iterdir()) == []


def test_demo_without_matplotlib(tmp_path, monkeypatch, capsys, seen):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "demo")
    assert code == 0
    assert "Plot" not in out
    assert "no plot: plots need matplotlib:\n    python -m pip install 'laplace_amort[plots]'" in err
    code, out, err = run(capsys, "demo", "--plot", "a.png")
    assert (code, out) == (2, "")
    assert "pip install 'laplace_amort[plots]'" in err


def test_a_plot_that_cannot_be_written_comes_after_the_table(tmp_path, capsys, seen):
    (tmp_path / "taken.png").mkdir()
    code, out, err = run(capsys, "demo", "--plot", str(tmp_path / "taken.png"))
    assert code == 1
    assert "log evidence" in out
    assert "the plot could not be written to" in err


def test_an_interrupt_prints_what_was_found(monkeypatch, capsys):
    original, calls = SVI.step, []

    def interrupted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SVI, "step", interrupted)
    code, out, err = run(capsys, "demo", "--svi", "--steps", "9", "--quiet")
    assert code == 130
    assert "Interrupted after 2 of 9 steps" in out
    assert err == "laplace-amort: interrupted\n"


def test_an_interrupt_between_the_fits_prints_the_first(tmp_path, monkeypatch, capsys):
    whole = demo_result("multisite")
    part = {"family": whole.fits["family"]}, {"family": whole.moments["family"]}
    found = demo.DemoResult(whole.yardstick, whole.args, *part, interrupted=True)
    monkeypatch.setattr(demo, "run", lambda *args, **kwargs: found)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "demo", "--quiet")
    assert (code, err) == (130, "laplace-amort: interrupted\n")
    assert "family, FixedDrawELBO():" in out
    assert "Plot: multisite.png, multisite_t.png" in out


def test_an_interrupt_before_anything_was_found(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert run(capsys, "demo", "--no-plot") == (130, "", "laplace-amort: interrupted\n")


class _Output(io.StringIO):
    """Standard output that fails, on top of a file that takes its place afterwards."""

    def __init__(self, error, file):
        super().__init__()
        self.error, self.file = error, file

    def write(self, text):
        raise self.error

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(BrokenPipeError(), 141, ""), (OSError(28, "No space left"), 1, "standard output was not written")],
)
def test_output_that_nobody_takes(error, code, said, tmp_path, monkeypatch, capsys):
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", _Output(error, file))
        assert cli.main(["demo", "--list"]) == code
        file.write("nothing comes here any more")
    assert (tmp_path / "out").read_text() == ""
    assert said in capsys.readouterr().err


def test_a_terminal_that_knows_ascii_only(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setitem(titles.TITLES, "epil", "± \N{MINUS SIGN} é")
    assert cli.main(["demo", "--list"]) == 0
    assert b"+- - ?" in raw.getvalue()


def test_the_command_is_installed():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="laplace-amort")
    assert command.load() is cli.main


def test_in_a_process_of_its_own(tmp_path):
    """No display, every warning an error, and stderr quiet although nobody asked for --quiet."""
    program = textwrap.dedent(
        """
        import sys
        from laplace_amort.cli.main import main
        sys.exit(main(["demo"]))
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={
            "PATH": "",
            "OMP_NUM_THREADS": "1",
            "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        },
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.endswith("Plot: multisite.png, multisite_family.png, multisite_t.png\n")
    assert (tmp_path / "multisite.png").exists()
