"""What all figures share: matplotlib itself, colors, and how a file is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["blank_figure", "note_left_out", "require_matplotlib", "save_figure", "style"]

# Okabe and Ito's palette, which color-blind readers can tell apart; line styles tell the same in print.
UNAMORTIZED, JOINT, MARGINAL, GREEN, PURPLE = "#E69F00", "#D55E00", "#0072B2", "#009E73", "#CC79A7"
REFERENCE, RAW = "#000000", "#9A9A9A"
ON_EDGE: dict[str, Any] = {"clip_on": False, "in_layout": False}  # or markers that are not there take room
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "figure.titlesize": 8.5,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of this package, whatever the user's own is.

    :raises ImportError: if matplotlib is not installed.
    """
    with require_matplotlib().rc_context(STYLE):
        yield


def blank_figure(width: float, height: float) -> Any:
    """Return a figure of this size in inches, which belongs to no window and to no ``pyplot`` state.

    :raises ImportError: if matplotlib is not installed.
    """
    return require_matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to ``path``, in the format its suffix names, at 200 dots per inch.

    :raises ValueError: if matplotlib knows no such format.
    :raises OSError: if the file cannot be written.
    """
    figure.savefig(path, dpi=200)


def note_left_out(figure: Figure, shown: int, there_are: int, what: str) -> None:
    """Say in the title of a figure how many it leaves out, if it does."""
    if shown < there_are:
        figure.suptitle(f"{shown} of {there_are} {what}; {there_are - shown} are left out")


def require_matplotlib() -> Any:
    """Return matplotlib, with its figures loaded.

    :raises ImportError: if it is not installed; the message names the extra to install.
    """
    try:
        import matplotlib
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.patches
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError('plots need matplotlib; install it with\n    pip install "laplace_amort[plots]"') from error
    return matplotlib
