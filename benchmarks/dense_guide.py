"""One ELBO gradient of the hand-written dense guides against AutoMultivariateNormal, as ratios of one run.

    OMP_NUM_THREADS=1 python benchmarks/dense_guide.py

The model is that of ``laplace-amort demo``, on simulated sites. The guides of the family have 3 parameters (amortized)
or 3 + N; ``AutoMultivariateNormal`` has (3 + N)(4 + N) / 2 + 3 + N. A dense Hessian costs one reverse pass of the model
per latent, so the ratio grows with N: it is the reason for the arrowhead to come, and not a figure to be proud of.
"""

import pyro
import torch
from measure import machine, peak_mebibytes, print_ratios, seconds
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from laplace_amort.examples import multisite


def sites(num_units):
    """Effects and standard errors of simulated sites."""
    generator = torch.Generator().manual_seed(num_units)
    se = 0.1 + 0.2 * torch.rand(num_units, generator=generator)
    return 0.5 * torch.randn(num_units, generator=generator) + se * torch.randn(num_units, generator=generator), se


def main():
    torch.set_default_dtype(torch.float64)
    print(machine())
    rows = []
    for particles in (1, 16):
        for num_units in (10, 44, 200):
            args = sites(num_units)
            guides = {
                "AutoMultivariateNormal": AutoMultivariateNormal(multisite.model),
                "un-amortized": multisite.UnamortizedGuide(*args),
                "amortized": multisite.AmortizedGuide(*args),
            }
            costs = {}
            for name, guide in guides.items():
                pyro.clear_param_store()
                elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)

                def step(elbo=elbo, guide=guide, args=args):
                    elbo.loss_and_grads(multisite.model, guide, *args)

                costs[name] = seconds(step), peak_mebibytes(step)
            reference = costs["AutoMultivariateNormal"][0]
            rows += [
                (particles, num_units, name, 1e3 * time, time / reference, memory)
                for name, (time, memory) in costs.items()
            ]
    columns = ["particles", "units", "guide", "milliseconds", "ratio", "peak MiB"]
    print_ratios("one loss_and_grads", columns, rows)


if __name__ == "__main__":
    main()
