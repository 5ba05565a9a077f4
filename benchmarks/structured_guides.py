"""Curvature and structure in other guides, for as far as they go: AutoLaplaceApproximation and AutoGaussian.

Run ``python benchmarks/structured_guides.py``; ``--units 10 100`` chooses.

Two tables. *One Hessian*: that of ``AutoLaplaceApproximation.laplace_approximation``, dense and row by row, without the
inverse (which raises here: away from the mode the Hessian is not positive definite), against
``AutoLaplaceFamily.gaussian``, modes, blocks, repair and all, and differentiable besides. *One ELBO gradient*:
``AutoGaussian``, which learns a precision with the sparsity of the model, in its dense and its funsor backend
(``pip install funsor``; without it the row says so), against ``AutoLaplaceFamily``, which computes one. A rival is left
out of the larger sizes once a step takes longer than --limit seconds.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from family_cost import counts, model
from measure import machine, print_ratios, seconds
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGaussian, AutoLaplaceApproximation
from pyro.ops.hessian import hessian

from laplace_amort import AutoLaplaceFamily

FAMILY = "AutoLaplaceFamily"


def hessians(data: torch.Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One Hessian of each guide, at its start."""
    family, rival = AutoLaplaceFamily(model), AutoLaplaceApproximation(model)
    yield FAMILY, functools.partial(family.gaussian, data)
    rival(data)

    def rows() -> torch.Tensor:  # what laplace_approximation does first
        guide_trace = poutine.trace(rival).get_trace(data)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(data)
        return hessian(guide_trace.log_prob_sum() - model_trace.log_prob_sum(), rival.loc)

    yield "AutoLaplaceApproximation", rows


def gradients(data: torch.Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One ELBO gradient of each guide, at its start."""
    elbo = Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=2)
    yield FAMILY, functools.partial(elbo.loss_and_grads, model, AutoLaplaceFamily(model), data)
    for backend in ("dense", "funsor"):
        try:
            guide = AutoGaussian(model, backend=backend)
            guide(data)
        except ImportError:
            print(f"AutoGaussian, {backend}: left out, because funsor is not installed")
            continue
        yield f"AutoGaussian, {backend}", functools.partial(elbo.loss_and_grads, model, guide, data)


def compare(
    what: Callable[[torch.Tensor], Iterator[tuple[str, Callable[[], Any]]]], sizes: list[int], limit: float
) -> Iterator[tuple[Any, ...]]:
    """Rows of size, name, milliseconds and ratio to the family."""
    slow: set[str] = set()
    for size in sizes:
        pyro.clear_param_store()
        fns = {}
        for name, fn in what(counts(size)):
            if name in slow:
                continue
            start = time.perf_counter()
            fn()
            if time.perf_counter() - start > limit:
                slow.add(name)
            fns[name] = fn
        times = seconds(fns, rounds=3)
        yield from ((size, name, 1e3 * value, value / times[FAMILY]) for name, value in times.items())


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--units", type=int, nargs="+", default=[10, 100, 300, 1000, 10_000])
    parser.add_argument("--limit", type=float, default=2.0)
    chosen = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(machine())
    columns = ["units", "guide", "milliseconds", "ratio"]
    print_ratios("one Hessian", columns, list(compare(hessians, chosen.units, chosen.limit)))
    print_ratios("one ELBO gradient, 4 particles", columns, list(compare(gradients, chosen.units, chosen.limit)))


if __name__ == "__main__":
    main()
