"""Words of the command line: a command with its help, numbers, and strategies by name or as a call."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from typing import Any

import laplace_amort
from laplace_amort.cli.exits import UsageError, table_of_codes

__all__ = ["STRATEGIES", "add_command", "check_strategy", "positive", "strategy"]

# What can be named in words, by option, and the call that each stands for; the first is the default.
STRATEGIES = {
    "--objective": {
        "ladder": "Ladder()",
        "laplace": "MarginalLaplace()",
        "quadrature": "MarginalQuadrature()",
        "elbo": "FixedDrawELBO()",
        "nested": "NestedELBO()",
        "stochastic": "Stochastic()",
    },
    "--mode": {"newton": "NewtonMode()", "free": "FreeMode()"},
    "--head": {"joint": "JointCurvature()", "marginal": "MarginalCurvature()"},
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


def check_strategy(option: str, text: str) -> ast.Expression:
    """Refuse what is no word for a strategy and no call of public names, and return it parsed.

    :param str option: that chooses it.
    :param str text: as typed.
    :raises UsageError: if it is neither.
    """
    names = STRATEGIES[option]
    allowed = (ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.UnaryOp, ast.USub)
    try:
        tree = ast.parse(names.get(text, text), mode="eval")
    except (SyntaxError, ValueError):  # a ValueError of bytes that are zero
        tree = ast.Expression(ast.Constant(None))
    if not isinstance(tree.body, ast.Call) or not all(isinstance(node, allowed) for node in ast.walk(tree)):
        raise UsageError(
            f"{option} '{text}' is unknown; it is one of {', '.join(names)}, or a call such as\n"
            f"    {option} '{next(iter(names.values()))}'"
        )
    named = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    unknown = next((name for name in named if name not in laplace_amort.__all__), None)
    if unknown:
        raise UsageError(f"{option} {text}: laplace_amort has no '{unknown}'")
    return tree


def strategy(option: str, text: str) -> Any:
    """Return a strategy that is named, or made by a call of public names such as ``Ladder(accuracy=0.01)``.

    :param str option: that chooses it.
    :param str text: as typed.
    :raises UsageError: if it is neither.

    Example::

        >>> strategy("--objective", "MarginalQuadrature(GaussHermite(17))")
        MarginalQuadrature(rule=GaussHermite(num_points=17), start_with=MarginalLaplace())
    """
    tree = check_strategy(option, text)
    named = (node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    public = {name: getattr(laplace_amort, name) for name in named}
    try:
        return eval(compile(tree, option, "eval"), {"__builtins__": {}}, public)
    except Exception as error:
        raise UsageError(f"{option} {text}: {type(error).__name__}: {error}") from error
