"""Results of the demo, for the tests of its words and of its plots."""

import functools
from unittest import mock

import torch

from laplace_amort import Arrowhead, LaplaceGaussian, RepairReport
from laplace_amort.examples import datasets, demo

LABELS = ["un-amortized", "joint head", "marginal head"]


@functools.cache
def short_results():
    """Three steps of every example, made once."""
    with mock.patch.object(demo, "_EVALUATION", (2, 10)):
        return {name: demo.run(name, steps=3, progress=False) for name in demo.PROBLEMS}


def exact_result():
    """A result made up from the reference itself, so that every error is known: none."""
    problem, reference = demo.PROBLEMS["multisite"], datasets.reference("multisite")
    with demo.own_settings():
        args = problem.example.data()
        unit_model = problem.guides()["joint head"].gaussian(*args).unit_model
    means, precisions = (
        torch.cat([value(reference.variables[name]).reshape(-1).double() for name in unit_model.density.sites])
        for value in (lambda summary: summary.mean, lambda summary: summary.sd**-2)
    )
    head, tail = precisions[:3].diag(), precisions[3:].reshape(-1, 1, 1)
    unrepaired = RepairReport(1.0, 1.0, 0.0, 0, 1)
    fit = demo.Fit(
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
    return demo.DemoResult(problem, args, reference, [fit])
