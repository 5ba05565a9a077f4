"""What a function of the user's returns that makes a model instead of being one: read here, for every command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from laplace_amort.cli.exits import Stop, UsageError, show_traceback
from laplace_amort.cli.targets import describe

__all__ = ["Made", "call", "expected", "read"]

_FORMS = {2: "(model, args)", 3: "(model, guide, args)", 4: "(model, guide, args, kwargs)"}


class Made(NamedTuple):
    """A model with what it is called with.

    :param model: a Pyro model.
    :param guide: its guide; None if there is none.
    :param tuple args: arguments of the model.
    :param dict kwargs: its keyword arguments.
    """

    model: Callable[..., Any]
    guide: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def call(factory: Callable[..., Any], said: str, *args: Any, error: type[Stop] = UsageError) -> Any:
    """Call a factory, and show where it raises.

    :param factory: of the user's.
    :param str said: the call as a complaint names it, such as ``mymodel.py:case()``.
    :param args: its arguments.
    :param error: of the complaint.
    :raises Stop: if it raises.
    """
    try:
        return factory(*args)
    except Exception as raised:
        show_traceback(raised, getattr(getattr(factory, "__code__", None), "co_filename", None))
        raise error(f"{said} raised {type(raised).__name__}: {raised}") from raised


def expected(said: str, lengths: Sequence[int]) -> str:
    """Say what a call must return.

    Example::

        >>> expected("mymodel.py:case()", (3, 4))
        'mymodel.py:case() must return (model, guide, args) or (model, guide, args, kwargs)'
    """
    *others, last = (_FORMS[length] for length in lengths)
    return f"{said} must return {', '.join(others)}{' or ' if others else ''}{last}"


def read(returned: Any, said: str, lengths: Sequence[int] = (2, 3, 4), error: type[Stop] = UsageError) -> Made:
    """Read what a factory returned.

    :param returned: by the factory.
    :param str said: the call as a complaint names it.
    :param lengths: of tuples that may be returned.
    :param error: of the complaint.
    :raises Stop: if it is anything else.
    """
    wanted = expected(said, lengths)
    if not (isinstance(returned, tuple) and len(returned) in lengths):
        raise error(f"{wanted}; it returned {describe(returned)}")
    kwargs = returned[3] if len(returned) == 4 else {}
    made = Made(returned[0], returned[1] if len(returned) > 2 else None, returned[min(len(returned) - 1, 2)], kwargs)
    if not callable(made.model):
        raise error(f"{wanted}; model is {describe(made.model)}")
    if not isinstance(made.args, tuple | list):
        raise error(f"{wanted}; args is {describe(made.args)}, write (data,) for one argument")
    if not isinstance(made.kwargs, dict):
        raise error(f"{wanted}; kwargs is {describe(made.kwargs)}")
    return made._replace(args=tuple(made.args), kwargs=dict(made.kwargs))
