"""The columns of a table as the arguments of a function, by the names of its parameters."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from laplace_amort.cli.columns import Column, Table
from laplace_amort.cli.exits import Stop, UsageError, show_traceback
from laplace_amort.model import init_to_zero

__all__ = ["Arguments", "bind", "call_once", "is_case", "pairs"]

_FRAMES = ("data", "frame", "df")  # names of a parameter that gets all columns


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

    def values(self) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, str]]:
        """Return positional and keyword arguments, and the names of the columns of whole numbers by ``id``."""
        tensors = {column.name: column.tensor(column.name in self.indices) for column in self.all_columns()}
        values = dict(self.others)
        values |= {name: tensors[column.name] for name, column in self.columns.items()}
        if self.frame:
            values[self.frame[0]] = {column.name: tensors[column.name] for column in self.frame[1]}
        bound = inspect.BoundArguments(self.signature, values)
        bound.apply_defaults()
        whole = {id(tensors[column.name]): column.name for column in self.all_columns() if column.is_whole}
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


def bind(
    function: Callable[..., Any],
    target: str,
    table: Table | None,
    *,
    given: Mapping[str, str],
    renamed: Mapping[str, str],
    categorical: Sequence[str],
    indices: Sequence[str],
    drop_missing: bool,
) -> Arguments:
    """Bind columns and given values to the parameters of a function.

    :param function: a model, or a function that returns one and its arguments.
    :param str target: what it was typed as.
    :param Table table: the data; None without.
    :param given: values by parameter, as typed.
    :param renamed: names of columns, by the parameter that they go to.
    :param categorical: columns whose different values are numbered.
    :param indices: columns that are passed as integers.
    :param bool drop_missing: whether to leave rows out in which something is missing.
    :raises UsageError: if a parameter has nothing to go with it, or something that is typed has no place.
    """
    signature = inspect.signature(getattr(function, "forward", function))
    parameters = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    names = table.names if table else []
    where = table.source if table else "no --data"
    _check_known(given, parameters, f"{target} has no parameter", "--arg")
    _check_known(renamed, parameters, f"{target} has no parameter", "--map")
    _check_known(renamed.values(), names, f"{where} has no column", "--map")
    _check_known(categorical, names, f"{where} has no column", "--categorical")
    _check_known(indices, names, f"{where} has no column", "--index")
    sources = {name: renamed.get(name, name) for name in parameters if name not in given}
    sources = {name: column for name, column in sources.items() if column in names}
    needed = [n for n, p in parameters.items() if n not in sources and n not in given and p.default is p.empty]
    frame = needed[0] if table and len(needed) == 1 and needed[0] in _FRAMES else None
    if needed and frame is None:
        if table is None:
            raise UsageError(f"{target} needs {', '.join(needed)}, and there is no data:\n    --data FILE.csv")
        raise UsageError(
            f"{where} has no column{'s' * (len(needed) > 1)} {', '.join(needed)}, which {target} needs; it has "
            f"{', '.join(names)}. Say what to pass:\n    --map {needed[0]}=COLUMN\n    --arg {needed[0]}=VALUE"
        )
    columns: dict[str, Column] = {}
    if table:
        used = list(names if frame else dict.fromkeys(sources.values()))
        table = table.without_missing(used) if drop_missing else table
        table.check_complete(used)
        columns = {name: table.column(name, name in categorical) for name in used}
    _check_whole(columns, indices)
    return Arguments(
        signature=signature,
        columns={name: columns[source] for name, source in sources.items()},
        others={name: _literal(text) for name, text in given.items()},
        frame=(frame, tuple(columns.values())) if frame else None,
        indices=frozenset(indices),
    )


def call_once(function: Callable[..., Any], target: str, arguments: Arguments) -> tuple[Any, Arguments]:
    """Call a function, and find out which columns it indexes with.

    Whole numbers are floating point numbers for a distribution or a product, and integers where they count elements of
    a tensor. So a column is made integers where an operation of torch takes it as integers only.

    :param function: a model, or a function that returns one and its arguments.
    :param str target: what it was typed as.
    :param Arguments arguments: to call it with.
    :return: what it returned, and the arguments with all indices known.
    :raises Stop: if it raises.
    """
    args, kwargs, whole = arguments.values()
    mode = _IntegersWhereNeeded(whole, arguments.all_columns())
    with _own_state(), _errors_of(function, target, arguments), mode:
        returned = function(*args, **kwargs)
        _run_returned(returned)  # the model that it returned, with its columns
    arguments = Arguments(
        arguments.signature, arguments.columns, arguments.others, arguments.frame, arguments.indices | mode.found
    )
    if mode.found and is_case(returned):  # it has passed the others on
        args, kwargs, _ = arguments.values()
        with _own_state(), _errors_of(function, target, arguments):
            returned = function(*args, **kwargs)
    return returned, arguments


def is_case(returned: Any) -> bool:
    """Whether this is a model with its arguments, and not what a model happens to return."""
    return isinstance(returned, tuple) and len(returned) > 1 and callable(returned[0])


def _run_returned(returned: Any) -> None:
    """Run the model of a case, unless something is wrong with the case, which is complained of later."""
    if not is_case(returned) or len(returned) > 4 or not all(callable(guide) for guide in returned[1:-1][:1]):
        return
    args, kwargs = (returned[1], {}) if len(returned) == 2 else (*returned[2:], {})[:2]
    if isinstance(args, tuple | list) and isinstance(kwargs, dict):
        returned[0](*args, **{name: value for name, value in kwargs.items() if name != "settings"})


class _IntegersWhereNeeded(TorchFunctionMode):
    """Calls again with integers what does not take floating point numbers, and keeps for which columns it did.

    :param whole: names of columns by the ``id`` of their tensors.
    :param columns: all of them.
    """

    def __init__(self, whole: Mapping[int, str], columns: Iterable[Column]) -> None:
        super().__init__()
        self.whole = whole
        self.integers = {column.name: column.tensor(True) for column in columns if column.is_whole}
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, and call again if need be."""
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except (IndexError, RuntimeError, TypeError) as error:
            used: set[str] = set()
            again = self._replaced((args, kwargs), used)
            if not used:
                raise
            try:
                result = func(*again[0], **again[1])
            except IndexError:  # the right type, and not the right numbers: that is what to hear of
                self.found |= used
                raise
            except Exception:
                raise error from None
        self.found |= used
        return result

    def _replaced(self, value: Any, used: set[str]) -> Any:
        if isinstance(value, Tensor) and id(value) in self.whole:
            used.add(self.whole[id(value)])
            return self.integers[self.whole[id(value)]]
        if type(value) in (tuple, list):
            return type(value)(self._replaced(item, used) for item in value)
        if type(value) is dict:
            return {key: self._replaced(item, used) for key, item in value.items()}
        return value


@contextmanager
def _own_state() -> Iterator[None]:
    """As a guide sees the model first: every latent at the image of zero, for some cannot be drawn."""
    store, generator = pyro.get_param_store().scope(), torch.random.fork_rng(devices=[])
    with store, generator, torch.no_grad(), InitMessenger(init_to_zero):
        yield


@contextmanager
def _errors_of(function: Callable[..., Any], target: str, arguments: Arguments) -> Iterator[None]:
    try:
        yield
    except Stop:
        raise
    except Exception as error:
        inner = inspect.unwrap(getattr(function, "forward", function))
        show_traceback(error, getattr(getattr(inner, "__code__", None), "co_filename", None))
        raise Stop(f"{target} raised {type(error).__name__}: {error}{_hint(error, arguments)}") from error


def _hint(error: Exception, arguments: Arguments) -> str:
    text, numbers = str(error), [c.name for c in arguments.all_columns() if c.is_whole and not c.labels]
    if isinstance(error, KeyError) and arguments.frame:
        return f"; the columns are: {', '.join(column.name for column in arguments.frame[1])}"
    if not numbers:
        return ""
    if isinstance(error, IndexError) and "must be long" in text:
        return (
            "\nThe model indexes with a column that it has changed before, or keeps in something else. Name that "
            f"column: --index COLUMN, one of {', '.join(numbers)}"
        )
    if isinstance(error, IndexError) and "out of" in text:
        return (
            "\nNumbers are passed as they are. Where a column does not count from 0 without a gap, number its values: "
            f"--categorical COLUMN, one of {', '.join(numbers)}"
        )
    return ""


def _check_known(names: Iterable[str], known: Iterable[str], problem: str, option: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise UsageError(f"{option}: {problem} '{name}'; there are: {', '.join(known) or 'none'}")


def _check_whole(columns: Mapping[str, Column], indices: Iterable[str]) -> None:
    for name in indices:
        if name in columns and not columns[name].is_whole:
            raise UsageError(f"--index {name}: the column has numbers that are not whole. Number its values instead:\n"
                             f"    --categorical {name}")  # fmt: skip


def _literal(text: str) -> Any:
    """A number, a list of numbers as a tensor, or the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return torch.tensor(value) if isinstance(value, list) else value
