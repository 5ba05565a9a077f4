"""What is fitted: a model of the user's, its guide, and the arguments that come from a table."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_amort import AutoLaplaceFamily, FreeMode, JointCurvature, LaplaceAmortError, MarginalCurvature, NewtonMode
from laplace_amort.cli.binding import Arguments, Typed, bind, pairs
from laplace_amort.cli.calling import call_once
from laplace_amort.cli.columns import Column, Table, read_table
from laplace_amort.cli.exits import Stop, UsageError
from laplace_amort.cli.factories import Made, expected, read
from laplace_amort.cli.targets import describe, load_target, strategy

__all__ = ["HEADS", "MODES", "Case", "prepare"]

MODES = {"newton": NewtonMode(), "free": FreeMode()}
HEADS = {"joint": JointCurvature(), "marginal": MarginalCurvature()}


@dataclass(frozen=True)
class Case:
    """What is fitted.

    :param model: a Pyro model.
    :param AutoLaplaceFamily guide: its guide.
    :param tuple args: arguments of the model.
    :param dict kwargs: its keyword arguments.
    :param tuple columns: of the table, as far as they are used.
    :param str told: how the columns went to the parameters, a line for each.
    """

    model: Callable[..., Any]
    guide: AutoLaplaceFamily
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    columns: tuple[Column, ...]
    told: str

    def check_labels(self, chosen: str) -> None:
        """Find out whether a column has a label for each unit.

        :raises UsageError: if it has not.
        """
        model = self.guide.unit_model(*self.args, **self.kwargs)
        frame = model.layout.frame
        self.labels(frame.name, int(frame.full_size), model.units, chosen)

    def labels(self, plate: str, num_units: int, units: Tensor, chosen: str | None) -> list[str]:
        """Return what to call each unit: by the words of a column that has as many, or by number.

        :param str plate: name of the unit plate.
        :param int num_units: its full size.
        :param Tensor units: numbers of the units.
        :param chosen: a column to take the words from.
        :raises UsageError: if the chosen column has another number of labels.
        """
        fitting = [column for column in self.columns if len(column.labels) == num_units]
        if chosen is not None:
            fitting = [column for column in fitting if column.name == chosen]
            if not fitting:
                raise UsageError(
                    f"--unit-labels {chosen}: plate '{plate}' has {num_units} units, and no column of that name that "
                    "the model gets has as many labels. For a column of numbers, say also\n"
                    f"    --categorical {chosen}"
                )
        elif len(fitting) > 1:  # several could be it: only one that the plate is named after
            fitting = [c for c in fitting if c.name in plate or plate in c.name]
        numbers = [int(unit) for unit in units]
        return [fitting[0].labels[n] for n in numbers] if len(fitting) == 1 else [str(n) for n in numbers]


def prepare(options: argparse.Namespace) -> Case:
    """Load the model, read the data, and bind one to the other.

    :param options: of the command line.
    :raises Stop: if something is wrong with either.
    """
    function = load_target(options.target, "MODEL")
    if isinstance(function, type):
        raise UsageError(f"{options.target} is a class: name an object of it, or a function that makes one")
    table = read_table(options.data, options.separator) if options.data else None
    typed = Typed(
        given=pairs(options.arg, "--arg"),
        renamed=pairs(options.map, "--map"),
        categorical=options.categorical,
        indices=options.index,
        drop_missing=options.drop_missing,
    )
    arguments = bind(function, options.target, table, typed)
    made, arguments = call_once(function, options.target, arguments, functools.partial(_made, options.target))
    if made is None:
        args, kwargs, _ = arguments.values()
        made = Made(functools.partial(function, **kwargs) if kwargs else function, None, args, {})
    guide = _guide(made, options)
    return Case(made.model, guide, made.args, made.kwargs, tuple(arguments.all_columns()), _told(arguments, table))


def _made(target: str, returned: Any) -> Made | None:
    """What a function made; None if it is the model itself, whatever it returned."""
    if not (isinstance(returned, tuple) and len(returned) > 1 and callable(returned[0])):
        return None
    made = read(returned, target, error=Stop)
    if made.guide is not None and not isinstance(made.guide, AutoLaplaceFamily):
        wanted = expected(target, (2, 3, 4))
        raise Stop(f"{wanted}, the guide an AutoLaplaceFamily; it is {describe(made.guide)}")
    return made._replace(kwargs={name: value for name, value in made.kwargs.items() if name != "settings"})


def _told(arguments: Arguments, table: Table | None) -> str:
    lines = []
    if table is not None and arguments.all_columns():
        rows = len(arguments.all_columns()[0].values)
        left = len(table) - rows
        lines.append(f"{rows} rows{f'; {left} left out, in which something is missing' if left else ''}")
    lines.append(str(arguments))
    lines += [
        f"note: nothing is at {gap} in '{column.name}', which the model indexes with: a unit without data? Numbers "
        f"from 0 without a gap are made by --categorical {column.name}"
        for column in arguments.all_columns()
        if column.name in arguments.indices and (gap := column.gap()) is not None
    ]
    return "\n".join(line for line in lines if line)


def _guide(made: Made, options: argparse.Namespace) -> AutoLaplaceFamily:
    typed = [f"--{name}" for name in ("mode", "head", "unit_plate") if getattr(options, name) is not None]
    if made.guide is not None:
        if typed:
            raise UsageError(f"{options.target} returns a guide of its own: leave {typed[0].replace('_', '-')} out")
        found: AutoLaplaceFamily = made.guide
        return found
    settings = {
        "mode": strategy(options.mode or "newton", MODES, "--mode"),
        "head": strategy(options.head or "joint", HEADS, "--head"),
        "unit_plate": options.unit_plate,
    }
    try:
        return AutoLaplaceFamily(made.model, **settings)
    except LaplaceAmortError as error:
        raise UsageError(str(error)) from error
