"""What ``laplace-amort fit`` does once everything is read: the fit, its tables and files, and its exit code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pyro
import torch

import laplace_amort
from laplace_amort import FitResult, FitStatus, LaplaceAmortError, diagnose
from laplace_amort.cli.case import Case, prepare
from laplace_amort.cli.columns import Table
from laplace_amort.cli.exits import Exit, Stop, UsageError, complain, file_of, users_code
from laplace_amort.cli.report import Report, diagnosis_text
from laplace_amort.cli.targets import importable
from laplace_amort.cli.words import strategy
from laplace_amort.errors import NUMERICAL_ERRORS
from laplace_amort.types import default_dtype

__all__ = ["fit_and_show"]


def fit_and_show(options: argparse.Namespace, table: Table) -> int:
    """Fit, show, write, and return the exit code.

    :param options: of the command line.
    :param Table table: the data.
    """
    objective = None if options.objective is None else strategy("--objective", options.objective)
    dtype = torch.float32 if options.float32 else torch.float64
    with default_dtype(dtype), importable(Path.cwd()), pyro.get_param_store().scope():
        case = prepare(options, table)
        if not options.quiet:
            print(case.told, file=sys.stderr, flush=True)
        return _show(_fit(case, objective, options), case, options)


def _fit(case: Case, objective: Any, options: argparse.Namespace) -> FitResult:
    model, guide, args, kwargs = case.made
    with users_code("the fit raised", file_of(model), Stop):
        try:
            if options.unit_labels:  # refused now, and not only after the fit
                case.labels(guide.unit_model(*args, **kwargs), options.unit_labels)
            return laplace_amort.fit(
                model,
                guide,
                *args,
                objective=objective,
                starts=options.starts,
                seed=options.seed,
                progress=not options.quiet,
                resume=options.resume,
                check=options.check,
                **kwargs,
            )
        except LaplaceAmortError as error:
            raise Stop(f"{type(error).__name__}: {error}{_on_the_command_line(str(error))}") from error
        except TypeError as error:  # of --objective
            raise UsageError(str(error)) from error


def _on_the_command_line(message: str) -> str:
    """What a line of Python in a message is as an option."""
    options = {
        "objective=Stochastic()": "--objective stochastic",
        "unit_plate=": "--unit-plate NAME",
        "Start anew": "no --resume, or the --resume file of this very fit",
    }
    found = next((option for python, option in options.items() if python in message), "")
    return f"\nOn the command line: {found}" if found else ""


def _show(result: FitResult, case: Case, options: argparse.Namespace) -> int:
    """Write the files, print the result, and say by the exit code what it is worth."""
    report = Report(result, case, options)
    try:
        written = report.write_all()
        if options.format == "csv":
            print(report.words(), file=sys.stderr)
            print(report.csv(), end="", flush=True)
        else:
            print(report.text(), flush=True)
    except KeyboardInterrupt:  # in the posterior: what is known of the fit is known
        print(result.headline(), flush=True)
        raise
    trusted = _diagnosed(report, options)
    if result.status is FitStatus.INTERRUPTED:
        how = f"go on with --resume {options.save}" if options.save else "with --save it could go on another time"
        return complain(f"interrupted; {how}", Exit.INTERRUPTED)
    if written is not Exit.OK:
        return written
    if not result.status.ok:
        return complain("the fit has not converged", Exit.NOT_CONVERGED)
    if report.table is None:
        return complain(report.problem, Exit.FAILED)
    return Exit.OK if trusted and result.verdict.ok else Exit.NOT_TRUSTED


def _diagnosed(report: Report, options: argparse.Namespace) -> bool:
    """Print the diagnosis, if one is wanted and can be had, and return whether it is good."""
    result = report.result
    if not options.diagnose or result.status is FitStatus.INTERRUPTED or report.table is None:
        return True
    try:
        diagnosis = diagnose(result, progress=not options.quiet)
    except (*NUMERICAL_ERRORS, ValueError) as error:
        complain(f"there is no diagnosis: {error}", Exit.NOT_TRUSTED)
        return False
    out = sys.stderr if options.format == "csv" else sys.stdout
    print(f"\n{diagnosis_text(diagnosis)}", file=out, flush=True)
    return diagnosis.ok
