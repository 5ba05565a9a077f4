"""Results of the demo, for the tests of its words and of its plots."""

import functools
from unittest import mock

import torch

from laplace_amort import Arrowhead, LaplaceGaussian, RepairReport
from laplace_amort.examples import svi_demo
from laplace_amort.examples.catalogue import EXAMPLES
from laplace_amort.examples.demo import run  # the function itself, which a test may replace in its module
from laplace_amort.examples.settings import own_settings
from laplace_amort.examples.yardstick import Yardstick

LABELS = ["un-amortized", "joint head", "marginal head"]


@functools.cache
def short_results():
    """Three steps of every example, made once."""
    with mock.patch.object(svi_demo, "_EVALUATION", (2, 10)):
        return {name: svi_demo.run(name, steps=3, progress=False) for name in EXAMPLES}


@functools.cache
def demo_result(name):
    """A demo as it is, made once."""
    return run(name, progress=False)


def exact_result():
    """A result made up from the reference itself, so that every error is known: none."""
    with own_settings():
        yardstick = Yardstick.of("multisite")
        guide = svi_demo.guides(yardstick.example)["joint head"]
        unit_model = guide.gaussian(*yardstick.example.module.data()).unit_model
    reference = yardstick.reference
    means, precisions = (
        torch.cat([value(reference.variables[name]).reshape(-1).double() for name in unit_model.density.sites])
        for value in (lambda summary: summary.mean, lambda summary: summary.sd**-2)
    )
    head, tail = precisions[:3].diag(), precisions[3:].reshape(-1, 1, 1)
    unrepaired = RepairReport(1.0, 1.0, 0.0, 0, 1)
    fit = svi_demo.SVIFit(
        label="joint head",
        gaussian=LaplaceGaussian(
            unit_model=unit_model,
            global_loc=means[:3],
            local_loc=means[3:].reshape(-1, 1),
            precision=Arrowhead(head, torch.zeros(len(tail), 1, 3, dtype=torch.float64), tail),
            head_report=unrepaired,
            tail_report=unrepaired,
        ),
        elbos=[-30.0, -27.0],
        steps=2,
        seconds=1.0,
        num_parameters=3,
        elbo=-26.9,
        elbo_standard_error=0.01,
    )
    return svi_demo.SVIResult(yardstick, [fit])
