"""Cost of dual_path against a pair of clones, forward and backward, as ratios of one run.

Run ``python benchmarks/dual_path_cost.py``.
"""

import functools

import torch
from measure import machine, print_ratios, seconds

from laplace_amort import DualPathParam, dual_path


def gradient(split, theta):
    """One forward and backward through both copies."""
    theta.grad = None
    mean, curvature = split(theta)
    torch.autograd.backward([mean, curvature], [mean.detach(), curvature.detach()])


def main():
    torch.set_num_threads(1)  # one thread compares best, and a forked child would wait for the others for ever
    print(machine())
    splits = {
        "clone pair": lambda theta: (theta.clone(), theta.clone()),
        "DualPathParam.apply": DualPathParam.apply,
        "dual_path": dual_path,
        "dual_path, gains 0.5": lambda theta: dual_path(theta, mean_gain=0.5, curvature_gain=0.5),
    }
    rows = []
    for size in (1, 10_000, 1_000_000):
        theta = torch.randn(size, dtype=torch.float64, requires_grad=True)
        times = seconds({name: functools.partial(gradient, split, theta) for name, split in splits.items()})
        rows += [(size, name, 1e6 * time, time / times["clone pair"]) for name, time in times.items()]
    print_ratios("forward and backward", ["elements", "how", "microseconds", "ratio"], rows)


if __name__ == "__main__":
    main()
