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

from laplace_amort import Diagnosis, FitResult, FitStatus, FixedDrawELBO, Posterior, plots
from laplace_amort.cli.case import Case
from laplace_amort.cli.exits import Exit, complain
from laplace_amort.errors import NUMERICAL_ERRORS

__all__ = ["Report", "as_options", "diagnosis_text"]


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
    def posterior(self) -> Posterior | None:
        """The posterior; after an interrupt the Gaussian, which takes no time. None where there is none."""
        result = self.result
        if result.gaussian is None:
            self.problem = f"there is no posterior: {result.status}"
            return None
        try:
            if result.status is FitStatus.INTERRUPTED:
                return FixedDrawELBO().posterior(result.problem, result.exact_gaussian(), result.seed)
            return result.posterior
        except (*NUMERICAL_ERRORS, ValueError) as error:
            self.problem = f"there is no posterior: {error}"
            return None

    def text(self) -> str:
        """Return the tables."""
        if self.posterior is None:
            return f"{self.result.headline()}\n{self.problem}"
        parts = [self.result.headline(), str(self.posterior)]
        if self.options.units:
            parts.append(_units_text(self._units_frame(self.posterior)))
        return "\n\n".join(parts)

    def csv(self) -> str:
        """Return one line for each number: ``site``, ``unit``, ``element``, mean, standard deviation and quantiles."""
        if self.posterior is None:
            return ""
        frame = self.posterior.to_frame()
        places = frame.index.str.extract(r"(?P<site>[^[]*)\[?(?P<element>[^]]*)")
        frame.insert(0, "site", places["site"].to_numpy())
        frame.insert(1, "unit", "")
        frame.insert(2, "element", places["element"].to_numpy())
        style = {"index": False, "float_format": "%.10g", "lineterminator": "\n"}
        units = self._units_frame(self.posterior).to_csv(header=False, **style) if self.options.units else ""
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
        drawn = plots.history_figure if self.posterior is None else plots.marginals_figure
        plots.save_figure(drawn(self.result), path)

    def _labels(self) -> dict[int, str]:
        return self.case.labels(self.result.problem.unit_model, self.options.unit_labels)

    def _coords(self) -> dict[str, list[str]]:
        labels, plate = list(self._labels().values()), self.result.problem.unit_model.layout.frame.name
        return {} if labels == [str(number) for number in range(len(labels))] else {plate: labels}

    def _units_frame(self, posterior: Posterior) -> Any:
        frame = posterior.units_to_frame()
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

        >>> as_options("fit(model, guide, *args, objective=MarginalQuadrature(GaussHermite(num_points=9)), starts=20)")
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
