"""``laplace-amort demo``: real data, beside a long run of NUTS."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from laplace_amort import plots
from laplace_amort.cli.exits import Exit, UsageError, complain, table_of_codes
from laplace_amort.cli.files import check_plot_path
from laplace_amort.cli.settings import positive
from laplace_amort.examples import demo, ecological_demo
from laplace_amort.examples.demo_figure import demo_figure

__all__ = ["add_parser", "run"]


class _Demo(NamedTuple):
    """One demo: a line on it, what fits, and what draws the result."""

    title: str
    fit: Callable[[argparse.Namespace], Any]
    figure: Callable[[Any], Any]


def _fit_problem(options: argparse.Namespace) -> Any:
    return demo.run(options.name, steps=options.steps, seed=options.seed, progress=not options.quiet)


def _fit_tables(options: argparse.Namespace) -> Any:
    return ecological_demo.run(seed=options.seed, progress=not options.quiet)


_DEMOS = {name: _Demo(problem.title, _fit_problem, demo_figure) for name, problem in demo.PROBLEMS.items()} | {
    "senc": _Demo(ecological_demo.TITLE, _fit_tables, ecological_demo.figure)
}
_NAMES = tuple(_DEMOS)


def add_parser(commands: Any) -> None:
    """Add the command."""
    titles = "\n".join(_titles())
    parser = commands.add_parser(
        "demo",
        help="fit real data and compare with a long run of NUTS",
        description="Fit real data by plain SVI with AutoLaplaceFamily: un-amortized, with the joint and with the "
        "marginal head. Print the posteriors beside the reference posterior, and what to believe of them. 'senc' is "
        "ecological inference instead: two models, fitted by Laplace's method, beside the true tables.",
        epilog=f"names:\n{titles}\n\nexample: laplace-amort demo epil --no-plot\n\nIn the first table each global has "
        "the mean and standard deviation of NUTS, and below it those of three\nguides with their errors. The sentences "
        f"at the end say which of them to rely on.\n\nexit codes:\n{table_of_codes()}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", default=_NAMES[0], choices=_NAMES, help=f"which one (default {_NAMES[0]})")
    parser.add_argument("--list", action="store_true", help="list the names, with what each is, and fit nothing")
    parser.add_argument(
        "--steps",
        type=positive,
        default=demo.STEPS,
        help="SVI steps for each guide (default %(default)s; senc has none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    plot = parser.add_mutually_exclusive_group()
    plot.add_argument("--plot", type=Path, metavar="PATH", help="where to write the plot (default ./NAME.png)")
    plot.add_argument("--no-plot", action="store_true", help="write no plot")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fit, print, plot, and return the exit code."""
    if options.list:
        print("\n".join(title.strip() for title in _titles()))
        return Exit.OK
    path = _plot_path(options)  # before the fit: nobody wants to hear of it after
    chosen = _DEMOS[options.name]
    result = chosen.fit(options)
    print(result, flush=True)
    if path is not None:
        try:
            plots.save_figure(chosen.figure(result), path)
        except (OSError, ValueError) as error:
            return complain(f"the plot could not be written to {path}: {error}", Exit.FAILED)
        print(f"\nPlot: {path}")
    return complain("interrupted", Exit.INTERRUPTED) if result.interrupted else Exit.OK


def _titles() -> list[str]:
    width = max(map(len, _NAMES))
    return [f"  {name:<{width}}  {chosen.title}" for name, chosen in _DEMOS.items()]


def _plot_path(options: argparse.Namespace) -> Path | None:
    """Where to write the plot, if it can be drawn at all."""
    if options.no_plot:
        return None
    path = options.plot or Path(f"{options.name}.png")
    try:
        check_plot_path(path)
    except ImportError as error:
        if options.plot is not None:
            raise UsageError(str(error)) from error
        print(f"no plot: {error}", file=sys.stderr)
        return None
    return path
