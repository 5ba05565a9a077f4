"""What is fitted: a model of the user's, its guide, and the arguments that come from a table."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from laplace_amort import AutoLaplaceFamily, LaplaceAmortError
from laplace_amort.cli.binding import Arguments, bind
from laplace_amort.cli.calling import call_once
from laplace_amort.cli.columns import Column, Table
from laplace_amort.cli.exits import Stop, UsageError
from laplace_amort.cli.targets import Made, describe, expected, load_target, read
from laplace_amort.cli.words import strategy

__all__ = ["Case", "prepare"]

_OF_GUIDES = "mode", "head", "unit_plate"  # options


@dataclass(frozen=True)
class Case:
    """What is fitted.

    :param Made made: the model, an ``AutoLaplaceFamily``, and arguments.
    :param columns: of the table, as far as they are used.
    :param str told: how the columns went to the parameters, a line for each.
    """

    made: Made
    columns: Collection[Column]
    told: str

    def labels(self, unit_model: Any, chosen: str | None) -> dict[int, str]:
        """Return what to call each unit, by its number: by the words of a column that has as many, or by number.

        :param unit_model: of the guide, given the data.
        :param chosen: a column to take the words from.
        :raises UsageError: if the chosen column has another number of labels.
        """
        frame = unit_model.layout.frame
        plate, num_units = frame.name, int(frame.full_size)
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
        labels = fitting[0].labels if len(fitting) == 1 else range(num_units)
        return {number: str(labels[number]) for number in unit_model.units.tolist()}


def prepare(options: argparse.Namespace, table: Table) -> Case:
    """Load the model, and bind the data to it.

    :param options: of the command line.
    :param Table table: the data.
    :raises Stop: if something is wrong with either.
    """
    function = load_target(options.target, "MODEL")
    if isinstance(function, type):
        raise UsageError(f"{options.target} is a class: name an object of it, or a function that makes one")
    arguments = bind(function, table, options)
    made, arguments = call_once(function, options.target, arguments, functools.partial(_made, options.target))
    if made is None:
        args, kwargs, _ = arguments.values()
        made = Made(functools.partial(function, **kwargs) if kwargs else function, None, args, {})
    typed = [name.replace("_", "-") for name in _OF_GUIDES if getattr(options, name) is not None]
    if made.guide is None:
        made = made._replace(guide=_guide(made.model, options))
    elif typed:
        raise UsageError(f"{options.target} returns a guide of its own: leave --{typed[0]} out")
    return Case(made, arguments.columns.values(), _told(arguments, len(table)))


def _made(target: str, returned: Any) -> Made | None:
    """What a function made; None if it is the model itself, whatever it returned."""
    if not (isinstance(returned, tuple) and len(returned) > 1 and callable(returned[0])):
        return None
    made = read(returned, target, stop=Stop)
    if made.guide is not None and not isinstance(made.guide, AutoLaplaceFamily):
        wanted = expected(target, (2, 3, 4))
        raise Stop(f"{wanted}, the guide an AutoLaplaceFamily; it is {describe(made.guide)}")
    return made._replace(kwargs={name: value for name, value in made.kwargs.items() if name != "settings"})


def _told(arguments: Arguments, num_rows: int) -> str:
    lines, columns = [str(arguments)], list(arguments.columns.values())
    if columns:
        left = num_rows - len(columns[0].values)
        dropped = f"; {left} left out, in which something is missing" if left else ""
        lines.insert(0, f"{num_rows - left} rows{dropped}")
    lines += [
        f"note: nothing is at {gap} in '{column.name}', which the model indexes with: a unit without data? Numbers "
        f"from 0 without a gap are made by --categorical {column.name}"
        for column in columns
        if column.name in arguments.indices and (gap := column.gap()) is not None
    ]
    return "\n".join(filter(None, lines))


def _guide(model: Callable[..., Any], options: argparse.Namespace) -> AutoLaplaceFamily:
    mode, head = strategy("--mode", options.mode or "newton"), strategy("--head", options.head or "joint")
    try:
        return AutoLaplaceFamily(model, mode, head=head, unit_plate=options.unit_plate)
    except LaplaceAmortError as error:
        raise UsageError(str(error)) from error
