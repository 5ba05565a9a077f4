"""What a user names on the command line: a function in a module or in a file, and the model that it makes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from laplace_amort.cli.exits import Stop, UsageError, show_traceback, users_code

__all__ = ["Made", "check_target", "describe", "expected", "importable", "load_target", "read"]

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
    kwargs: dict[str, Any]


def check_target(target: str, what: str) -> None:
    """Refuse what names neither a file that is there nor a module that Python finds, and import nothing.

    :param str target: as typed.
    :param str what: what is wanted, for the complaint.
    :raises UsageError: if it is not of the form, or there is no such file or module.
    """
    place, _ = _parts(target, what)
    if place.endswith(".py"):
        _check_file(Path(place))
        return
    first = place.partition(".")[0]  # to look for what is below would import it
    with importable(Path.cwd()):
        if importlib.util.find_spec(first) is None:
            raise UsageError(f"module '{place}' cannot be imported: ModuleNotFoundError: No module named '{first}'")


def load_target(target: str, what: str) -> Callable[..., Any]:
    """Return what ``MODULE:NAME`` or ``path/to/file.py:NAME`` stands for.

    :param str target: as typed.
    :param str what: what is wanted, for the complaint.
    :raises UsageError: if it is not there, cannot be imported or cannot be called.
    """
    place, name = _parts(target, what)
    module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    found = getattr(module, name, None)
    if callable(found):
        return found
    there = sorted(key for key, value in vars(module).items() if _is_own_function(value, module))
    hint = f"; its functions are: {', '.join(there)}" if there else ""
    if found is None:
        raise UsageError(f"'{place}' has no '{name}'{hint}")
    raise UsageError(f"'{name}' of '{place}' is {describe(found)}, not a function{hint}")


def describe(value: object) -> str:
    """Name the kind of a value in a complaint."""
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, tuple | list) else f"a {kind}"


@contextmanager
def importable(directory: Path) -> Iterator[None]:
    """Let modules of a directory be imported, as ``python -m`` does for the current one."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        if str(directory) in sys.path:
            sys.path.remove(str(directory))


def expected(said: str, lengths: Sequence[int]) -> str:
    """Say what a call must return.

    Example::

        >>> expected("mymodel.py:case()", (3, 4))
        'mymodel.py:case() must return (model, guide, args) or (model, guide, args, kwargs)'
    """
    *others, last = (_FORMS[length] for length in lengths)
    return f"{said} must return {', '.join(others)}{' or ' if others else ''}{last}"


def read(returned: Any, said: str, lengths: Sequence[int] = (2, 3, 4), stop: type[Stop] = UsageError) -> Made:
    """Read what a function returned that makes a model.

    :param returned: by the function.
    :param str said: the call as a complaint names it.
    :param lengths: of tuples that may be returned.
    :param stop: what to raise.
    :raises Stop: if it is anything else.
    """
    wanted = expected(said, lengths)
    if not (isinstance(returned, tuple) and len(returned) in lengths):
        raise stop(f"{wanted}; it returned {describe(returned)}")
    model, *guide, args = returned[:3]
    kwargs = returned[3] if len(returned) == 4 else {}
    if not callable(model):
        raise stop(f"{wanted}; model is {describe(model)}")
    if not isinstance(args, tuple | list):
        raise stop(f"{wanted}; args is {describe(args)}, write (data,) for one argument")
    if not isinstance(kwargs, dict):
        raise stop(f"{wanted}; kwargs is {describe(kwargs)}")
    return Made(model, guide[0] if guide else None, tuple(args), dict(kwargs))


def _parts(target: str, what: str) -> tuple[str, str]:
    place, colon, name = target.rpartition(":")  # a path on Windows has a colon of its own
    if not (place and colon and name.isidentifier()):
        raise UsageError(f"'{target}' is not of the form MODULE:{what} or FILE.py:{what}, such as mymodel.py:model")
    return place, name


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")


def _from_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        if not isinstance(error, ImportError):  # the module is there, and its own code failed
            spec = importlib.util.find_spec(name)
            show_traceback(error, spec.origin if spec else None)
        raise UsageError(f"module '{name}' cannot be imported: {type(error).__name__}: {error}") from error


def _from_file(path: Path) -> ModuleType:
    """Run a file as a module. It is not called by its own name, which may be that of an installed one."""
    _check_file(path)
    full = path.resolve()
    name = f"_laplace_amort_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None  # the file's name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that what it defines can be pickled
    with importable(full.parent), users_code(f"file '{path}' cannot be imported:", str(full)):
        spec.loader.exec_module(module)  # its neighbors can be imported, as Python has it for a script
    return module


def _is_own_function(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
