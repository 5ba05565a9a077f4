"""Real data sets and their models, for benchmarks that fit them.

Run ``python benchmarks/real_data.py FOLDER`` for a list with sizes; ``--problems epil senc`` chooses. The folder holds
the data, which are not part of the package, as ``LAYOUT`` says.

A folder that lacks some files serves the problems that do without them. Sites are named as in the reference posteriors.
Models of which the package has an example are those of the example.

In the voting problems units are precincts, of which the numbers of voters by race and of votes by choice are known, but
not the table inside. A precinct's vote counts are multinomial with the mixture of its races' choice probabilities,
weighted by their shares. Of the data that are made up, and of senc, that table is known: ``hidden_tables``.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import tabulate
import torch
from torch import Tensor

from laplace_amort import LogJoint
from laplace_amort.examples import ecological, epil, multisite, radon
from laplace_amort.model.layout import find_layout

LAYOUT = """\
    FOLDER/
        eight_schools.csv, radon_mn.csv, radon_all.csv, epil.csv, effects_errors.csv, senc.csv,
        nc2016_votes.csv, nc2016_sim_sd0.02.csv, nc2016_sim_sd0.1.csv, nc2016_sim_sd0.3.csv
        reference/
            NAME.json, a reference posterior of the problem NAME, for some of them"""

Table = dict[str, list[str]]  # the cells of a file, by column


@dataclass(frozen=True)
class Problem:
    """A data set and its model.

    :param str name: of the problem, and of its reference posterior.
    :param model: a plain Pyro model.
    :param tuple args: its arguments, real ones in float64.
    :param str unit: name of the unit plate, its dim -1.
    :param int num_units: size of that plate.
    :param reference: file of the reference posterior; ``None`` if the folder has none.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    unit: str
    num_units: int
    reference: Path | None


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Effects ``y (N,)`` of coaching in schools, with standard errors ``sigma (N,)``."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y), dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def effects_errors(effect: Tensor, se: Tensor) -> None:
    """Effects ``(N,)`` at sites, with standard errors ``se (N,)``; heavy tails, and a scale that may be near zero."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(0.5))
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    with pyro.plate("sites", len(effect), dim=-1):
        theta = pyro.sample("theta", dist.StudentT(nu, mu, tau))
        pyro.sample("effect", dist.Normal(theta, se), obs=effect)


def nc2016(voters: Tensor, votes: Tensor) -> None:
    """Precincts with ``voters (N, R)`` by race and ``votes (N, C)`` by choice; every logit of a precinct varies."""
    races, choices = voters.shape[-1], votes.shape[-1]
    alpha = pyro.sample("alpha", dist.Normal(0.0, 4.0).expand([choices]).to_event(1))
    beta = pyro.sample("beta", dist.Normal(0.0, 4.0).expand([races, choices]).to_event(2))
    sigma = pyro.sample("sigma", dist.LogNormal(-2.5, 1.2))
    with pyro.plate("precincts", len(voters), dim=-1):
        scale = sigma[..., None, None]
        nu = pyro.sample("nu", dist.Normal(voters.new_zeros(races, choices), scale).to_event(2))
        logits = alpha.unsqueeze(-2) + beta + nu
        pyro.sample("votes", ecological.PrecinctVotes(voters, logits), obs=votes)


@dataclass(frozen=True)
class _Recipe:
    """How to make a problem: its model, its unit plate, its file, and what makes the arguments of the model of that."""

    model: Callable[..., Any]
    unit: str
    file: str
    arguments: Callable[[Table], tuple[Tensor, ...]]


def _columns(table: Table, *names: str) -> tuple[Tensor, ...]:
    """Columns as numbers, an empty cell as NaN."""
    return tuple(torch.tensor([float(x or "nan") for x in table[name]], dtype=torch.float64) for name in names)


def _radon(table: Table) -> tuple[Tensor, ...]:
    """Homes whose floor is known; counties keep their index, so that one may be left without a home."""
    county, floor, log_radon = _columns(table, "county", "floor", "log_radon")
    known = ~floor.isnan()
    return county[known].long(), floor[known], log_radon[known]


def _epil(table: Table) -> tuple[Tensor, ...]:
    """Rows come in the order of patients and, within each, of periods."""
    log_base4_c, trt, log_age_c, v4, y = _columns(table, "log_base4_c", "trt", "log_age_c", "v4", "y")
    x = torch.stack([torch.ones_like(trt), log_base4_c, trt, trt * log_base4_c, log_age_c, v4], dim=-1)
    return x.reshape(-1, 4, 6), y.reshape(-1, 4)


def _precincts(table: Table, races: Sequence[str], votes: Sequence[str]) -> tuple[Tensor, ...]:
    """Precincts that have voters."""
    by_race, by_choice = (torch.stack(_columns(table, *names), dim=-1) for names in (races, votes))
    inhabited = by_race.sum(-1) > 0
    return by_race[inhabited], by_choice[inhabited]


def _nc2016(file: str, contest: str) -> _Recipe:
    """Votes of one contest: an office, or ``v`` for simulated ones."""
    votes = [f"{contest}_{choice}" for choice in ("none", "dem", "rep")]
    arguments = functools.partial(_precincts, races=("n_white", "n_black", "n_other"), votes=votes)
    return _Recipe(nc2016, "precincts", file, arguments)


def _plain(*names: str) -> Callable[[Table], tuple[Tensor, ...]]:
    """The columns of these names are the arguments."""
    return lambda table: _columns(table, *names)


_RECIPES = {
    "eight_schools": _Recipe(eight_schools, "schools", "eight_schools.csv", _plain("y", "sigma")),
    "radon_mn": _Recipe(radon.model, "counties", "radon_mn.csv", _radon),
    "radon_all": _Recipe(radon.model, "counties", "radon_all.csv", _radon),
    "epil": _Recipe(epil.model, "patients", "epil.csv", _epil),
    "effects_errors": _Recipe(effects_errors, "sites", "effects_errors.csv", _plain("effect", "se")),
    "effects_errors_floor": _Recipe(multisite.model, "sites", "effects_errors.csv", _plain("effect", "se")),
    **{f"nc2016_votes_{office}": _nc2016("nc2016_votes.csv", office) for office in ("pres", "gov", "sen")},
    **{f"nc2016_sim_sd{sd}": _nc2016(f"nc2016_sim_sd{sd}.csv", "v") for sd in ("0.02", "0.1", "0.3")},
    "senc": _Recipe(
        ecological.model,
        "precincts",
        "senc.csv",
        functools.partial(
            _precincts,
            races=[f"n_{race}" for race in ecological.RACES],
            votes=[f"v_{choice}" for choice in ecological.CHOICES],
        ),
    ),
}

NAMES = tuple(_RECIPES)


def problems(folder: Path, names: Sequence[str] | None = None) -> dict[str, Problem]:
    """Load problems from a folder of data.

    :param Path folder: laid out as ``LAYOUT`` says.
    :param names: of ``NAMES``; ``None`` for all of them.
    :return: problems by name, in the order asked for.
    :raises ValueError: if there is no problem of a name.
    :raises FileNotFoundError: if the folder, or a file that is needed, is missing.
    :raises RuntimeError: if the default dtype is not float64, in which the models make their priors.
    """
    if torch.get_default_dtype() != torch.float64:
        raise RuntimeError("the problems are in float64:\n    torch.set_default_dtype(torch.float64)")
    chosen = NAMES if names is None else tuple(names)
    unknown = [name for name in chosen if name not in _RECIPES]
    if unknown:
        raise ValueError(f"there is no problem {', '.join(map(repr, unknown))}; the names are: {', '.join(NAMES)}")
    return {name: _problem(Path(folder), name, _RECIPES[name]) for name in chosen}


def hidden_tables(folder: Path, name: str) -> Tensor | None:
    """Return voters by race and choice in every precinct of a problem, ``(N, R, C)``, or ``None`` if nobody knows.

    :param Path folder: laid out as ``LAYOUT`` says.
    :param str name: of ``NAMES``.
    """
    table = _read(folder, _RECIPES[name].file)
    races = [column.removeprefix("n_") for column in table if column.startswith("n_")]
    if not any(column.startswith("y_") for column in table):
        return None
    rows = [_columns(table, *(f"y_{race}_{choice}" for choice in ecological.CHOICES)) for race in races]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _problem(folder: Path, name: str, recipe: _Recipe) -> Problem:
    args = recipe.arguments(_read(folder, recipe.file))
    reference = folder / "reference" / f"{name}.json"
    return Problem(
        name=name,
        model=recipe.model,
        args=args,
        unit=recipe.unit,
        num_units=_num_units(args),
        reference=reference if reference.is_file() else None,
    )


def _num_units(args: tuple[Tensor, ...]) -> int:
    """Rows are units, unless the first argument says which unit a row belongs to."""
    return len(args[0]) if args[0].is_floating_point() else int(args[0].max()) + 1


def _read(folder: Path, file: str) -> Table:
    path = folder / file
    if not path.is_file():
        missing = f"there is no file {file} in '{folder}'" if folder.is_dir() else f"there is no folder '{folder}'"
        raise FileNotFoundError(f"{missing}. The data should lie as follows:\n\n{LAYOUT}")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {column: [row[column] for row in rows] for column in rows[0]}


def _row(problem: Problem) -> tuple[Any, ...]:
    """What the list says of a problem."""
    layout = find_layout(LogJoint(problem.model, *problem.args).sites, problem.unit)
    data = " ".join("x".join(map(str, arg.shape)) for arg in problem.args)
    reference = "yes" if problem.reference else "no"
    return problem.name, problem.unit, problem.num_units, layout.global_dim, layout.local_dim, data, reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the data are")
    parser.add_argument("--problems", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    chosen = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    try:
        found = problems(chosen.folder, chosen.problems)
    except FileNotFoundError as error:
        parser.exit(1, f"{error}\n")
    columns = ("problem", "unit plate", "N", "d", "k", "shapes of the data", "reference")
    print(tabulate.tabulate([_row(problem) for problem in found.values()], columns))


if __name__ == "__main__":
    main()
