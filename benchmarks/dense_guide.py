"""One ELBO gradient of a dense guide written by hand against AutoMultivariateNormal, as ratios of one run.

Run ``python benchmarks/dense_guide.py``.

The model is that of ``laplace-amort demo``, on simulated sites. The guides of the family have 3 parameters;
``AutoMultivariateNormal`` has of the order of N squared. A dense Hessian costs one reverse pass of the model a latent,
so the ratio grows with N; ``AutoLaplaceFamily``, which is the same Gaussian, makes it of blocks.
"""

import functools

import pyro
import torch
from measure import machine, peak_mebibytes, print_ratios, seconds
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from laplace_amort import AutoLaplaceFamily, ClosedFormMode
from laplace_amort.examples import multisite


def sites(num_units):
    """Effects and standard errors of simulated sites."""
    generator = torch.Generator().manual_seed(num_units)
    se = 0.1 + 0.2 * torch.rand(num_units, generator=generator)
    return 0.5 * torch.randn(num_units, generator=generator) + se * torch.randn(num_units, generator=generator), se


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # one thread compares best, and a forked child would wait for the others for ever
    print(machine())
    rows = []
    for particles in (1, 16):
        for num_units in (10, 44, 200):
            args = sites(num_units)
            guides = {
                "AutoMultivariateNormal": AutoMultivariateNormal(multisite.model),
                "by hand, dense": multisite.AmortizedGuide(*args),
                "AutoLaplaceFamily": AutoLaplaceFamily(multisite.model, ClosedFormMode(multisite.closed_form_mode)),
            }
            elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
            pyro.clear_param_store()
            steps = {
                name: functools.partial(elbo.loss_and_grads, multisite.model, guide, *args)
                for name, guide in guides.items()
            }
            times = seconds(steps)
            rows += [
                (
                    particles,
                    num_units,
                    name,
                    1e3 * time,
                    time / times["AutoMultivariateNormal"],
                    peak_mebibytes(steps[name]),
                )
                for name, time in times.items()
            ]
    columns = ["particles", "units", "guide", "milliseconds", "ratio", "peak MiB"]
    print_ratios("one loss_and_grads", columns, rows)


if __name__ == "__main__":
    main()
