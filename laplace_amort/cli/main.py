"""The command ``laplace-amort``: progress and complaints on stderr, results on stdout.

What is typed is read and checked without torch, which takes seconds to load: a command imports it where it has nothing
left to complain of. A test refuses torch in the help and in what is wrong before a model is imported.
"""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Sequence

import laplace_amort
from laplace_amort.cli import check, demo, fit
from laplace_amort.cli.exits import Exit, Stop, UsageError, complain, table_of_codes

__all__ = ["main"]

_COMMANDS = demo, fit, check
_GONE = {"bench": "how long fits take on this machine is measured by benchmarks/step_cost.py of the repository"}
_ASCII = {"±": "+-", "…": "...", "\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "x"}
_EPILOG = f"""\
examples:
  laplace-amort demo                                      44 sites, Student-t effects: tables and plots
  laplace-amort fit mymodel.py:model --data trial.csv     a model of your own, its parameters the columns of the file
  laplace-amort check mymodel.py:case                     the gradient checks on a guide of your own

laplace-amort COMMAND --help explains each with an example.

exit codes:
{table_of_codes()}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    :param argv: arguments after the program's name; those of the process by default.
    """
    _accept_any_letter()
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as of '| head': nobody is there to complain to
        _drop_output()
        return int(Exit.NO_READER)
    except OSError as error:
        _drop_output()
        return int(complain(f"standard output was not written: {error}", Exit.FAILED))


def _run(argv: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments and arguments[0] in _GONE:
            raise UsageError(f"there is no command {arguments[0]}: {_GONE[arguments[0]]}")
        options = _parser().parse_args(arguments)
        return int(options.run(options))
    except SystemExit as stop:  # argparse has printed help, the version or its complaint
        return stop.code if isinstance(stop.code, int) else int(Exit.OK)
    except Stop as stop:
        return int(complain(str(stop), stop.code))
    except KeyboardInterrupt:
        return int(complain("interrupted", Exit.INTERRUPTED))
    except Exception as error:
        from laplace_amort.errors import LaplaceAmortError  # loads torch, which is there if it is one of these

        if not isinstance(error, LaplaceAmortError):
            raise
        return int(complain(f"{type(error).__name__}: {error}", Exit.FAILED))


def _drop_output() -> None:
    """Send what is left of standard output nowhere, or Python complains of it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="laplace-amort",
        description="The amortized Laplace family for Pyro: guides whose only parameter is where they stand.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {laplace_amort.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _accept_any_letter() -> None:
    """Let a terminal that does not know a letter show another one."""
    codecs.register_error("laplace_amort", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        encoding = str(getattr(stream, "encoding", None) or "utf-8")
        if "utf" not in encoding.lower() and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="laplace_amort")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_ASCII.get(letter, "?") for letter in letters), error.end
