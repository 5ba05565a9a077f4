"""What ``laplace-amort check`` does once a factory is named: it is called, and its guide checked."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pyro

from laplace_amort.cli.exits import Exit, UsageError, complain, file_of, users_code
from laplace_amort.cli.targets import Made, describe, expected, importable, load_target, read
from laplace_amort.errors import GuideCheckError
from laplace_amort.testing import CheckSettings, check_guide
from laplace_amort.types import default_dtype

__all__ = ["check_and_show"]


def check_and_show(target: str) -> int:
    """Check, print every comparison, and return the exit code.

    :param str target: the factory, as typed.
    """
    with default_dtype(), importable(Path.cwd()), pyro.get_param_store().scope():
        model, guide, args, kwargs = _case(target)
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
