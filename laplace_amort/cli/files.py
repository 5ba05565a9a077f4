"""Files to write: what is wrong with them is found before a fit, not after."""

from __future__ import annotations

import os
from pathlib import Path

from laplace_amort import plots
from laplace_amort.cli.exits import UsageError

__all__ = ["check_new", "check_plot_path"]


def check_plot_path(path: Path) -> None:
    """Refuse a place where no plot can be written.

    :raises ImportError: if matplotlib is not installed.
    :raises UsageError: if there is no such directory, or the name ends in no format of plots.
    """
    matplotlib = plots.require_matplotlib()
    _check_directory(path, "the plot")
    formats = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UsageError(f"the plot's name {path.name} must end in one of {', '.join('.' + name for name in formats)}")


def check_new(path: Path, what: str, overwrite: bool) -> None:
    """Refuse a place where nothing can be written, or where something is that would be lost.

    :param path: where to write.
    :param str what: will be written, for the complaint.
    :param bool overwrite: whether a file may be overwritten.
    :raises UsageError: if it cannot be.
    """
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
