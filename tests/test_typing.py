"""What a type checker makes of users' code: mypy in strict mode, on the package as it is installed."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import laplace_amort

# The quick start and a guide written by hand, as a user with a strict checker would have them.
USER = """
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from laplace_amort import (
    AutoLaplaceFamily, DualPath, Ladder, LogJoint, MarginalCurvature, SoftAbs, check_paths, diagnose, dual_path,
    dual_path_param, fit, observed_information,
)
from laplace_amort.examples.datasets import load, reference
from laplace_amort.plots import marginals_figure, save_figure
from laplace_amort.testing import CheckSettings, check_guide


def hierarchy(z: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 0.5), obs=z)


z = torch.ones(3)
family = AutoLaplaceFamily(hierarchy, head=MarginalCurvature())
result = fit(hierarchy, family, z, objective=Ladder())
diagnosis = diagnose(result, simulations=10)
figure = marginals_figure(result, reference={"mu": torch.randn(100)})
save_figure(figure, "marginals.png")


def mode(theta: Tensor, z: Tensor) -> Tensor:
    return 0.5 * theta + 0.5 * z


def guide(z: Tensor) -> None:
    log_joint = LogJoint(hierarchy, z)
    theta = dual_path_param("theta", torch.tensor(0.1))
    y_hat = mode(theta.mean, z)
    check_paths(theta, y_hat)
    information = observed_information(log_joint, theta.curvature, y_hat)
    precision, repaired = SoftAbs()(information)
    normal = dist.MultivariateNormal(torch.cat([theta.mean.reshape(1), y_hat]), precision_matrix=precision)
    log_joint.sample_sites(pyro.sample("joint", normal, infer={"is_auxiliary": True}))
    inside = (information, precision, repaired.num_repaired)
    REVEALED_INSIDE


report = check_guide(hierarchy, guide, z, settings=CheckSettings(seed=1))


def precision_of(dual: DualPath) -> Tensor:
    return torch.diag(dual.curvature)
"""
INSIDE = {"inside": "tuple[Tensor, Tensor, int]"}
REVEALED = {
    "result": "FitResult",
    "result.status.ok": "bool",
    "result.objective": "float",
    "result.gaussian": "LaplaceGaussian | None",
    "result.posterior": "Posterior",
    "result.posterior.mean()": "dict[str, Tensor]",
    "result.posterior.std()": "dict[str, Tensor]",
    "result.posterior.quantiles([0.5])": "dict[str, Tensor]",
    "result.posterior.sample(10)": "dict[str, Tensor]",
    "result.posterior.log_evidence": "float",
    "result.standard_errors()": "dict[str, Tensor]",
    "result.history[0].objective": "float",
    "result.optima[0].num_starts": "int",
    "family.quantiles([0.05, 0.5, 0.95], z)": "dict[str, Tensor]",
    "family.layout": "UnitLayout | None",
    "diagnosis": "Diagnosis",
    "diagnosis.ok": "bool",
    "diagnosis.findings[0].level": "Level",
    "figure": "Figure",
    "report": "CheckReport",
    "dual_path_param('theta').mean": "Tensor",
    "dual_path_param('theta').curvature": "Tensor",
    "dual_path(z, mean_gain=0.5).mean": "Tensor",
    "dual_path(torch.nn.Parameter(z)).curvature": "Tensor",
    "dual_path({'mu': z}).mean": "dict[str, Tensor]",
    "tuple(dual_path(z))": "tuple[Tensor, ...]",
    "report.rows[0].error": "float",
    "load('epil')": "dict[str, Tensor]",
    "reference('epil').variables['sigma'].mean": "Tensor",
}
# Each a mistake, and the kind of error that tells of it.
MISTAKES = {
    "fit(hierarchy, z, guide=guide)": "arg-type",
    "fit(hierarchy, family, z, starts='many')": "arg-type",
    "fit(hierarchy, family, z, objective=MarginalCurvature())": "arg-type",
    "result.posterior.mean().item()": "attr-defined",
    "result.gaussian.median()": "union-attr",
    "result.converged": "attr-defined",
    "dual_path(z).mean.colour": "attr-defined",
    "AutoLaplaceFamily(hierarchy, heads=MarginalCurvature())": "call-arg",
    "marginals_figure(result, 'mu', 3)": "arg-type",
    "check_guide(hierarchy, guide, z, settings={'seed': 1})": "arg-type",
}
CONFIG = """
[mypy]
strict = True
cache_dir = cache
[mypy-laplace_amort.*]
follow_imports = silent
# What torch imports of itself and no user's type comes from: half of the time.
[mypy-torch._inductor.*,torch._dynamo.*,torch._functorch.*,torch._higher_order_ops.*,torch._export.*,torch.ao.*]
follow_imports = skip
[mypy-torch.distributed.*,torch.fx.*,torch.onnx.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What mypy says of each line: severity, message and kind."""
    directory = tmp_path_factory.mktemp("typing")
    lines = USER.replace("REVEALED_INSIDE", "reveal_type(inside)").splitlines()
    lines += [f"reveal_type({expression})" for expression in REVEALED] + list(MISTAKES)
    (directory / "user.py").write_text("\n".join(lines), encoding="utf-8")
    (directory / "mypy.ini").write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"]
    root = Path(laplace_amort.__path__[0]).parent
    installed = root in [Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")]
    path = {} if installed else {"MYPYPATH": str(root)}  # a checkout that is linked to is invisible to mypy
    run = subprocess.run(command, cwd=directory, env={"PATH": "", **path}, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout + run.stderr  # there are mistakes
    found = {}
    for line in run.stdout.splitlines()[:-1]:
        number, severity, message = re.fullmatch(r"user\.py:(\d+): (\w+): (.*)", line).groups()
        found.setdefault(lines[int(number) - 1].strip(), []).append((severity, message))
    return found


def test_the_package_says_that_it_is_typed():
    assert (Path(laplace_amort.__path__[0]) / "py.typed").is_file()


def test_there_are_no_errors_but_the_planted_ones(said):
    errors = {line for line, messages in said.items() if any(severity == "error" for severity, _ in messages)}
    assert errors == set(MISTAKES)


@pytest.mark.parametrize("expression", [*INSIDE, *REVEALED])
def test_types_are_those_of_the_values(said, expression):
    ((severity, message),) = said[f"reveal_type({expression})"]
    assert severity == "note"
    revealed = re.fullmatch('Revealed type is "(.*)"', message)[1]
    assert re.sub(r"\b(?:\w+\.)+(?=\w)", "", revealed) == {**INSIDE, **REVEALED}[expression]


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_found(said, line):
    assert any(f"[{MISTAKES[line]}]" in message for severity, message in said[line] if severity == "error")
