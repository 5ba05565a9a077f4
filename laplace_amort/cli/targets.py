"""What a user names on the command line: a function in a module or in a file, and strategies by name or as a call."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import laplace_amort
from laplace_amort.cli.exits import UsageError, show_traceback

__all__ = ["current_directory_importable", "describe", "load_target", "strategy"]


def load_target(target: str, what: str) -> Callable[..., Any]:
    """Return what ``MODULE:NAME`` or ``path/to/file.py:NAME`` stands for.

    :param str target: as typed.
    :param str what: what is wanted, for the complaint.
    :raises UsageError: if it is not there, cannot be imported or cannot be called.
    """
    place, colon, name = target.rpartition(":")  # a path on Windows has a colon of its own
    if not (place and colon and name.isidentifier()):
        raise UsageError(f"'{target}' is not of the form MODULE:{what} or FILE.py:{what}, such as mymodel.py:model")
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
def current_directory_importable() -> Iterator[None]:
    """Let modules of the current directory be imported, as ``python -m`` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def strategy(text: str, names: Mapping[str, Any], option: str) -> Any:
    """Return a strategy that is named, or made by a call of public names such as ``Ladder(accuracy=0.01)``.

    :param str text: as typed.
    :param names: the short names and what they stand for.
    :param str option: for the complaint.
    :raises UsageError: if it is neither.

    Example::

        >>> strategy("MarginalQuadrature(GaussHermite(17))", {}, "--objective")
        MarginalQuadrature(rule=GaussHermite(num_points=17), start_with=MarginalLaplace())
    """
    if text in names:
        return names[text]
    public = {name: getattr(laplace_amort, name) for name in laplace_amort.__all__}
    try:
        tree = ast.parse(text, mode="eval")
        allowed = (ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.UnaryOp, ast.USub)
        if not isinstance(tree.body, ast.Call) or not all(isinstance(node, allowed) for node in ast.walk(tree)):
            raise SyntaxError
        return eval(compile(tree, option, "eval"), {"__builtins__": {}}, public)
    except SyntaxError:
        pass
    except Exception as error:
        raise UsageError(f"{option} {text}: {type(error).__name__}: {error}") from error
    raise UsageError(
        f"{option} '{text}' is unknown; it is one of {', '.join(names)}, or a call such as\n"
        f"    {option} '{next(iter(names.values()))!r}'"
    )


def _from_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        if not isinstance(error, ImportError):  # the module is there, and its own code failed
            spec = importlib.util.find_spec(name)
            show_traceback(error, spec.origin if spec else None)
        raise _not_imported(f"module '{name}'", error) from error


def _from_file(path: Path) -> ModuleType:
    """Run a file as a module. It is not called by its own name, which may be that of an installed one."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    full = path.resolve()
    name = f"_laplace_amort_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise UsageError(f"file {path} is not one of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that what it defines can be pickled
    sys.path.insert(0, str(full.parent))  # as Python does for a script: its neighbors can be imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        show_traceback(error, str(full))
        raise _not_imported(f"file '{path}'", error) from error
    finally:
        sys.path.remove(str(full.parent))
    return module


def _not_imported(what: str, error: Exception) -> UsageError:
    return UsageError(f"{what} cannot be imported: {type(error).__name__}: {error}")


def _is_own_function(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
