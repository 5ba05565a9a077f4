"""``laplace-amort check``: the gradient checks on a guide of the user's own."""

from __future__ import annotations

import argparse
from typing import Any

from laplace_amort.cli.targets import check_target
from laplace_amort.cli.words import add_command

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
    """Refuse what is wrong before a guide is there, then check, print every comparison, and return the exit code."""
    check_target(options.target, "FACTORY")
    from laplace_amort.cli.checking import check_and_show  # loads torch

    return check_and_show(options.target)
