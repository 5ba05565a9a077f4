"""The command ``laplace-amort``: progress and complaints on stderr, results on stdout."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch

import laplace_amort
from laplace_amort import demo, plots
from laplace_amort.errors import GuideCheckError, LaplaceAmortError

__all__ = ["main"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

_DEMOS = tuple(demo.PROBLEMS)
_EPILOG = """\
examples:
  laplace-amort demo                      44 sites, Student-t effects: well under a minute, a table and a plot
  laplace-amort demo epil --no-plot       59 patients, Poisson counts
  laplace-amort demo radon                919 homes in 85 counties, an intercept and a slope for each
  laplace-amort check mymodel:case        the gradient checks on a guide of your own

exit codes: 0 fine, 1 a check or a fit failed, 2 wrong usage, 130 interrupted
"""
_CHECK_EPILOG = """\
The factory takes no arguments and returns (model, guide, args) or (model, guide, args, kwargs). In mymodel.py:

  def case():
      data = torch.tensor([1.0, 4.0, 2.0])
      return model, guide, (data,)

  laplace-amort check mymodel:case

It is called with float64 as default dtype and an empty parameter store; modules are also looked for in the current
directory. If the guide repairs its precision by anything but SoftAbs(), say so in kwargs:

      return model, guide, (data,), {"settings": CheckSettings(repair=SoftAbs(floor=0.5))}

Every comparison is printed, whether it passed or not; the exit code is 0 if all did.
"""


class _UsageError(Exception):
    """The user asked for something that cannot be; the message goes to stderr."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    :param argv: arguments after the program's name; those of the process by default.
    """
    try:
        options = _parser().parse_args(argv)
        return int(options.run(options))
    except SystemExit as stop:  # argparse has printed help, the version or its complaint
        return stop.code if isinstance(stop.code, int) else OK
    except _UsageError as error:
        return _complain(str(error), USAGE)
    except LaplaceAmortError as error:
        return _complain(f"{type(error).__name__}: {error}", FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="laplace-amort",
        description="The amortized Laplace family for Pyro: guides whose only parameter is where they stand.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {laplace_amort.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    fit = commands.add_parser(
        "demo",
        help="fit real data and compare with a long run of NUTS",
        description="Fit real data by plain SVI with AutoLaplaceFamily: un-amortized, with the joint and with the "
        "marginal head. Print the posteriors beside the reference posterior, and what to believe of them.",
    )
    fit.add_argument("name", nargs="?", default=_DEMOS[0], choices=_DEMOS, help=f"which one (default {_DEMOS[0]})")
    fit.add_argument(
        "--steps", type=_positive, default=demo.STEPS, help="SVI steps for each guide (default %(default)s)"
    )
    fit.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    plot = fit.add_mutually_exclusive_group()
    plot.add_argument("--plot", type=Path, metavar="PATH", help="where to write the plot (default ./NAME.png)")
    plot.add_argument("--no-plot", action="store_true", help="write no plot")
    fit.add_argument("--quiet", action="store_true", help="no progress bars")
    fit.set_defaults(run=_demo)

    check = commands.add_parser(
        "check",
        help="check precision and gradients of a hand-written guide",
        description="Check whether a guide has the precision and the ELBO gradient that it should have.",
        epilog=_CHECK_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("target", metavar="MODULE:FACTORY", help="such as laplace_amort.examples.multisite:check_case")
    check.set_defaults(run=_check)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _demo(options: argparse.Namespace) -> int:
    path = _plot_path(options)  # before the fit: nobody wants to hear of it after
    result = demo.run(options.name, steps=options.steps, seed=options.seed, progress=not options.quiet)
    print(result, flush=True)
    if path is not None:
        try:
            plots.save_figure(plots.demo_figure(result), path)
        except (OSError, ValueError) as error:
            return _complain(f"the plot could not be written to {path}: {error}", FAILED)
        print(f"\nPlot: {path}")
    return _complain("interrupted", INTERRUPTED) if result.interrupted else OK


def _plot_path(options: argparse.Namespace) -> Path | None:
    """Where to write the plot, if it can be drawn at all."""
    if options.no_plot:
        return None
    try:
        matplotlib = plots.require_matplotlib()
    except ImportError as error:
        if options.plot is not None:
            raise _UsageError(str(error)) from error
        print(f"no plot: {error}", file=sys.stderr)
        return None
    path = options.plot or Path(f"{options.name}.png")
    if not path.parent.is_dir():
        raise _UsageError(f"there is no directory {path.parent} to write the plot to")
    formats = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise _UsageError(f"the plot's name {path.name} must end in one of {', '.join('.' + name for name in formats)}")
    return path


def _check(options: argparse.Namespace) -> int:
    from laplace_amort.testing import CheckSettings, check_guide  # a room that fitting does not need

    with _float64(), _current_directory_importable(), pyro.get_param_store().scope():
        model, guide, args, kwargs = _case(options.target)
        settings = kwargs.pop("settings", CheckSettings())
        settings = dataclasses.replace(settings, progress=sys.stderr.isatty())
        try:
            print(check_guide(model, guide, *args, settings=settings, **kwargs))
        except GuideCheckError as error:
            if error.report is not None:
                print(error.report)
            return _complain(str(error), FAILED)
    return OK


def _case(target: str) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Import the factory, call it and look at what it returned."""
    module_name, colon, factory_name = target.partition(":")
    if not (module_name and colon and factory_name):
        raise _UsageError(f"'{target}' is not of the form MODULE:FACTORY, such as mymodel:case")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if not isinstance(error, ImportError):  # the module is there, and its own code failed
            traceback.print_exc()
        raise _UsageError(f"module '{module_name}' cannot be imported: {type(error).__name__}: {error}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        problem = "has no" if factory is None else "has something that is not a function as"
        raise _UsageError(f"module '{module_name}' {problem} '{factory_name}'")
    try:
        case = factory()
    except Exception as error:
        traceback.print_exc()
        raise _UsageError(f"{target}() raised {type(error).__name__}: {error}") from error
    expected = "(model, guide, args) or (model, guide, args, kwargs)"
    if not isinstance(case, tuple) or len(case) not in (3, 4):
        raise _UsageError(f"{target}() must return {expected}; it returned {_describe(case)}")
    model, guide, args, kwargs = (*case, {})[:4]
    for name, value, wanted in (("model", model, Callable), ("guide", guide, Callable), ("kwargs", kwargs, dict)):
        if not isinstance(value, wanted):  # type: ignore[arg-type]
            raise _UsageError(f"{target}() must return {expected}; {name} is {_describe(value)}")
    if not isinstance(args, tuple | list):
        raise _UsageError(
            f"{target}() must return {expected}; args is {_describe(args)}, write (data,) for one argument"
        )
    return model, guide, tuple(args), dict(kwargs)


def _describe(value: object) -> str:
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, tuple | list) else f"a {kind}"


def _complain(message: str, code: int) -> int:
    print(f"laplace-amort: {message}", file=sys.stderr)
    return code


@contextmanager
def _float64() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
