"""The columns of a table as the arguments of a function, by the names of its parameters."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laplace_amort.cli.columns import Column, Table
from laplace_amort.cli.exits import UsageError

__all__ = ["Arguments", "Typed", "bind", "pairs"]

_FRAMES = ("data", "frame", "df")  # names of a parameter that gets all columns


@dataclass(frozen=True)
class Typed:
    """What is typed of the arguments.

    :param dict given: values by parameter.
    :param dict renamed: names of columns, by the parameter that they go to.
    :param categorical: columns whose different values are numbered.
    :param indices: columns that are passed as integers.
    :param bool drop_missing: whether to leave rows out in which something is missing.
    """

    given: Mapping[str, str]
    renamed: Mapping[str, str]
    categorical: Sequence[str]
    indices: Sequence[str]
    drop_missing: bool

    def check(self, target: str, parameters: Iterable[str], table: Table | None) -> None:
        """Refuse names that are those of no parameter, or of no column.

        :raises UsageError: naming it.
        """
        no_parameter, no_column = (
            f"{target} has no parameter",
            f"{table.source if table else 'no --data'} has no column",
        )
        columns = table.names if table else []
        _check_known(self.given, parameters, no_parameter, "--arg")
        _check_known(self.renamed, parameters, no_parameter, "--map")
        _check_known(self.renamed.values(), columns, no_column, "--map")
        _check_known(self.categorical, columns, no_column, "--categorical")
        _check_known(self.indices, columns, no_column, "--index")


@dataclass(frozen=True)
class Arguments:
    """What a function is called with.

    :param inspect.Signature signature: of the function.
    :param dict columns: by parameter.
    :param dict others: arguments that are no columns, by parameter.
    :param frame: the parameter that gets a dict of all columns, and these columns; or None.
    :param frozenset indices: names of the columns that are passed as integers.
    """

    signature: inspect.Signature
    columns: Mapping[str, Column]
    others: Mapping[str, Any]
    frame: tuple[str, tuple[Column, ...]] | None = None
    indices: frozenset[str] = frozenset()

    def all_columns(self) -> list[Column]:
        """Every column that the function gets, once."""
        found = [*self.columns.values(), *(self.frame[1] if self.frame else ())]
        return list({column.name: column for column in found}.values())

    def with_indices(self, names: Iterable[str]) -> Arguments:
        """Return the same with more columns that are passed as integers."""
        return dataclasses.replace(self, indices=self.indices | set(names))

    def values(self) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, Column]]:
        """Return positional and keyword arguments, and the columns of whole numbers by the ``id`` of their tensors."""
        tensors = {column.name: column.tensor(column.name in self.indices) for column in self.all_columns()}
        values = dict(self.others)
        values |= {name: tensors[column.name] for name, column in self.columns.items()}
        if self.frame:
            values[self.frame[0]] = {column.name: tensors[column.name] for column in self.frame[1]}
        bound = inspect.BoundArguments(self.signature, values)
        bound.apply_defaults()
        whole = {id(tensors[column.name]): column for column in self.all_columns() if column.is_whole}
        return bound.args, bound.kwargs, whole

    def __str__(self) -> str:
        lines = [f"{name}: {self._described(column)}" for name, column in self.columns.items()]
        lines += [f"{name}: {value!r}" for name, value in self.others.items()]
        if self.frame:
            lines += [f"{self.frame[0]}['{column.name}']: {self._described(column)}" for column in self.frame[1]]
        return "\n".join(lines)

    def _described(self, column: Column) -> str:
        return f"{column}{', integers because the model indexes with them' * (column.name in self.indices)}"


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """Split what is typed as ``name=value``.

    :raises UsageError: if it is not of that form.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} '{text}' is not of the form NAME=VALUE")
        found[name] = value
    return found


def bind(function: Callable[..., Any], target: str, table: Table | None, typed: Typed) -> Arguments:
    """Bind columns and given values to the parameters of a function.

    :param function: a model, or a function that returns one and its arguments.
    :param str target: what it was typed as.
    :param Table table: the data; None without.
    :param Typed typed: what else is typed.
    :raises UsageError: if a parameter has nothing to go with it, or something that is typed has no place.
    """
    signature = inspect.signature(getattr(function, "forward", function))
    parameters = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    typed.check(target, parameters, table)
    sources = {name: typed.renamed.get(name, name) for name in parameters if name not in typed.given}
    sources = {name: column for name, column in sources.items() if table and column in table.names}
    without = [name for name in parameters if name not in sources and name not in typed.given]
    frame = _frame([name for name in without if parameters[name].default is inspect.Parameter.empty], target, table)
    columns: dict[str, Column] = {}
    if table:
        columns = _columns(table, list(table.names if frame else dict.fromkeys(sources.values())), typed)
    return Arguments(
        signature=signature,
        columns={name: columns[source] for name, source in sources.items()},
        others={name: _literal(text) for name, text in typed.given.items()},
        frame=(frame, tuple(columns.values())) if frame else None,
        indices=frozenset(typed.indices),
    )


def _frame(needed: Sequence[str], target: str, table: Table | None) -> str | None:
    """The only parameter that nothing goes to, if it is one for all columns; None if everything has its place."""
    if not needed:
        return None
    if table is None:
        raise UsageError(f"{target} needs {', '.join(needed)}, and there is no data:\n    --data FILE.csv")
    if len(needed) == 1 and needed[0] in _FRAMES:
        return needed[0]
    raise UsageError(
        f"{table.source} has no column{'s' * (len(needed) > 1)} {', '.join(needed)}, which {target} needs; it has "
        f"{', '.join(table.names)}. Say what to pass:\n    --map {needed[0]}=COLUMN\n    --arg {needed[0]}=VALUE"
    )


def _columns(table: Table, used: list[str], typed: Typed) -> dict[str, Column]:
    """The columns that are used, complete, and whole numbers where they are to be passed as integers."""
    table = table.without_missing(used) if typed.drop_missing else table
    table.check_complete(used)
    columns = {name: table.column(name, name in typed.categorical) for name in used}
    for name in typed.indices:
        if name in columns and not columns[name].is_whole:
            raise UsageError(f"--index {name}: the column has numbers that are not whole. Number its values instead:\n"
                             f"    --categorical {name}")  # fmt: skip
    return columns


def _check_known(names: Iterable[str], known: Iterable[str], problem: str, option: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise UsageError(f"{option}: {problem} '{name}'; there are: {', '.join(known) or 'none'}")


def _literal(text: str) -> Any:
    """A number, a list of numbers as a tensor, or the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return torch.tensor(value) if isinstance(value, list) else value
