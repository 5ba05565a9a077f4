"""``laplace-amort fit``: a model of the user's own, fitted to a CSV file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from laplace_amort.cli.binding import check_names
from laplace_amort.cli.columns import Table, read_table
from laplace_amort.cli.files import check_outputs
from laplace_amort.cli.targets import check_target
from laplace_amort.cli.words import STRATEGIES, add_command, check_strategy, positive

__all__ = ["add_parser", "run"]

_EPILOG = """\
The model is a Pyro model with a plate of units. Its parameters get the columns of the same names, as tensors with an
element for each row. In mymodel.py:

  def model(clinic, drug, healed, total):
      mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
      effect = pyro.sample("effect", dist.Normal(0.0, 5.0))
      sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
      with pyro.plate("clinics", int(clinic.max()) + 1):
          level = pyro.sample("level", dist.Normal(mu, sigma))
      with pyro.plate("rows", len(healed)):
          logits = level[..., clinic] + effect * drug
          pyro.sample("healed", dist.Binomial(total, logits=logits), obs=healed)

  laplace-amort fit mymodel.py:model --data trial.csv

Numbers are floating point numbers, but integers where the model indexes with them. Words become codes from 0 in
alphabetical order, and their labels stand in the tables of the units. The only parameter without a column, if it is
called data, frame or df, gets a dict of all columns. A function that returns (model, args) or (model, guide, args) is
called with the columns, and what it returns is fitted: there is the place to prepare the data, and to choose a guide.

On standard output: how far to trust the posterior, with estimated errors and the line to type next; then mean, standard
deviation and quantiles of the globals, and how they were found. Progress and complaints go to standard error. After
Ctrl-C what was found until then is shown and written; with --save it can go on:

  laplace-amort fit mymodel.py:model --data trial.csv --save fit.laf
  laplace-amort fit mymodel.py:model --data trial.csv --resume fit.laf
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "fit",
        run,
        _EPILOG,
        help="fit a model of your own to a CSV file",
        description="Fit a Pyro model to the columns of a CSV file, and show the posterior.",
    )
    parser.add_argument("target", metavar="FILE.py:MODEL", help="or MODULE:MODEL, a Pyro model or what returns one")
    _add_data_options(parser.add_argument_group("data"))
    _add_fit_options(parser.add_argument_group("fit"))
    _add_output_options(parser.add_argument_group("output"))


def _add_data_options(group: Any) -> None:
    group.add_argument(
        "--data", type=Path, metavar="FILE", help="CSV with names in its first line; - for standard input"
    )
    group.add_argument("--separator", metavar="CHAR", help="between cells: comma, semicolon, tab, space or a character")
    many: dict[str, Any] = {"action": "append", "default": []}
    group.add_argument("--map", metavar="PARAM=COLUMN", **many, help="pass a column of another name; may be repeated")
    group.add_argument("--arg", metavar="PARAM=VALUE", **many, help="pass a number, a list or a word; may be repeated")
    group.add_argument("--categorical", metavar="COLUMN", **many, help="number the different values from 0")
    group.add_argument("--index", metavar="COLUMN", **many, help="pass integers, also where it does not show that the "
                       "model indexes with them")  # fmt: skip
    group.add_argument("--drop-missing", action="store_true", help="leave out rows in which something is missing")


def _add_fit_options(group: Any) -> None:
    objectives, modes, heads = (", ".join(STRATEGIES[option]) for option in ("--objective", "--mode", "--head"))
    group.add_argument("--objective", metavar="NAME",
                       help=f"{objectives}, or a call such as 'Ladder(accuracy=0.01)' (default: ladder; stochastic for "
                       "a model that subsamples, elbo for one that has a pyro.param)")  # fmt: skip
    group.add_argument("--mode", metavar="NAME", help=f"{modes} (default newton), or a call of one")
    group.add_argument("--head", metavar="NAME", help=f"{heads} (default joint), for the ELBO")
    group.add_argument("--unit-plate", metavar="PLATE", help="the plate of the units (default: the largest outermost)")
    group.add_argument("--starts", type=positive, default=1, help="how many (default %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of draws and starts (default 0)")
    group.add_argument("--float32", action="store_true", help="compute in single precision")
    group.add_argument("--resume", type=Path, metavar="FILE", help="go on from what --save has kept")
    group.add_argument("--no-check", dest="check", action="store_false",
                       help="leave out the comparison that the verdict rests on; it cannot be good then, and the exit "
                       "code is 4")  # fmt: skip
    group.add_argument("--diagnose", action="store_true", help="say whether to believe the posterior; takes longer")


def _add_output_options(group: Any) -> None:
    group.add_argument("--units", action="store_true", help="show the units too (needs pandas)")
    group.add_argument("--unit-labels", metavar="COLUMN", help="call the units by the labels of this column")
    group.add_argument("--format", choices=("table", "csv"), default="table", help="of standard output (default table)")
    group.add_argument("--output", type=Path, action="append", default=[], metavar="FILE",
                       help="write the table (.csv) or draws for ArviZ (.nc); may be repeated")  # fmt: skip
    group.add_argument("--draws", type=positive, metavar="N", help="draws in the .nc file (default 1000)")
    group.add_argument("--plot", type=Path, metavar="FILE", help="plot the marginals of the globals (.png, .pdf, ...)")
    group.add_argument("--save", type=Path, metavar="FILE", help="keep the result, for --resume and FitResult.load")
    group.add_argument("--overwrite", action="store_true", help="write over files that are there")
    group.add_argument("--quiet", action="store_true", help="nothing on standard error but complaints")


def run(options: argparse.Namespace) -> int:
    """Refuse what is wrong before a model is there, then fit, show, write, and return the exit code."""
    for option in STRATEGIES:
        text = getattr(options, option.removeprefix("--"))
        if text is not None:
            check_strategy(option, text)
    check_outputs(options)
    check_target(options.target, "MODEL")
    table = read_table(options.data, options.separator) if options.data else Table("no --data", [], [])
    check_names(options, table)
    from laplace_amort.cli.fitting import fit_and_show  # loads torch

    return fit_and_show(options, table)
