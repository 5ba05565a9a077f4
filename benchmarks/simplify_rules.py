"""What each rule of ``laplace_amort/autodiff/simplify.py`` saves: time without the rule over time with all, in one run.

Run ``python benchmarks/simplify_rules.py``; ``--units 1000`` chooses the size of the hierarchical Poisson model, which
is measured beside the examples at their data. *Gradient* is value and gradients of the recorded log joint, *marginal*
the Laplace approximation to the density of the globals with its derivatives, up to the fourth, at the modes of the
units. Processor time, the least of many rounds that take turns, which other processes disturb least; and the number of
tensor operations that are carried out, and of elements that they write, which nothing disturbs: the time of small data
is that of the former, the time of large data that of the latter.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyro
import torch
from family_cost import counts, model
from measure import machine, print_ratios
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_amort import AutoLaplaceFamily
from laplace_amort.autodiff import Recording, nearby, record, simplify
from laplace_amort.examples import ecological, epil, multisite, radon
from laplace_amort.guide import Problem
from laplace_amort.units import laplace_marginal

EXPANDED = "expanded as one"
Point = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def without(rule: str | None) -> Iterator[None]:
    """Record without one of the rules; None leaves all."""
    rules = {name: apply for name, apply in simplify.RULES.items() if name != rule}
    same = simplify._SAME - {torch.ops.aten.expand.default} if rule == EXPANDED else simplify._SAME
    with mock.patch.object(simplify, "RULES", rules), mock.patch.object(simplify, "_SAME", same):
        yield


def recordings(run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[dict[str, Recording], Point]:
    """A log joint recorded with all rules, and without each; at globals near zero and the modes of the units."""
    pyro.clear_param_store()
    problem = Problem(AutoLaplaceFamily(run), args, {})
    units, global_ = problem.unit_model.live(), nearby(problem.loc, 0.1)
    local = problem.mode.find(units, global_, problem.start_at(global_)).detach()
    made = {}
    for rule in (None, EXPANDED, *simplify.RULES):
        with without(rule):
            made["all" if rule is None else rule] = record(units.log_joint, global_, local)
    return made, (global_, local)


def gradient(log_joint: Recording, point: Point) -> None:
    """Value and gradients, as an ELBO takes them."""
    leaves = [part.clone().requires_grad_() for part in point]
    torch.autograd.grad(log_joint(*leaves), leaves)


def marginal(log_joint: Recording, point: Point) -> None:
    """The marginal Laplace density with its derivatives."""
    laplace_marginal(log_joint, *point)


class Work(TorchDispatchMode):
    """Count operations, and the elements of their results that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.operations, self.elements = self.operations + 1, self.elements + result.numel()
        return result


def work_of(fn: Callable[[], None]) -> Work:
    """What is done in one call, derivatives included."""
    with Work() as work:
        fn()
    return work


def least_seconds(fns: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Processor seconds of one call of each, the least over rounds that take turns."""
    least = dict.fromkeys(fns, float("inf"))
    names = list(fns)
    for _ in range(rounds):
        names = names[1:] + names[:1]  # none is always first
        for name, fn in ((name, fns[name]) for name in names):
            start = time.process_time()
            fn()
            least[name] = min(least[name], time.process_time() - start)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--units", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--rounds", type=int, default=100)
    chosen = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(machine())
    cases = {example.__name__.split(".")[-1]: (example.model, example.data()) for example in EXAMPLES}
    cases |= {f"{units} Poisson units": (model, (counts(units),)) for units in chosen.units}
    for title, task in (("gradient", gradient), ("marginal", marginal)):
        rows = []
        for name, case in cases.items():
            made, point = recordings(*case)
            fns = {rule: functools.partial(task, form, point) for rule, form in made.items()}
            works = {rule: work_of(fn) for rule, fn in fns.items()}
            figures = {
                "operations": {rule: work.operations for rule, work in works.items()},
                "elements": {rule: work.elements for rule, work in works.items()},
                "ms": {rule: 1e3 * time for rule, time in least_seconds(fns, chosen.rounds).items()},
            }
            for what, figure in figures.items():
                ratios = [figure[rule] / figure["all"] for rule in list(made)[1:]]
                rows.append((name, what, figure["all"], *ratios))
        print_ratios(f"{title}: without a rule over with all of them", ["model", "", "all", *list(made)[1:]], rows)


EXAMPLES = (epil, radon, multisite, ecological)

if __name__ == "__main__":
    main()
