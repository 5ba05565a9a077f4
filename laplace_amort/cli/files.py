"""Files to write: what is wrong with them is found before a fit, not after."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from laplace_amort.cli.exits import UsageError

__all__ = ["check_outputs", "check_plot_path"]

_FORMATS = {".csv", ".nc"}


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse what could not be written after a fit, and what is missing to write it.

    :param options: of ``laplace-amort fit``.
    :raises UsageError: naming the file, or what to install.
    """
    for path in options.output:
        if path.suffix.lower() not in _FORMATS:
            raise UsageError(f"--output {path} must end in one of {', '.join(sorted(_FORMATS))}")
        _check_new(path, "the output", options.overwrite)
    if options.save:
        _check_new(options.save, "the result", options.overwrite or options.save == options.resume)
    if options.resume and not options.resume.is_file():
        raise UsageError(f"there is no file {options.resume} to resume from")
    formats = {path.suffix.lower() for path in options.output}
    if options.draws and ".nc" not in formats:
        raise UsageError("--draws is for a file of draws:\n    --output posterior.nc")
    if options.plot:
        check_plot_path(options.plot)
        _check_new(options.plot, "the plot", options.overwrite)
    if options.units or options.format == "csv" or ".csv" in formats:
        _require("data frames", "pandas", "pandas")
    if ".nc" in formats:
        _require(".nc files", "arviz", "arviz_base", "arviz")
        _require(".nc files", "arviz", "h5netcdf", "netCDF4")


def check_plot_path(path: Path) -> None:
    """Refuse a place where no plot can be written.

    :raises UsageError: if matplotlib is not installed, there is no such directory, or the name ends in no format of
        plots.
    """
    _require("plots", "plots", "matplotlib")
    _check_directory(path, "the plot")
    from matplotlib.backend_bases import FigureCanvasBase  # which takes a moment, and is not always installed

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UsageError(f"the plot's name {path.name} must end in one of {', '.join('.' + name for name in formats)}")


def _check_new(path: Path, what: str, overwrite: bool) -> None:
    """Refuse a place where nothing can be written, or where something is that would be lost."""
    _check_directory(path, what)
    if path.is_dir():
        raise UsageError(f"{path} is a directory, and {what} a file")
    if path.is_file() and not overwrite:
        raise UsageError(f"{path} is there already. Name another file, or say\n    --overwrite")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"no permission to write {what} to {path}")


def _check_directory(path: Path, what: str) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory {path.parent} to write {what} to")


def _require(what: str, extra: str, *packages: str) -> None:
    """Refuse what needs one of some packages, where none is installed."""
    if not any(importlib.util.find_spec(package) for package in packages):
        raise UsageError(f"{what} need {packages[0]}:\n    python -m pip install 'laplace_amort[{extra}]'")
