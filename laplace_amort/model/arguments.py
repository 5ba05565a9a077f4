"""Arguments of a model that are no tensors: arrays of NumPy and columns of pandas, made tensors at the door.

A model may be written for arrays, and then it gets them. Only where it does not run with them, or observes them, are
they made tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from laplace_amort.errors import ModelError

__all__ = ["arrays_in", "as_given", "as_tensors", "named", "refuse_no_numbers"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def as_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments of a model as they are."""
    return args, kwargs


def as_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments of a model with tensors for arrays of numbers, in lists and dictionaries too.

    Floating-point numbers get the default dtype of torch; what is missing in pandas is NaN.
    """
    return tuple(_converted(arg) for arg in args), {name: _converted(arg) for name, arg in kwargs.items()}


def _converted(value: Any) -> Any:
    if _is_array(value):
        array = _numbers(value)
        return value if array is None else _tensor(array)
    if type(value) is dict:
        return {key: _converted(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_converted(part) for part in value)
    return value


def _is_array(value: Any) -> bool:
    """Whether it is an array or a column, and no frame."""
    if isinstance(value, numpy.ndarray):
        return True
    return hasattr(value, "to_numpy") and hasattr(value, "dtype") and not isinstance(value, Tensor)


def _is_frame(value: Any) -> bool:
    return hasattr(value, "to_numpy") and hasattr(value, "columns") and not _is_array(value)


def _numbers(value: Any) -> numpy.typing.NDArray[Any] | None:
    """The numbers of an array or a column; None if it has others than numbers."""
    array = value if isinstance(value, numpy.ndarray) else value.to_numpy()
    if array.dtype == object and not isinstance(value, numpy.ndarray) and str(value.dtype) != "object":
        # Columns with something missing, of a dtype of pandas' own.
        try:
            array = value.to_numpy(dtype=numpy.float64, na_value=numpy.nan)
        except (TypeError, ValueError):  # of words
            return None
    return array if array.dtype.kind in "biuf" else None


def _tensor(array: numpy.typing.NDArray[Any]) -> Tensor:
    if array.dtype.kind == "f":
        return torch.tensor(array.astype(numpy.float64)).to(torch.get_default_dtype())
    return torch.tensor(array.astype(bool if array.dtype.kind == "b" else numpy.int64))


def named(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names that the model has for them, and by number where it has none."""
    try:
        return dict(inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {**{f"number {i}": value for i, value in enumerate(args)}, **kwargs}


def arrays_in(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the arrays, columns and frames in an argument, each with its name, such as ``data['y']``."""
    if _is_array(value) or _is_frame(value):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from arrays_in(part, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from arrays_in(part, f"{name}[{number}]")


def refuse_no_numbers(arguments: Mapping[str, Any]) -> None:
    """Refuse frames, and arrays of anything but numbers, with which a model did not run.

    :param arguments: by name.
    :raises ModelError: naming one, with the line to type.
    """
    for name, value in arrays_in(arguments):
        if _is_frame(value):
            raise ModelError(
                f"argument {name} of the model is a {type(value).__name__}, with which it does not run. Pass its "
                f"columns, which are made tensors:\n    {name} = {{column: {name}[column] for column in {name}}}\n"
                f"In the model their number is not len({name}), but that of one column: len({name}[column])"
            )
        if _numbers(value) is None:
            kind = "words or objects" if value.dtype.kind in "OUS" else str(value.dtype)
            raise ModelError(
                f"argument {name} of the model has {kind} (the first is {_first(value)}), and tensors have numbers. "
                f"Number its values:\n    {name} = numpy.unique({name}, return_inverse=True)[1]"
            )


def _first(value: Any) -> str:
    array = numpy.asarray(value).reshape(-1)
    return str(array[0]) if len(array) else "none"
