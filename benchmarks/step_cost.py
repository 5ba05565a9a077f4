"""What a fit takes on this machine with more and more units, beside steps of plain Pyro's guides on the same data.

Run ``python benchmarks/step_cost.py``, well under a minute; ``--help`` says more.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import PyroOptim
from step_cost_models import BUILT_IN
from tabulate import tabulate
from tqdm import tqdm

import laplace_amort
from laplace_amort import AutoLaplaceFamily, LaplaceAmortError
from laplace_amort.cli.exits import Exit, Stop, complain, file_of, table_of_codes, users_code
from laplace_amort.cli.targets import importable, load_target, read
from laplace_amort.cli.words import STRATEGIES, strategy
from laplace_amort.types import default_dtype

PEERS = {
    guide.__name__: guide
    for guide in (AutoNormal, AutoMultivariateNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal)
}
_DENSE_LATENTS = 3000  # of AutoMultivariateNormal: its matrix, gradient and two moments of Adam are 288 MB
_STEPS, _SECONDS = 30, 1.0  # of a peer, whichever comes first after the least
_LEAST = 3

_EPILOG = f"""\
For each number of units: seconds until the fit has converged, evaluations of the objective with its gradient and
milliseconds for each, and by how much the memory of this process has grown at its peak. For each peer: milliseconds for
one step of plain SVI (Trace_ELBO, one particle, Adam), and how many such steps the whole fit is worth. How many steps a
peer needs is not measured here, nor how good it gets in the end: thousands are usual. Compare fits, not steps, with
benchmarks/rivals, which has Pyro's and NumPyro's guides, NUTS, TMB, lme4 and glmmTMB at equal errors.

A model of your own needs a function of the number of units. In mymodel.py:

  def make(num_units):
      counts = torch.poisson(torch.randn(num_units).exp())
      return model, (counts,)

  python benchmarks/step_cost.py mymodel.py:make --sizes 100,1000 --against AutoNormal
  python benchmarks/step_cost.py logistic --format csv > step_cost.csv

Times are of one run each, on a machine that may do other things: repeat it before you rely on a factor below two.

exit codes:
{table_of_codes()}
"""


@dataclass
class Row:
    """What was measured at one number of units.

    :param int num_units: of the data.
    :param str status: how the fit ended.
    :param float seconds: until it ended, set-up included.
    :param int evaluations: of the objective with its gradient.
    :param float each: seconds for one of these, on average.
    :param float mebibytes: growth of the peak of the memory since the measurements began; NaN where it is not known.
    :param dict steps: seconds for a step of each peer; NaN where it was left out.
    """

    num_units: int
    status: str
    seconds: float
    evaluations: int
    each: float
    mebibytes: float
    steps: dict[str, float] = field(default_factory=dict)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        description="Measure how long a fit takes with more and more units, beside one step of SVI with guides of "
        "plain Pyro on the same data. The default takes well under a minute.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("target", nargs="?", default="poisson", metavar="MODEL",
                       help=f"{', '.join(BUILT_IN)} (default %(default)s), or FILE.py:FACTORY")  # fmt: skip
    found.add_argument("--sizes", type=_sizes, default=[100, 1000, 10000, 100000], metavar="N,N,...",
                       help="numbers of units (default 100,1000,10000,100000)")  # fmt: skip
    found.add_argument("--objective", default="ladder", metavar="NAME",
                       help=f"{', '.join(STRATEGIES['--objective'])}, as of laplace-amort fit")  # fmt: skip
    found.add_argument("--against", type=_peers, default=["AutoNormal", "AutoMultivariateNormal"], metavar="GUIDE,...",
                       help=f"peers of {', '.join(PEERS)}, or none (default the first two)")  # fmt: skip
    found.add_argument("--seed", type=int, default=0, help="of data and fits (default 0)")
    found.add_argument("--format", choices=("table", "csv"), default="table", help="of the output (default table)")
    found.add_argument("--quiet", action="store_true", help="no progress bar")
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = parser().parse_args(argv)
    try:
        return run(options)
    except Stop as stop:
        return complain(str(stop), stop.code)


def run(options: argparse.Namespace) -> int:
    """Measure, print what was measured, and return the exit code."""
    objective = strategy("--objective", options.objective)
    rows: list[Row] = []
    code = Exit.OK
    with default_dtype(), importable(Path.cwd()), torch.random.fork_rng(devices=[]):
        make = BUILT_IN.get(options.target) or load_target(options.target, "FACTORY")
        try:
            measure(rows, options.target, make, objective, options)
        except KeyboardInterrupt:
            code = complain("interrupted: sizes that were done are shown", Exit.INTERRUPTED)
    if rows:
        print(_csv(rows) if options.format == "csv" else _table(rows, options), end="", flush=True)
    if code is Exit.OK and not all(row.status == "CONVERGED" for row in rows):
        return complain("a fit has not converged: its time is that until it gave up", Exit.NOT_CONVERGED)
    return code


def measure(
    rows: list[Row], target: str, make: Callable[..., Any], objective: Any, options: argparse.Namespace
) -> None:
    """Append a row for each size: first all fits, from the smallest on, so that the memory's peak is that of each.

    :param list rows: what is measured is put here.
    :param str target: as typed, for complaints.
    :param make: from the number of units to a model and its arguments.
    :param objective: of the fits.
    :param options: of the command line.
    """
    cases = {}
    total = len(options.sizes) * (1 + len(options.against))
    with tqdm(total=total, file=sys.stderr, leave=False, disable=True if options.quiet else None) as bar:
        bar.set_description("warm-up")  # what torch loads and keeps once is not of any size
        _fitted(options.sizes[0], *_made(target, make, options.sizes[0]), objective, options.seed, 0.0)
        before = _peak()
        for size in options.sizes:
            bar.set_description(f"fit of {size} units")
            pyro.set_rng_seed(options.seed)
            cases[size] = _made(target, make, size)
            rows.append(_fitted(size, *cases[size], objective, options.seed, before))
            bar.update()
        for row in rows:
            for peer in options.against:
                bar.set_description(f"{peer} of {row.num_units} units")
                row.steps[peer] = _step_seconds(PEERS[peer], *cases[row.num_units])
                bar.update()


def _made(target: str, make: Callable[..., Any], size: int) -> tuple[Any, tuple[Any, ...]]:
    with users_code(f"{target}({size}) raised", file_of(make), Stop):
        returned = make(size)
    made = read(returned, f"{target}(num_units)", (2,))
    return made.model, made.args


def _fitted(size: int, model: Any, args: tuple[Any, ...], objective: Any, seed: int, before: float) -> Row:
    with pyro.get_param_store().scope():
        begun = time.perf_counter()
        try:
            result = laplace_amort.fit(
                model, AutoLaplaceFamily(model), *args, objective=objective, seed=seed, progress=False
            )
        except LaplaceAmortError as error:
            raise Stop(f"{size} units: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - begun
    if result.status is laplace_amort.FitStatus.INTERRUPTED:
        raise KeyboardInterrupt
    evaluations = max(len(result.history), 1)
    each = sum(step.seconds for step in result.history) / evaluations
    return Row(size, result.status.name, seconds, evaluations, each, _peak() - before)


def _step_seconds(peer: Callable[..., Any], model: Any, args: tuple[Any, ...]) -> float:
    """The median step, after two that set things up; NaN where the guide would be too large."""
    with pyro.get_param_store().scope():
        if peer is AutoMultivariateNormal and _num_latents(model, args) > _DENSE_LATENTS:
            return float("nan")
        guide = peer(model)
        svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 1e-3}), Trace_ELBO())
        times: list[float] = []
        while len(times) < _LEAST + 2 or (len(times) < _STEPS and sum(times) < _SECONDS):
            begun = time.perf_counter()
            svi.step(*args)
            times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def _num_latents(model: Any, args: tuple[Any, ...]) -> int:
    guide = AutoDiagonalNormal(model)
    guide(*args)
    return int(guide.latent_dim)


def _peak() -> float:
    """The largest resident set of this process so far, in MiB; NaN on a system that does not tell."""
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _table(rows: list[Row], options: argparse.Namespace) -> str:
    peers = list(rows[0].steps)
    headers = ["units", "fit, s", "evaluations", "ms each", "peak, MiB"]
    headers += [part for peer in peers for part in (f"{peer},\nms a step", "the fit\nin steps")]
    body = [
        [row.num_units, f"{row.seconds:.2f}", row.evaluations, f"{1e3 * row.each:.3g}", f"{row.mebibytes:.0f}"]
        + [part for peer in peers if peer in row.steps for part in _beside(row, row.steps[peer])]
        for row in rows
    ]
    parts = [
        f"{options.target}, objective {options.objective}, {_machine()}",
        tabulate(body, headers, colalign=["right"] * len(headers), disable_numparse=True),
    ]
    not_converged = [f"{row.num_units} units: {row.status}" for row in rows if row.status != "CONVERGED"]
    if any(seconds != seconds for row in rows for seconds in row.steps.values()):
        parts.append(f"-: left out, a dense matrix for more than {_DENSE_LATENTS} latents")
    return "\n\n".join([*parts, *not_converged]) + "\n"


def _beside(row: Row, seconds: float) -> list[str]:
    return ["-", "-"] if seconds != seconds else [f"{1e3 * seconds:.3g}", f"{row.seconds / seconds:.0f}"]


def _csv(rows: list[Row]) -> str:
    file = io.StringIO()
    peers = list(rows[0].steps)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["units", "status", "seconds", "evaluations", "seconds_each", "peak_mib", *peers, "machine"])
    for row in rows:
        steps = ["" if s != s else f"{s:.6g}" for s in (row.steps.get(peer, float("nan")) for peer in peers)]
        numbers = [f"{row.seconds:.6g}", row.evaluations, f"{row.each:.6g}", f"{row.mebibytes:.1f}"]
        writer.writerow([row.num_units, row.status, *numbers, *steps, _machine()])
    return file.getvalue()


def _machine() -> str:
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__}, "
        f"laplace_amort {laplace_amort.__version__}"
    )


def _sizes(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.replace("_", "").split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers of units such as 100,1000")
    return found


def _peers(text: str) -> list[str]:
    found = [] if text == "none" else text.split(",")
    for name in found:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"there is no peer '{name}'; there are {', '.join(PEERS)}, or none")
    return found


if __name__ == "__main__":
    sys.exit(main())
