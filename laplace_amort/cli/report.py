"""A fit on the screen and in files: tables, CSV, NetCDF, plots."""

from __future__ import annotations

import argparse
import ast
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from laplace_amort import Diagnosis, FitResult, GlobalsTable, plots
from laplace_amort.cli.case import Case
from laplace_amort.cli.exits import Exit, complain

__all__ = ["Report", "as_options", "diagnosis_text"]

# The line that a verdict says to type where the defaults are better.
_BARE = "fit(model, *args)"


class Report:
    """What is to be shown of a fit.

    :param FitResult result: the fit.
    :param Case case: what was fitted.
    :param options: of the command line.
    """

    def __init__(self, result: FitResult, case: Case, options: argparse.Namespace) -> None:
        self.result, self.case, self.options = result, case, options
        self.problem = ""

    @functools.cached_property
    def table(self) -> GlobalsTable | None:
        """The table of the globals; after an interrupt that of the Gaussian. None where there is no posterior."""
        try:
            return self.result.table()
        except ValueError as error:
            self.problem = str(error)
            return None

    def text(self) -> str:
        """Return the verdict, the tables and how they were found."""
        parts = [self._typed(str(self.result))]
        if self.options.units and self.table is not None:
            parts.append(_units_text(self._units_frame()))
        return "\n\n".join(parts)

    def words(self) -> str:
        """Return what stands around the table of the globals."""
        return self._typed(f"{self.result.judgement}\n\n{self.result.how()}")

    def _typed(self, text: str) -> str:
        """Put options of this command in the place of the lines of Python that a verdict says to type."""
        for reason in self.result.judgement.reasons:
            if reason.advice == _BARE:
                text = text.replace(_BARE, "laplace-amort fit ...   # without --objective and --no-check")
            elif reason.advice.startswith("fit(") and as_options(reason.advice):
                text = text.replace(reason.advice, f"laplace-amort fit ... {as_options(reason.advice)}")
        return text

    def csv(self) -> str:
        """Return one line for each number: ``site``, ``unit``, ``element``, mean, standard deviation and quantiles."""
        if self.table is None:
            return ""
        frame = self.table.to_frame()
        places = frame.index.str.extract(r"^(?P<site>.*?)(?:\[(?P<element>[^][]*)\])?$").fillna("")
        frame.insert(0, "site", places["site"].to_numpy())
        frame.insert(1, "unit", "")
        frame.insert(2, "element", places["element"].to_numpy())
        style = {"index": False, "float_format": "%.10g", "lineterminator": "\n"}
        units = self._units_frame().to_csv(header=False, **style) if self.options.units else ""
        return f"{frame.to_csv(**style)}{units}"

    def write_all(self) -> Exit:
        """Write every file that is wanted, whatever happens to another."""
        options = self.options
        steps = [
            (options.save, self.result.save),
            *((path, self.write) for path in options.output),
            (options.plot, self.plot),
        ]
        return max((_written(path, write) for path, write in steps if path), default=Exit.OK)

    def write(self, path: Path) -> None:
        """Write a file, of the kind that its suffix says.

        :raises OSError: if it cannot be written.
        """
        if path.suffix.lower() == ".csv":
            path.write_text(self.csv(), encoding="utf-8")
        else:
            samples = {} if self.options.draws is None else {"num_samples": self.options.draws}
            # A file of a fit that did not converge says so in its attributes.
            self.result.to_arviz(coords=self._coords(), **samples).to_netcdf(path)

    def plot(self, path: Path) -> None:
        """Draw the marginals of the globals, or how the fit went if there is no posterior."""
        drawn = plots.history_figure if self.table is None else plots.marginals_figure
        plots.save_figure(drawn(self.result), path)

    def _labels(self) -> dict[int, str]:
        return self.case.labels(self.result.problem.unit_model, self.options.unit_labels)

    def _coords(self) -> dict[str, list[str]]:
        labels, plate = list(self._labels().values()), self.result.problem.unit_model.layout.frame.name
        return {} if labels == [str(number) for number in range(len(labels))] else {plate: labels}

    def _units_frame(self) -> Any:
        frame = self.result.posterior_to_show().units_to_frame()
        frame["unit"] = frame["unit"].map(self._labels())
        return frame


def _units_text(frame: Any) -> str:
    """Return a line for each number of a unit, named as ``site[unit, element]``."""
    places = [tuple(filter(None, words)) for words in zip(frame["unit"], frame["element"], strict=True)]
    names = [f"{site}[{', '.join(place)}]" for site, place in zip(frame["site"], places, strict=True)]
    columns = {"unit": names} | {name.replace("%", " %"): frame[name].tolist() for name in frame.columns[3:]}
    return tabulate(columns, headers="keys", floatfmt=".4g", disable_numparse=[0])


def _written(path: Path, write: Callable[[Path], None]) -> Exit:
    try:
        write(path)
    except Exception as error:  # of the disk, of a package that writes, or of a posterior that is none
        return complain(f"{path} was not written: {type(error).__name__}: {error}", Exit.FAILED)
    print(f"wrote {path}", file=sys.stderr)
    return Exit.OK


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """Return a diagnosis with the line to type next as options of this command."""
    options = as_options(diagnosis.advice)
    text = str(diagnosis)
    return text.replace(diagnosis.advice, f"laplace-amort fit ... {options}") if options else text


def as_options(advice: str) -> str:
    """Return the keyword arguments of a call of ``fit`` as options of ``laplace-amort fit``.

    Example::

        >>> as_options("fit(model, *args, objective=MarginalQuadrature(GaussHermite(num_points=9)), starts=20)")
        "--objective 'MarginalQuadrature(GaussHermite(num_points=9))' --starts 20"
    """
    try:
        call = ast.parse(advice, mode="eval").body
    except SyntaxError:
        return ""
    keywords = call.keywords if isinstance(call, ast.Call) else []
    found = []
    for keyword in keywords:
        value = ast.unparse(keyword.value)
        found.append(f"--{str(keyword.arg).replace('_', '-')} " + (value if value.isalnum() else f"'{value}'"))
    return " ".join(found)
