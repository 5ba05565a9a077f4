"""How the tests of the guide step, store and compare it, and noise that is the same for every ELBO."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from helpers.models import counts
from helpers.unit_models import batches
from laplace_amort import AutoLaplaceFamily

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def closed_form(values, z):
    """The modes of models.conjugate_normal, in the form that ClosedFormMode takes."""
    share = 0.7**-2 / (0.7**-2 + 0.5**-2)
    return {"y": share * values["mu"] + (1 - share) * z}


def loss_of(model, guide, *args, seed=1, elbo=None):
    pyro.set_rng_seed(seed)
    return torch.as_tensor((elbo or Trace_ELBO()).loss(model, guide, *args))


def step(model, guide, *args, lr=0.05):
    return SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO()).step(*args)


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], **EXACT)


def with_state(**options):
    """A guide that has made a step, and its data."""
    guide, z = AutoLaplaceFamily(batches, **options), counts(5)
    step(batches, guide, z)
    return guide, z


def saved(guide):
    """What torch.save makes of it."""
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    return file


@contextlib.contextmanager
def fixed_noise(noise: list[Tensor]) -> Iterator[None]:
    """Let reparameterized normals take their noise from a list, in turn; each is reshaped to what is asked for.

    So two estimators that draw in another order or another shape can be given the same particles.
    """
    rest = list(noise)

    def take(shape, dtype, device):
        values = rest.pop(0)
        assert values.numel() == torch.Size(shape).numel(), (values.shape, shape)
        return values.reshape(shape).to(dtype)

    modules = (torch.distributions.normal, torch.distributions.multivariate_normal)
    saved = [module._standard_normal for module in modules]
    for module in modules:
        module._standard_normal = take
    try:
        yield
    finally:
        for module, original in zip(modules, saved, strict=True):
            module._standard_normal = original
    assert not rest, f"{len(rest)} draws were not made"
