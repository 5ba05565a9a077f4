"""``laplace-amort demo``: real data, beside a long run of NUTS."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from laplace_amort.cli.exits import Exit, UsageError, complain
from laplace_amort.cli.files import check_plot_path
from laplace_amort.cli.words import add_command, positive
from laplace_amort.examples.titles import STEPS, TITLES

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Fit real data twice: as the family, the Gaussian with the highest ELBO, and as the best posterior, by a ladder of better
integrals. Print both beside the reference posterior, and what to believe of them. 'senc' is ecological inference
instead: two models, fitted by Laplace's method, beside the true tables.
"""
_EPILOG = """\

In the first table each global has the mean and standard deviation of NUTS, and below it those of the fits with their
errors. The sentences at the end say which of them to rely on. The plot named after the demo has the globals of the best
posterior; those beside it have the globals of the family, and the units.

examples:
  laplace-amort demo epil --no-plot
  laplace-amort demo radon --svi     guides by plain SVI, un-amortized and amortized: a minute or two
"""
_WITHOUT_NUTS = {"senc"}  # beside the truth instead


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        "names:\n" + tabulate([("", *title) for title in TITLES.items()], tablefmt="plain") + f"\n{_EPILOG}",
        help="fit real data and compare with a long run of NUTS",
        description=_DESCRIPTION,
    )
    parser.add_argument("name", nargs="?", default="multisite", choices=TITLES, help="which one (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the names, with what each is, and fit nothing")
    parser.add_argument("--svi", action="store_true", help="fit by plain SVI instead, which takes longer: "
                        "un-amortized, with the joint and with the marginal head; tables only")  # fmt: skip
    parser.add_argument("--steps", type=positive, help=f"of SVI for each guide, with --svi (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    plot = parser.add_mutually_exclusive_group()
    plot.add_argument("--plot", type=Path, metavar="PATH",
                      help="where to write the plot (default ./NAME.png); others are written beside it")  # fmt: skip
    plot.add_argument("--no-plot", action="store_true", help="write no plots")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Fit, print, plot, and return the exit code."""
    if options.list:
        print(tabulate(TITLES.items(), tablefmt="plain"))
        return Exit.OK
    _check(options)
    path = _plot_path(options)  # before the fit: nobody wants to hear of it after
    result = _fit(options)
    print(result, flush=True)
    if path is not None:
        try:
            figures = {path.with_stem(path.stem + addition): drawn for addition, drawn in result.figures().items()}
            from laplace_amort import plots  # loads torch, as the fit has

            for place, figure in figures.items():
                plots.save_figure(figure, place)
        except (OSError, ValueError) as error:
            return complain(f"the plot could not be written to {path}: {error}", Exit.FAILED)
        print(f"\nPlot: {', '.join(map(str, figures))}" if figures else "\nNo plot")
    return complain("interrupted", Exit.INTERRUPTED) if result.interrupted else Exit.OK


def _check(options: argparse.Namespace) -> None:
    """Refuse options that say nothing together."""
    if options.svi and options.name in _WITHOUT_NUTS:
        raise UsageError(f"--svi is for {', '.join(name for name in TITLES if name not in _WITHOUT_NUTS)}")
    if options.svi and options.plot:
        raise UsageError("--svi prints tables, and draws nothing: leave --plot out")
    if options.steps and not options.svi:
        raise UsageError("--steps are those of SVI:\n    --svi")


def _plot_path(options: argparse.Namespace) -> Path | None:
    """Where to write the plot, if it can be drawn at all."""
    if options.no_plot or options.svi:
        return None
    path: Path = options.plot or Path(f"{options.name}.png")
    try:
        check_plot_path(path)
    except UsageError as error:
        if options.plot:
            raise
        print(f"no plot: {error}", file=sys.stderr)
        return None
    return path


def _fit(options: argparse.Namespace) -> Any:
    """Run what is asked for; the result can be printed, has figures, and knows whether it was interrupted."""
    from laplace_amort.examples import demo, ecological_demo, svi_demo  # load torch

    settings = {"seed": options.seed, "progress": not options.quiet}
    if options.svi:
        return svi_demo.run(options.name, steps=options.steps or STEPS, **settings)
    return ecological_demo.run(**settings) if options.name == "senc" else demo.run(options.name, **settings)
