"""The algebra of an arrowhead against the same by batched LAPACK, forward and backward, as ratios of one run.

Run ``python benchmarks/arrowhead_blocks.py``; ``--units 100000`` and ``--globals 5`` choose.

Factor, log-determinant, solve and draw, and the gradient of all of it in the blocks. The rival is plain torch, as
``MultivariateNormal`` does it: Cholesky factors, triangular solves, and a second factor for the draws.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from measure import machine, print_ratios, seconds
from torch import Tensor

from laplace_amort import Arrowhead

Inputs = tuple[list[Tensor], list[Tensor]]


def inputs(num_units: int, global_dim: int, local_dim: int) -> Inputs:
    """Blocks that require gradients, and a right-hand side and noise for globals and units."""
    generator = torch.Generator().manual_seed(0)
    random = functools.partial(torch.randn, generator=generator)
    root = random(num_units, local_dim, local_dim)
    head = 10.0 * num_units * local_dim * torch.eye(global_dim)
    blocks = [head, random(num_units, local_dim, global_dim), root @ root.mT + torch.eye(local_dim)]
    rest = [random(global_dim), random(num_units, local_dim), random(global_dim), random(num_units, local_dim)]
    return [block.requires_grad_() for block in blocks], rest


def ours(blocks: list[Tensor], rest: list[Tensor]) -> list[Tensor]:
    """All of it by ``Arrowhead``."""
    precision = Arrowhead(*blocks)
    return [precision.log_det(), *precision.solve(*rest[:2]), *precision.draw(*rest[2:])]


def lapack(blocks: list[Tensor], rest: list[Tensor]) -> list[Tensor]:
    """All of it by ``torch.linalg``."""
    head, border, tail = blocks
    flat = border.flatten(0, 1)
    factor = torch.linalg.cholesky(tail)
    regression = torch.cholesky_solve(border, factor)
    schur = head - flat.mT @ regression.flatten(0, 1)
    schur_factor = torch.linalg.cholesky(schur)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum() + 2 * schur_factor.diagonal().log().sum()
    rhs = rest[0] - regression.flatten(0, 1).mT @ rest[1].flatten()
    global_ = torch.cholesky_solve(rhs.unsqueeze(-1), schur_factor).squeeze(-1)
    local = torch.cholesky_solve(rest[1].unsqueeze(-1), factor).squeeze(-1) - regression @ global_
    drawn = scale_tril(schur) @ rest[2]
    return [log_det, global_, local, drawn, (scale_tril(tail) @ rest[3].unsqueeze(-1)).squeeze(-1) - regression @ drawn]


def scale_tril(precision: Tensor) -> Tensor:
    """The lower factor of the inverse, by a Cholesky factor from the other end."""
    upper = torch.linalg.cholesky(precision.flip(-2, -1)).flip(-2, -1).mT
    return torch.linalg.solve_triangular(upper, torch.eye(precision.shape[-1]), upper=False)


def gradient(function: Callable[..., list[Tensor]], blocks: list[Tensor], rest: list[Tensor]) -> Any:
    """Forward and backward."""
    loss = torch.stack([output.square().sum() for output in function(blocks, rest)]).sum()
    return loss.detach(), torch.autograd.grad(loss, blocks)


def main() -> None:
    """Print one row for each size of block."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--globals", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(machine())
    rows = []
    for local_dim in (1, 2, 3, 4):
        data = inputs(chosen.units, chosen.globals, local_dim)
        fns = {f.__name__: functools.partial(gradient, f, *data) for f in (ours, lapack)}
        (here, _), (there, _) = (fn() for fn in fns.values())
        times = seconds(fns, rounds=3)
        error = float((here - there).abs() / there.abs())
        rows.append((local_dim, 1e3 * times["ours"], 1e3 * times["lapack"], times["lapack"] / times["ours"], error))
    columns = ["k", "Arrowhead, ms", "LAPACK, ms", "ratio", "relative difference"]
    print_ratios(f"{chosen.units} units, {chosen.globals} globals, forward and backward", columns, rows)


if __name__ == "__main__":
    main()
