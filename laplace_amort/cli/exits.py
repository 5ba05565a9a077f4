"""How the command ends: the codes for programs, and the complaints that people read."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laplace_amort.statuses import Status

__all__ = ["Exit", "Stop", "UsageError", "complain", "file_of", "show_traceback", "table_of_codes", "users_code"]


class Exit(Status):
    """The exit codes; ``str(code)`` says what it means.

    Example::

        >>> Exit.NOT_CONVERGED.value, str(Exit.NOT_CONVERGED)
        (3, 'a fit is shown, but it has not converged')
    """

    OK = 0, "fine"
    FAILED = 1, "an error: of the model, of a check, of a file that could not be written"
    USAGE = 2, "wrong usage: the command line, or the data that it names, must be another"
    NOT_CONVERGED = 3, "a fit is shown, but it has not converged"
    NOT_TRUSTED = 4, "the fit has converged, but its verdict, or --diagnose, has something against it"
    INTERRUPTED = 130, "interrupted by Ctrl-C; what was found until then is shown"
    NO_READER = 141, "nobody read the output to its end, as in '| head'"


class Stop(Exception):
    """The command cannot go on.

    :param str message: for standard error.
    :param Exit code: to exit with.
    """

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code


class UsageError(Stop):
    """The user asked for something that cannot be."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Exit.USAGE)


def complain(message: str, code: Exit) -> Exit:
    """Say what is wrong on standard error, and return the code to exit with."""
    print(f"laplace-amort: {message}", file=sys.stderr)
    return code


def table_of_codes() -> str:
    """Return all codes and meanings for the help."""
    return "\n".join(f"  {code.value:>3}  {code}" for code in Exit)


@contextmanager
def users_code(
    said: str, file: str | None, stop: type[Stop] = UsageError, hint: Callable[[Exception], str] = lambda error: ""
) -> Iterator[None]:
    """Run code of the user's; where it raises, show the place and stop.

    :param str said: what comes before the error in the complaint, such as ``mymodel.py:case() raised``.
    :param file: of that code, if it is known.
    :param stop: what to raise.
    :param hint: what comes after the error.
    :raises Stop: if anything is raised.
    """
    try:
        yield
    except Stop:
        raise
    except Exception as error:
        show_traceback(error, file)
        raise stop(f"{said} {type(error).__name__}: {error}{hint(error)}") from error


def file_of(function: Callable[..., Any]) -> str | None:
    """Return the file with the code of a function or of a module of Pyro; None if it has no code in Python."""
    inner = inspect.unwrap(getattr(function, "forward", function))
    return getattr(getattr(inner, "__code__", None), "co_filename", None)


def show_traceback(error: BaseException, file: str | None) -> None:
    """Print where an error of the user's own code was raised, from the first line of that code on.

    :param error: the error.
    :param file: of the user's code; of all frames if it is none of them.
    """
    found = traceback.TracebackException.from_exception(error)
    here = str(Path(__file__).parent)
    frames = [frame for frame in found.stack if not frame.filename.startswith(here)]
    first = next((i for i, frame in enumerate(frames) if frame.filename == file), 0)
    found.stack = traceback.StackSummary.from_list(frames[first:])
    print("".join(found.format(chain=False)), end="", file=sys.stderr)
