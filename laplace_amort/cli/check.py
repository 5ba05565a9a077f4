"""``laplace-amort check``: the gradient checks on a guide of the user's own."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pyro

from laplace_amort.cli.exits import Exit, UsageError, complain, file_of, users_code
from laplace_amort.cli.targets import Made, describe, expected, importable, load_target, read
from laplace_amort.cli.words import add_command
from laplace_amort.errors import GuideCheckError
from laplace_amort.testing import CheckSettings, check_guide
from laplace_amort.types import default_dtype

__all__ = ["add_parser", "run"]

_EPILOG = """\
The factory takes no arguments and returns (model, guide, args) or (model, guide, args, kwargs). In mymodel.py:

  def case():
      data = torch.tensor([1.0, 4.0, 2.0])
      return model, guide, (data,)

  laplace-amort check mymodel.py:case

It is called with float64 as default dtype and an empty parameter store. A name without .py is that of a module, which
is also looked for in the current directory: laplace-amort check laplace_amort.examples.multisite:check_case

If the guide repairs its precision by anything but SoftAbs(), say so in kwargs:

      return model, guide, (data,), {"settings": CheckSettings(repair=SoftAbs(floor=0.5))}

Every comparison is printed, whether it passed or not.
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "check",
        run,
        _EPILOG,
        help="check precision and gradients of a hand-written guide",
        description="Check whether a guide has the precision and the ELBO gradient that it should have.",
    )
    parser.add_argument("target", metavar="FILE.py:FACTORY", help="or MODULE:FACTORY, a function without arguments")


def run(options: argparse.Namespace) -> int:
    """Check, print every comparison, and return the exit code."""
    with default_dtype(), importable(Path.cwd()), pyro.get_param_store().scope():
        model, guide, args, kwargs = _case(options.target)
        settings = kwargs.pop("settings", CheckSettings())
        settings = dataclasses.replace(settings, progress=sys.stderr.isatty())
        try:
            print(check_guide(model, guide, *args, settings=settings, **kwargs))
        except GuideCheckError as error:
            if error.report is not None:
                print(error.report)
            return complain(str(error), Exit.FAILED)
    return Exit.OK


def _case(target: str) -> Made:
    """Import the factory, call it and look at what it returned."""
    factory, said, lengths = load_target(target, "FACTORY"), f"{target}()", (3, 4)
    with users_code(f"{said} raised", file_of(factory)):
        returned = factory()
    made = read(returned, said, lengths)
    if not callable(made.guide):
        raise UsageError(f"{expected(said, lengths)}; guide is {describe(made.guide)}")
    return made
