"""Random models against gold: how many fits are right, how many say that they are not, how many are silent.

Run ``python benchmarks/silent.py``: it fits the models of ``results/silent_gold.jsonl`` by the default call of ``fit``,
and prints how it went. ``--objective NestedELBO FixedDrawELBO`` chooses objectives, ``--seeds 0:60`` models,
``--likelihood`` and ``--k`` kinds of them; ``--float32`` fits all of them in single precision, where by default some
are; ``--write FILE`` keeps a line of JSON for each fit, and what the file has is not fitted again. ``--gold 0:300``
computes the gold of seeds, which takes 0.3 to 60 CPU seconds each, cheap ones first, and adds it to the file.

Right is: every mean of an element of the globals within 0.1 posterior standard deviations, and every standard deviation
within 10 %; where gold says that the second moment may not exist, quantiles as near as that. What is not right is
*warned* where the result says so, and *silent* where it does not. "cried wolf" is right with a warning. "crashed" is an
exception, of ``fit`` or of the posterior, and "no end" is a fit that took longer than ``--patience`` seconds.

The gold is of ``silent_gold.py``, from densities of ``silent_density.py``: NumPy, SciPy, and nothing of the package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import tabulate
import torch
from silent_gold import AROUND, PROBABILITIES, gold
from silent_models import VERSION, Case, draw_case

import laplace_amort
from laplace_amort import AutoLaplaceFamily, FixedDrawELBO, Ladder, MarginalLaplace, MarginalQuadrature, NestedELBO
from laplace_amort.types import default_dtype

GOLD = Path(__file__).parent / "results" / "silent_gold.jsonl"
MEAN, SD = 0.1, 0.1
OBJECTIVES = {one.__name__: one for one in (Ladder, FixedDrawELBO, NestedELBO, MarginalLaplace, MarginalQuadrature)}
DEFAULT = "default"
OUTCOMES = ("right", "warned", "silent", "cried wolf", "crashed", "no end")


@dataclass(frozen=True)
class Outcome:
    """How one fit went.

    :param int seed: of the case.
    :param str objective: its name.
    :param str outcome: one of ``OUTCOMES``.
    :param str said: what the result said of itself.
    :param float worst: the largest miss of a moment or a quantile of the globals, 1 where it is just right.
    :param str where: what that is of.
    :param float units: the largest miss of a mean or standard deviation of a unit, 1 at twice the bounds of globals.
    :param float k_hat: of the posterior.
    :param float seconds: of CPU.
    :param list notes: of the result, or the exception.
    """

    seed: int
    objective: str
    outcome: str
    said: str
    worst: float
    where: str
    units: float
    k_hat: float
    seconds: float
    notes: list[str]


class NoEndError(Exception):
    """A fit took too long."""


# ----------------------------------------------------------------------------------------------------------- one fit


def fitted(case: Case, objective: str) -> Any:
    """Return the result of a fit, by the default call or by an objective."""
    options = {} if objective == DEFAULT else {"objective": OBJECTIVES[objective]()}
    if objective == DEFAULT and not hasattr(laplace_amort.FitResult, "verdict"):  # before fit chose by itself
        options = {"objective": Ladder()}
    return laplace_amort.fit(case.model, AutoLaplaceFamily(case.model), *case.args(), progress=False, **options)


def is_believed(result: Any) -> bool:
    """Whether the result says that it is to be believed."""
    return bool(getattr(result, "verdict", result.status).ok)


def judged(case: Case, known: dict[str, Any], objective: str, dtype: torch.dtype, patience: int) -> Outcome:
    """Fit a case and compare it with its gold."""
    begun = time.process_time()
    said, k_hat, notes, misses, of_units = "", float("nan"), [], {"nothing": float("inf")}, float("nan")
    with default_dtype(dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyro.clear_param_store()
        try:
            with limited(patience):
                result = fitted(case, objective)
                verdict = getattr(result, "verdict", result.status)
                said, notes, believed = getattr(verdict, "name", str(verdict)), list(result.notes), is_believed(result)
                if result.gaussian is not None:
                    k_hat = result.posterior.k_hat
                    misses = misses_of_globals(result.posterior, known)
                    of_units = miss_of_units(result.posterior, known)
            outcome = classified(max(misses.values()), believed)
        except NoEndError:
            outcome, notes = "no end", [traceback.format_exc().splitlines()[-3].strip()]
        except Exception as error:
            outcome = "crashed"
            notes = [f"{type(error).__name__}: {error}", *traceback.format_exc().splitlines()[-5:-1]]
    where = max(misses, key=lambda name: misses[name])
    seconds = time.process_time() - begun
    return Outcome(case.seed, objective, outcome, said, misses[where], where, of_units, k_hat, seconds, notes)


def classified(worst: float, believed: bool) -> str:
    """Return the outcome of a fit whose worst miss is given in units of what is right."""
    if worst <= 1:
        return "right" if believed else "cried wolf"
    return "silent" if believed else "warned"


def misses_of_globals(posterior: Any, known: dict[str, Any]) -> dict[str, float]:
    """Return the miss of each moment by name, in units of what is right; NaN is infinitely wrong."""
    mean, sd = elements(posterior.mean()), elements(posterior.std())
    found = {}
    for place, name in enumerate(known["names"]):
        true_mean, true_sd = known["mean"][place], known["sd"][place]
        if known["heavy"][place]:
            continue
        found[f"mean of {name}"] = abs(mean[name] - true_mean) / true_sd / MEAN
        found[f"sd of {name}"] = abs(sd[name] / true_sd - 1) / SD
    if any(known["heavy"]):
        found |= _misses_of_quantiles(posterior, known)
    return {name: miss if np.isfinite(miss) else float("inf") for name, miss in found.items()}


def _misses_of_quantiles(posterior: Any, known: dict[str, Any]) -> dict[str, float]:
    """By how much quantiles of globals miss their probability, for elements without moments."""
    frame = {name: to_list(value) for name, value in zip(*_quantiles(posterior), strict=True)}
    found = {}
    for place, name in enumerate(known["names"]):
        if known["heavy"][place] and name in frame:  # a table leaves out what follows from others
            for which, (low, high) in enumerate(known["quantiles"][place]):
                middle = (low + high) / 2
                found[f"{100 * PROBABILITIES[which]:g}% of {name}"] = (
                    abs(frame[name][which] - middle) / (high - low) * 2
                )
    return found


def _quantiles(posterior: Any) -> tuple[list[str], list[Any]]:
    frame = posterior.to_frame(PROBABILITIES)
    return list(frame.index), list(frame.iloc[:, -len(PROBABILITIES) :].to_numpy())


def miss_of_units(posterior: Any, known: dict[str, Any]) -> float:
    """Return the largest miss of a mean or a standard deviation of units, in twice the units of the globals."""
    mean, sd, worst = posterior.mean(), posterior.std(), 0.0
    for name, (true_mean, true_sd) in known["units"].items():
        true_mean, true_sd = np.array(true_mean), np.array(true_sd)
        some = slice(len(true_sd))  # gold has some of many units
        off = np.abs(to_flat(mean[name])[some] - true_mean) / true_sd / (2 * MEAN)
        wide = np.abs(to_flat(sd[name])[some] / true_sd - 1) / (2 * SD)
        worst = max(worst, float(np.max(off)), float(np.max(wide)))
    return worst


def elements(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return all elements of sites by the names of the gold."""
    found = {}
    for site, value in values.items():
        flat = to_flat(value)
        for place, index in enumerate(np.ndindex(tuple(value.shape))):
            found[site + (f"[{', '.join(map(str, index))}]" if index else "")] = float(flat[place])
    return found


def to_flat(value: torch.Tensor) -> Any:
    return value.detach().double().cpu().numpy().ravel()


def to_list(value: Any) -> list[float]:
    return [float(one) for one in value]


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise :class:`NoEndError` after so many seconds."""

    def stop(*_: Any) -> None:
        raise NoEndError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------------------- tables


def counts(outcomes: list[Outcome]) -> Counter[str]:
    """Return how many fits there are of each outcome."""
    return Counter(one.outcome for one in outcomes)


def size_class(units: int) -> str:
    return "6-20 units" if units <= 20 else "21-80 units" if units <= 80 else "81-300 units"


CLASSES = {
    "likelihood": lambda label: label["likelihood"],
    "latents a unit": lambda label: f"k = {label['k']}",
    "prior of scales": lambda label: label["scales"],
    "size": lambda label: size_class(label["units"]),
    "data": lambda label: label["strength"],
    "form": lambda label: label["form"],
    "dtype": lambda label: label["dtype"],
}


def print_tables(outcomes: list[Outcome]) -> None:
    """Print what was counted, in all and by class, and each fit that was not right."""
    labels = {seed: draw_case(seed).label for seed in {one.seed for one in outcomes}}
    rows = []
    for objective in dict.fromkeys(one.objective for one in outcomes):
        some = [one for one in outcomes if one.objective == objective]
        rows.append(_row(objective, some))
    print(tabulate.tabulate(rows, ["objective", *COLUMNS], floatfmt=".3g"))
    for title, class_of in CLASSES.items():
        rows = []
        for objective in dict.fromkeys(one.objective for one in outcomes):
            some = [one for one in outcomes if one.objective == objective]
            names = sorted({class_of(labels[one.seed]) for one in some})
            rows += [
                _row(name, [one for one in some if class_of(labels[one.seed]) == name], objective) for name in names
            ]
        print("\n" + tabulate.tabulate(rows, ["objective", title, *COLUMNS], floatfmt=".3g"))
    for one in sorted(outcomes, key=lambda one: (OUTCOMES.index(one.outcome), one.objective, one.seed)):
        if one.outcome != "right":
            print(f"\n{one.outcome}: {described(one, labels[one.seed])}")


COLUMNS = ("fits", *OUTCOMES, "% right", "units off", "median s", "most s")


def _row(name: str, some: list[Outcome], first: str | None = None) -> list[Any]:
    found = counts(some)
    seconds = [one.seconds for one in some]
    right = 100 * (found["right"] + found["cried wolf"]) / len(some)
    off = sum(one.units > 1 for one in some if one.outcome == "right")
    row = [name, len(some), *(found[outcome] for outcome in OUTCOMES), right, off, np.median(seconds), max(seconds)]
    return row if first is None else [first, *row]


def described(one: Outcome, label: dict[str, Any]) -> str:
    """Return a line on a fit, and what it said."""
    kind = ", ".join(f"{key} {value}" for key, value in label.items())
    lines = [f"seed {one.seed} by {one.objective}: {one.where} misses {one.worst:.2f} times what is right ({kind})"]
    lines.append(f"    {one.said}, k-hat {one.k_hat:.2f}, units miss {one.units:.2f}, {one.seconds:.1f} s")
    return "\n".join(lines + [f"    {note.splitlines()[0][:200] if note else ''}" for note in one.notes])


# -------------------------------------------------------------------------------------------------------------- files


def known_gold(path: Path) -> dict[int, dict[str, Any]]:
    """Return the gold of a file by seed, that of this version of the models."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["seed"]: row for row in rows if row["version"] == VERSION}


def add_gold(path: Path, seeds: list[int]) -> None:
    """Compute the gold of seeds that a file does not have, and add it."""
    known = known_gold(path)
    path.parent.mkdir(exist_ok=True)
    cases = [draw_case(seed) for seed in seeds if seed not in known]
    for case in sorted(cases, key=_cost):
        seed = case.seed
        with np.errstate(all="ignore"):
            found = gold(seed, case.density, case.truth)
        with path.open("a") as file:
            file.write(json.dumps({"version": VERSION, **found.as_dict()}) + "\n")
        print(seed, case.label, found.dropped or "gold", f"{found.seconds:.1f} s", flush=True)


def _cost(case: Case) -> float:
    """What gold costs, about: cheap ones come first."""
    return float(len(case.density.z) * 4.0 ** case.label["k"] * case.density.dim)


def span(text: str) -> list[int]:
    """Return the seeds of ``A:B``, or of ``B``."""
    first, _, last = text.rpartition(":")
    return list(range(int(first or 0), int(last)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gold", type=span, metavar="A:B", help="compute the gold of these seeds, and fit nothing")
    parser.add_argument("--file", type=Path, default=GOLD, help="of the gold")
    parser.add_argument("--seeds", type=span, metavar="A:B", help="those to fit; by default all that have gold")
    parser.add_argument("--only", type=int, nargs="+", metavar="SEED", help="the same, one by one")
    parser.add_argument("--objective", nargs="+", default=[DEFAULT], choices=[DEFAULT, *OBJECTIVES])
    parser.add_argument("--likelihood", nargs="+", help="fit only these")
    parser.add_argument("--k", type=int, nargs="+", help="fit only models of so many latents a unit")
    parser.add_argument("--float32", action="store_true", help="fit all in single precision")
    parser.add_argument("--patience", type=int, default=300, help="seconds after which a fit is given up")
    parser.add_argument("--write", type=Path, help="a line of JSON for each fit")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.gold is not None:
        add_gold(chosen.file, chosen.gold)
        return
    print_tables(run(chosen))


def run(chosen: argparse.Namespace) -> list[Outcome]:
    """Fit what was chosen, and say how it goes."""
    known = known_gold(chosen.file)
    dropped = [row for row in known.values() if row["dropped"]]
    print(f"{len(known) - len(dropped)} models have gold, {len(dropped)} were dropped")
    outcomes = []
    if chosen.write is not None and chosen.write.exists():
        outcomes = [Outcome(**json.loads(line)) for line in chosen.write.read_text().splitlines()]
    done = {(one.objective, one.seed) for one in outcomes}
    wanted = chosen.only or chosen.seeds or sorted(known)
    for objective in chosen.objective:
        for seed in wanted:
            if (objective, seed) in done or seed not in known or known[seed]["dropped"]:
                continue
            case = draw_case(seed)
            if not np.isclose(case.density.z.sum(), known[seed]["checksum"], rtol=1e-4):
                raise SystemExit(f"the gold of seed {seed} is of other data; raise VERSION, and compute it anew")
            label = case.label
            if chosen.likelihood and label["likelihood"] not in chosen.likelihood:
                continue
            if chosen.k and label["k"] not in chosen.k:
                continue
            rounded = chosen.float32 or label["dtype"] == "float32"
            one = judged(case, known[seed], objective, torch.float32 if rounded else torch.float64, chosen.patience)
            outcomes.append(one)
            print(f"{one.outcome}: {described(one, label).splitlines()[0]}", flush=True)
            if chosen.write is not None:
                with chosen.write.open("a") as file:
                    file.write(json.dumps(asdict(one)) + "\n")
    return outcomes


assert len(AROUND) == len(PROBABILITIES)

if __name__ == "__main__":
    main()
