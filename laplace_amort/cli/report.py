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

__all__ = ["Report", "as_options"]


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
                return FixedDrawELBO().posterior(result.problem, result.gaussian, result.seed)
            return result.posterior
        except (*NUMERICAL_ERRORS, ValueError) as error:
            self.problem = f"there is no posterior: {error}"
            return None

    def text(self) -> str:
        """Return the tables."""
        parts = ["\n".join(self.result.headline())]
        if self.posterior is None:
            return f"{parts[0]}\n{self.problem}"
        parts.append(str(self.posterior))
        if self.options.units:
            parts.append(self._units_table())
        return "\n\n".join(parts)

    def csv(self) -> str:
        """Return one line for each number: ``site``, ``unit``, ``element``, mean, standard deviation and quantiles."""
        frame = self._frame()
        return "" if frame is None else str(frame.to_csv(index=False, float_format="%.10g", lineterminator="\n"))

    def write(self, path: Path) -> None:
        """Write a file, of the kind that its suffix says.

        :raises OSError: if it cannot be written.
        """
        if path.suffix.lower() == ".csv":
            path.write_text(self.csv(), encoding="utf-8")
        else:
            samples = {} if self.options.draws is None else {"num_samples": self.options.draws}
            # A file of a fit that did not converge says so in its attributes.
            tree = self.result.to_arviz(coords=self._coords(), **samples)
            tree.to_netcdf(path)

    def plot(self, path: Path) -> None:
        """Draw the marginals of the globals, or how the fit went if there is no posterior."""
        drawn = plots.history_figure if self.posterior is None else plots.marginals_figure
        plots.save_figure(drawn(self.result), path)

    def _frame(self) -> Any:
        if self.posterior is None:
            return None
        frame = self.posterior.to_frame()
        names = [str(name).partition("[") for name in frame.index]
        frame.insert(0, "site", [site for site, _, _ in names])
        frame.insert(1, "unit", "")
        frame.insert(2, "element", [rest.rstrip("]") for _, _, rest in names])
        if not self.options.units:
            return frame
        import pandas  # the frame is one of its own

        units = self.posterior.units_to_frame()
        units["unit"] = self._labels_by_row(units["unit"])
        return pandas.concat([frame, units], ignore_index=True)

    def _units_table(self) -> str:
        assert self.posterior is not None
        frame = self.posterior.units_to_frame()
        labels = self._labels_by_row(frame["unit"])
        elements = [
            f"{unit}, {element}" if element else unit for unit, element in zip(labels, frame["element"], strict=True)
        ]
        names = [f"{site}[{element}]" for site, element in zip(frame["site"], elements, strict=True)]
        numbers = frame.drop(columns=["site", "unit", "element"])
        rows = [[name, *row] for name, row in zip(names, numbers.itertuples(index=False), strict=True)]
        headers = ["unit", *(str(column).replace("%", " %") for column in numbers.columns)]
        return tabulate(rows, headers, floatfmt=".4g", disable_numparse=[0])

    def _labels(self) -> list[str]:
        model = self.result.problem.unit_model
        frame = model.layout.frame
        return self.case.labels(frame.name, int(frame.full_size), model.units, self.options.unit_labels)

    def _labels_by_row(self, numbers: Any) -> list[str]:
        found = dict(zip(self.result.problem.unit_model.units.tolist(), self._labels(), strict=True))
        return [found[int(number)] for number in numbers]

    def _coords(self) -> dict[str, list[str]]:
        labels, plate = self._labels(), self.result.problem.unit_model.layout.frame.name
        return {} if labels == [str(number) for number in range(len(labels))] else {plate: labels}


def write_all(report: Report, save: Path | None, outputs: list[Path], plot: Path | None) -> Exit:
    """Write every file, whatever happens to another.

    :param Report report: of the fit.
    :param save: where to keep what a later fit goes on from.
    :param list outputs: CSV and NetCDF files.
    :param plot: where to draw.
    """
    code = Exit.OK
    steps: list[tuple[Path, Callable[[Path], None]]] = [(path, report.write) for path in outputs]
    steps = ([(save, report.result.save)] if save else []) + steps + ([(plot, report.plot)] if plot else [])
    for path, write in steps:
        code = max(code, _written(path, write))
    return code


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


def needs_pandas(options: argparse.Namespace) -> bool:
    """Whether what is asked for is made by way of data frames."""
    return bool(options.units or options.format == "csv" or any(p.suffix.lower() == ".csv" for p in options.output))
