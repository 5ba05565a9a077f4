"""What is fitted: a model of the user's, its guide, and the arguments that come from a table."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_amort import AutoLaplaceFamily, FreeMode, JointCurvature, LaplaceAmortError, MarginalCurvature, NewtonMode
from laplace_amort.cli.binding import Arguments, bind, call_once, is_case, pairs
from laplace_amort.cli.columns import Column, Table, read_table
from laplace_amort.cli.exits import Stop, UsageError
from laplace_amort.cli.supports import Supports
from laplace_amort.cli.targets import describe, load_target, strategy

__all__ = ["HEADS", "MODES", "Case", "prepare"]

MODES = {"newton": NewtonMode(), "free": FreeMode()}
HEADS = {"joint": JointCurvature(), "marginal": MarginalCurvature()}

_RETURNS = "(model, args), (model, guide, args) or (model, guide, args, kwargs)"


@dataclass(frozen=True)
class Case:
    """What is fitted.

    :param model: a Pyro model.
    :param AutoLaplaceFamily guide: its guide.
    :param tuple args: arguments of the model.
    :param dict kwargs: its keyword arguments.
    :param tuple columns: of the table, as far as they are used.
    :param str told: how the columns went to the parameters, a line for each.
    :param str suspect: what may be wrong with the data, to be told if there is no fit; empty if nothing.
    """

    model: Callable[..., Any]
    guide: AutoLaplaceFamily
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    columns: tuple[Column, ...]
    told: str
    suspect: str

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
    arguments = bind(
        function,
        options.target,
        table,
        given=pairs(options.arg, "--arg"),
        renamed=pairs(options.map, "--map"),
        categorical=options.categorical,
        indices=options.index,
        drop_missing=options.drop_missing,
    )
    with Supports() as supports:
        returned, arguments = call_once(function, options.target, arguments)
    if is_case(returned):
        model, guide, args, kwargs = _returned(options.target, returned)
    else:
        args, kwargs, _ = arguments.values()
        model, guide = (functools.partial(function, **kwargs) if kwargs else function), None
        kwargs = {}
    guide = _guide(model, guide, options)
    return Case(model, guide, args, kwargs, tuple(arguments.all_columns()), _told(arguments, table), supports.found)


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


def _guide(model: Any, guide: AutoLaplaceFamily | None, options: argparse.Namespace) -> AutoLaplaceFamily:
    typed = [f"--{name}" for name in ("mode", "head", "unit_plate") if getattr(options, name) is not None]
    if guide is not None:
        if typed:
            raise UsageError(f"{options.target} returns a guide of its own: leave {typed[0].replace('_', '-')} out")
        return guide
    settings = {
        "mode": strategy(options.mode or "newton", MODES, "--mode"),
        "head": strategy(options.head or "joint", HEADS, "--head"),
        "unit_plate": options.unit_plate,
    }
    try:
        return AutoLaplaceFamily(model, **settings)
    except LaplaceAmortError as error:
        raise UsageError(str(error)) from error


def _returned(target: str, case: tuple[Any, ...]) -> tuple[Any, AutoLaplaceFamily | None, tuple[Any, ...], Any]:
    """What a function returned that makes a model instead of being one."""
    if len(case) not in (2, 3, 4):
        raise Stop(f"{target} must return {_RETURNS}; it returned {describe(case)}")
    model, guide, args, kwargs = (case[0], None, case[1], {}) if len(case) == 2 else (*case, {})[:4]
    if guide is not None and not isinstance(guide, AutoLaplaceFamily):
        raise Stop(f"{target} must return {_RETURNS}, the guide an AutoLaplaceFamily; it is {describe(guide)}")
    if not isinstance(args, tuple | list):
        raise Stop(f"{target} must return {_RETURNS}; args is {describe(args)}, write (data,) for one argument")
    if not isinstance(kwargs, dict):
        raise Stop(f"{target} must return {_RETURNS}; kwargs is {describe(kwargs)}")
    return model, guide, tuple(args), {name: value for name, value in kwargs.items() if name != "settings"}
