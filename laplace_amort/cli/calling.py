"""The first call of a function of the user's: what it makes, and which columns it indexes with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

from laplace_amort.cli.binding import Arguments
from laplace_amort.cli.columns import Column
from laplace_amort.cli.exits import Stop, file_of, users_code
from laplace_amort.cli.targets import Made

__all__ = ["call_once"]

# Which argument of a function of torch counts elements, and so takes integers only: its place and its names.
_INDEX: dict[str, tuple[int, tuple[str, ...]]] = {
    **dict.fromkeys(("__getitem__", "__setitem__"), (1, ())),
    **dict.fromkeys(("repeat_interleave", "take", "take_along_dim"), (1, ("index", "indices", "repeats"))),
    **dict.fromkeys(("gather", "index_select", "scatter", "scatter_add", "scatter_reduce"), (2, ("index",))),
    **dict.fromkeys(("index_add", "index_copy", "index_fill", "index_reduce"), (2, ("index",))),
    **dict.fromkeys(("bincount", "embedding", "embedding_bag", "one_hot"), (0, ("input",))),
}


def call_once(
    function: Callable[..., Any], target: str, arguments: Arguments, read: Callable[[Any], Made | None]
) -> tuple[Made | None, Arguments]:
    """Call a function, and find out which columns it indexes with.

    Whole numbers are floating point numbers for a distribution or a product, and integers where they count elements of
    a tensor. So a column is made integers where an element is looked up by it.

    :param function: a model, or a function that returns one and its arguments.
    :param str target: what it was typed as.
    :param Arguments arguments: to call it with.
    :param read: reads what it returned: a model with its arguments, or None if the function is the model.
    :return: what was read, and the arguments with all indices known.
    :raises Stop: if it raises.
    """
    args, kwargs, whole = arguments.values()
    with users_code(f"{target} raised", file_of(function), Stop, functools.partial(_hint, arguments)):
        with _own_state(), _Lookups(whole) as lookups:
            made = read(function(*args, **kwargs))
            if made is not None:  # it has passed columns on to a model
                made.model(*made.args, **made.kwargs)
        arguments = dataclasses.replace(arguments, indices=arguments.indices | lookups.found)
        if made is not None and lookups.found:  # as floating point numbers
            args, kwargs, _ = arguments.values()
            with _own_state():
                made = read(function(*args, **kwargs))
    return made, arguments


class _Lookups(TorchFunctionMode):
    """Passes columns as integers where elements are looked up by them, and keeps which these are.

    :param whole: columns of whole numbers by the ``id`` of the tensors that stand for them.
    """

    def __init__(self, whole: Mapping[int, Column]) -> None:
        super().__init__()
        self.whole = whole
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call with integers for an index."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        place, names = _INDEX.get(name) or _INDEX.get(name.removesuffix("_"), (-1, ()))  # in place as well
        args = [self._integers(value) if at == place else value for at, value in enumerate(args)]
        kwargs = {name: self._integers(value) if name in names else value for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _integers(self, index: Any) -> Any:
        """Return the index, with integers for every column in it."""
        if type(index) in (tuple, list):
            return type(index)(self._integers(part) for part in index)
        if not (isinstance(index, Tensor) and id(index) in self.whole):
            return index
        column = self.whole[id(index)]
        self.found.add(column.name)
        return column.tensor(as_index=True)


@contextmanager
def _own_state() -> Iterator[None]:
    """Run the model as a guide does first: every latent at the image of zero, for some cannot be drawn."""
    store, generator = pyro.get_param_store().scope(), torch.random.fork_rng(devices=[])
    with store, generator, torch.no_grad(), InitMessenger(_image_of_zero):
        yield


def _image_of_zero(site: Any) -> Tensor:
    distribution = site["fn"]
    try:
        transform = biject_to(distribution.support)
        found: Tensor = transform(torch.zeros(transform.inverse_shape(distribution.shape())))
    except NotImplementedError:  # discrete, or of another support without a bijection: refused by the guide
        found = distribution.sample()
    return found


def _hint(arguments: Arguments, error: Exception) -> str:
    """What to type so that it does not happen again, where that can be said."""
    text = str(error)
    numbers = ", ".join(column.name for column in arguments.columns.values() if column.is_whole and not column.labels)
    if isinstance(error, KeyError) and arguments.frame:
        return f"; the columns are: {', '.join(arguments.columns)}"
    if not numbers:
        return ""
    if isinstance(error, IndexError) and "must be long" in text:
        return (
            "\nThe model indexes with a column that it has changed before, or keeps in something else. Name that "
            f"column: --index COLUMN, one of {numbers}"
        )
    if isinstance(error, RuntimeError) and "not implemented for" in text:
        return f"\nIf it takes integers, name the column: --index COLUMN, one of {numbers}"
    if isinstance(error, IndexError) and "out of" in text:
        return (
            "\nNumbers are passed as they are. Where a column does not count from 0 without a gap, number its values: "
            f"--categorical COLUMN, one of {numbers}"
        )
    return ""
