"""``laplace-amort demo``: real data, beside a long run of NUTS."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from laplace_amort import plots
from laplace_amort.cli.exits import Exit, UsageError, complain, table_of_codes
from laplace_amort.cli.files import check_plot_path
from laplace_amort.cli.settings import positive
from laplace_amort.examples import demo, ecological_demo, svi_demo

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Fit real data twice: as the family, the Gaussian with the highest ELBO, and as the best posterior, by a ladder of better
integrals. Print both beside the reference posterior, and what to believe of them. 'senc' is ecological inference
instead: two models, fitted by Laplace's method, beside the true tables.
"""
_EPILOG = f"""\

In the first table each global has the mean and standard deviation of NUTS, and below it those of the fits with their
errors. The sentences at the end say which of them to rely on. The plot named after the demo has the globals of the best
posterior; those beside it have the globals of the family, and the units.

examples:
  laplace-amort demo epil --no-plot
  laplace-amort demo radon --svi     guides by plain SVI, un-amortized and amortized: a minute or two

exit codes:
{table_of_codes()}
"""


class _Demo(NamedTuple):
    """One demo: a line on it, what fits, and what draws the result: figures by what is added to the file's name."""

    title: str
    fit: Callable[[argparse.Namespace], Any]
    figures: Callable[[Any], Mapping[str, Any]]


def _fit_example(options: argparse.Namespace) -> Any:
    return demo.run(options.name, seed=options.seed, progress=not options.quiet)


def _fit_by_svi(options: argparse.Namespace) -> Any:
    steps = options.steps or svi_demo.STEPS
    return svi_demo.run(options.name, steps=steps, seed=options.seed, progress=not options.quiet)


def _fit_tables(options: argparse.Namespace) -> Any:
    return ecological_demo.run(seed=options.seed, progress=not options.quiet)


def _example_figures(result: demo.DemoResult) -> dict[str, Any]:
    """Draw the globals of each fit, and the units of the last; the figure without an addition is that of the best."""
    if not result.fits:
        return {}
    reference, (*others, (_, best)) = result.yardstick.reference, result.fits.items()
    found = {"": plots.marginals_figure(best, reference=reference)}
    found |= {f"_{label}": plots.marginals_figure(fit, reference=reference) for label, fit in others}
    for site, estimates in result.yardstick.example.raw_estimates(result.args, reference).items():
        found[f"_{site}"] = plots.units_figure(best, site, reference=reference, raw_estimates=estimates)
    return found


def _tables_figure(result: ecological_demo.EcologicalResult) -> dict[str, Any]:
    return {"": ecological_demo.figure(result)} if result.estimates else {}


_DEMOS = {name: _Demo(example.title, _fit_example, _example_figures) for name, example in demo.EXAMPLES.items()} | {
    "senc": _Demo(ecological_demo.TITLE, _fit_tables, _tables_figure)
}
_NAMES = tuple(_DEMOS)


def add_parser(commands: Any) -> None:
    """Add the command."""
    titles = "\n".join(_titles())
    parser = commands.add_parser(
        "demo",
        help="fit real data and compare with a long run of NUTS",
        description=_DESCRIPTION,
        epilog=f"names:\n{titles}\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", default=_NAMES[0], choices=_NAMES, help=f"which one (default {_NAMES[0]})")
    parser.add_argument("--list", action="store_true", help="list the names, with what each is, and fit nothing")
    parser.add_argument("--svi", action="store_true", help="fit by plain SVI instead, which takes longer: "
                        "un-amortized, with the joint and with the marginal head; tables only")  # fmt: skip
    parser.add_argument("--steps", type=positive, help=f"of SVI for each guide, with --svi (default {svi_demo.STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    plot = parser.add_mutually_exclusive_group()
    plot.add_argument("--plot", type=Path, metavar="PATH",
                      help="where to write the plot (default ./NAME.png); others are written beside it")  # fmt: skip
    plot.add_argument("--no-plot", action="store_true", help="write no plots")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fit, print, plot, and return the exit code."""
    if options.list:
        print("\n".join(title.strip() for title in _titles()))
        return Exit.OK
    _check(options)
    path = _plot_path(options)  # before the fit: nobody wants to hear of it after
    chosen = _DEMOS[options.name]
    result = _fit_by_svi(options) if options.svi else chosen.fit(options)
    print(result, flush=True)
    if path is not None:
        try:
            written = _write(chosen.figures(result), path)
        except (OSError, ValueError) as error:
            return complain(f"the plot could not be written to {path}: {error}", Exit.FAILED)
        print(f"\nPlot: {', '.join(map(str, written))}" if written else "\nNo plot")
    return complain("interrupted", Exit.INTERRUPTED) if result.interrupted else Exit.OK


def _titles() -> list[str]:
    width = max(map(len, _NAMES))
    return [f"  {name:<{width}}  {chosen.title}" for name, chosen in _DEMOS.items()]


def _check(options: argparse.Namespace) -> None:
    """Refuse options that say nothing together."""
    if options.svi and options.name not in demo.EXAMPLES:
        raise UsageError(f"--svi is for {', '.join(demo.EXAMPLES)}")
    if options.svi and options.plot:
        raise UsageError("--svi prints tables, and draws nothing: leave --plot out")
    if options.steps and not options.svi:
        raise UsageError("--steps are those of SVI:\n    --svi")


def _plot_path(options: argparse.Namespace) -> Path | None:
    """Where to write the plot, if it can be drawn at all."""
    if options.no_plot or options.svi:
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


def _write(figures: Mapping[str, Any], path: Path) -> list[Path]:
    """Write figures, and return the paths of the files."""
    paths = {path.with_stem(path.stem + addition): figure for addition, figure in figures.items()}
    for place, figure in paths.items():
        plots.save_figure(figure, place)
    return list(paths)
