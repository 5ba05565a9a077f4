"""Words of the command line: a command with its help, numbers, and strategies by name or as a call."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from typing import Any

import laplace_amort
from laplace_amort.cli.exits import UsageError, table_of_codes

__all__ = ["STRATEGIES", "add_command", "positive", "strategy"]

# What can be named in words, by option; the first is the default.
STRATEGIES: dict[str, dict[str, Any]] = {
    "--objective": {
        "ladder": laplace_amort.Ladder(),
        "laplace": laplace_amort.MarginalLaplace(),
        "quadrature": laplace_amort.MarginalQuadrature(),
        "elbo": laplace_amort.FixedDrawELBO(),
        "nested": laplace_amort.NestedELBO(),
        "stochastic": laplace_amort.Stochastic(),
    },
    "--mode": {"newton": laplace_amort.NewtonMode(), "free": laplace_amort.FreeMode()},
    "--head": {"joint": laplace_amort.JointCurvature(), "marginal": laplace_amort.MarginalCurvature()},
}


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], epilog: str, **texts: str
) -> argparse.ArgumentParser:
    """Add a command, whose help ends with the exit codes.

    :param commands: of ``argparse``.
    :param str name: of the command.
    :param run: what it does; returns the exit code.
    :param str epilog: below the options in its help.
    :param texts: ``help`` and ``description``.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        epilog=f"{epilog}\nexit codes:\n{table_of_codes()}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **texts,
    )
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    """Read a positive whole number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def strategy(option: str, text: str) -> Any:
    """Return a strategy that is named, or made by a call of public names such as ``Ladder(accuracy=0.01)``.

    :param str option: that chooses it.
    :param str text: as typed.
    :raises UsageError: if it is neither.

    Example::

        >>> strategy("--objective", "MarginalQuadrature(GaussHermite(17))")
        MarginalQuadrature(rule=GaussHermite(num_points=17), start_with=MarginalLaplace())
    """
    names = STRATEGIES[option]
    if text in names:
        return names[text]
    public = {name: getattr(laplace_amort, name) for name in laplace_amort.__all__}
    try:
        tree = ast.parse(text, mode="eval")
        allowed = (ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.UnaryOp, ast.USub)
        if not isinstance(tree.body, ast.Call) or not all(isinstance(node, allowed) for node in ast.walk(tree)):
            raise SyntaxError
        return eval(compile(tree, option, "eval"), {"__builtins__": {}}, public)
    except SyntaxError as error:
        raise UsageError(
            f"{option} '{text}' is unknown; it is one of {', '.join(names)}, or a call such as\n"
            f"    {option} '{next(iter(names.values()))!r}'"
        ) from error
    except Exception as error:
        raise UsageError(f"{option} {text}: {type(error).__name__}: {error}") from error
