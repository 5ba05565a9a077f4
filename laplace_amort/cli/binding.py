"""The columns of a table as the arguments of a function, by the names of its parameters."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laplace_amort.cli.columns import Column, Table
from laplace_amort.cli.exits import UsageError

__all__ = ["Arguments", "bind", "check_names"]

_FRAMES = ("data", "frame", "df")  # names of a parameter that gets all columns


@dataclass(frozen=True)
class Arguments:
    """What a function is called with.

    :param inspect.Signature signature: of the function.
    :param dict columns: that it gets, by their own names.
    :param dict sources: the name of a column, by the parameter that it goes to.
    :param dict others: arguments that are no columns, by parameter.
    :param frame: the parameter that gets a dict of all columns; None if there is none.
    :param frozenset indices: names of the columns that are passed as integers.
    """

    signature: inspect.Signature
    columns: Mapping[str, Column]
    sources: Mapping[str, str]
    others: Mapping[str, Any]
    frame: str | None
    indices: frozenset[str]

    def values(self) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, Column]]:
        """Return positional and keyword arguments, and the columns of whole numbers by the ``id`` of their tensors."""
        tensors = {name: column.tensor(name in self.indices) for name, column in self.columns.items()}
        values = {**self.others, **{parameter: tensors[name] for parameter, name in self.sources.items()}}
        if self.frame:
            values[self.frame] = dict(tensors)
        bound = inspect.BoundArguments(self.signature, values)
        bound.apply_defaults()
        whole = {id(tensors[name]): column for name, column in self.columns.items() if column.is_whole}
        return bound.args, bound.kwargs, whole

    def __str__(self) -> str:
        places = dict(self.sources)
        if self.frame:
            places |= {f"{self.frame}['{name}']": name for name in self.columns}
        why = ", integers because the model indexes with them"
        lines = [f"{place}: {self.columns[name]}{why * (name in self.indices)}" for place, name in places.items()]
        return "\n".join(lines + [f"{name}: {value!r}" for name, value in self.others.items()])


def check_names(options: argparse.Namespace, table: Table) -> None:
    """Refuse what is no pair of a name and a value, and names of columns that the table does not have.

    :param options: of the command line.
    :param Table table: the data.
    :raises UsageError: naming the option.
    """
    _pairs(options.arg, "--arg")
    renamed = _pairs(options.map, "--map")
    asked = {"--map": list(renamed.values()), "--categorical": options.categorical, "--index": options.index}
    for option, names in asked.items():
        _check_known(names, table.names, f"{option}: {table.source} has no column")


def bind(function: Callable[..., Any], table: Table, options: argparse.Namespace) -> Arguments:
    """Bind columns and given values to the parameters of a function, once :func:`check_names` has passed the options.

    :param function: a model, or a function that returns one and its arguments.
    :param Table table: the data.
    :param options: of the command line: what the function was typed as, and what goes to its parameters.
    :raises UsageError: if a parameter has nothing to go with it, or something that is typed has no place.
    """
    signature = inspect.signature(getattr(function, "forward", function))
    parameters = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    given, renamed = _pairs(options.arg, "--arg"), _pairs(options.map, "--map")
    for option, texts in ("--arg", given), ("--map", renamed):
        _check_known(texts, parameters, f"{option}: {options.target} has no parameter")
    sources = {name: renamed.get(name, name) for name in parameters if name not in given}
    sources = {name: column for name, column in sources.items() if column in table.names}
    needed = [name for name, p in parameters.items() if name not in {*sources, *given} and p.default is p.empty]
    frame = _frame(needed, table, options.target)
    return Arguments(
        signature=signature,
        columns=_columns(table, list(table.names if frame else dict.fromkeys(sources.values())), options),
        sources=sources,
        others={name: _literal(text) for name, text in given.items()},
        frame=frame,
        indices=frozenset(options.index),
    )


def _pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """Split what is typed as ``name=value``."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (name and value):
            raise UsageError(f"{option} '{text}' is not of the form NAME=VALUE")
        found[name] = value
    return found


def _check_known(names: Iterable[str], known: Iterable[str], problem: str) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"{problem} '{name}'; there are: {', '.join(known) or 'none'}")


def _frame(needed: Sequence[str], table: Table, target: str) -> str | None:
    """The only parameter that nothing goes to, if it is one for all columns; None if everything has its place."""
    if not needed:
        return None
    if not table.names:
        raise UsageError(f"{target} needs {', '.join(needed)}, and there is no data:\n    --data FILE.csv")
    if len(needed) == 1 and needed[0] in _FRAMES:
        return needed[0]
    raise UsageError(
        f"{table.source} has no column{'s' * (len(needed) > 1)} {', '.join(needed)}, which {target} needs; it has "
        f"{', '.join(table.names)}. Say what to pass:\n    --map {needed[0]}=COLUMN\n    --arg {needed[0]}=VALUE"
    )


def _columns(table: Table, used: list[str], options: argparse.Namespace) -> dict[str, Column]:
    """The columns that are used, complete, and whole numbers where they are to be passed as integers."""
    table = table.without_missing(used) if options.drop_missing and used else table
    table.check_complete(used)
    columns = {name: table.column(name, name in options.categorical) for name in used}
    for name in options.index:
        if name in columns and not columns[name].is_whole:
            raise UsageError(f"--index {name}: the column has numbers that are not whole. Number its values instead:\n"
                             f"    --categorical {name}")  # fmt: skip
    return columns


def _literal(text: str) -> Any:
    """A number, a list of numbers as a tensor, or the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if not isinstance(value, list):
        return value
    import torch  # only for a model

    return torch.tensor(value)
