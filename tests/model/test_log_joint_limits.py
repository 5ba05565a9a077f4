"""What LogJoint hides from enclosing handlers, and what it refuses, each with its message."""

import re
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import (
    conjugate_normal,
    dependent_support,
    nested_plates,
    normals,
    poisson_lognormal,
    subsampled,
    with_param,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.infer.reparam import LocScaleReparam
from pyro.infer.tracegraph_elbo import TrackNonReparam

import laplace_amort.model.log_joint
from laplace_amort import LogJoint
from laplace_amort.errors import ModelError


def other():
    return {"mu": torch.tensor(9.0), "y": torch.full((4,), 9.0)}


HANDLERS = {
    "trace": poutine.trace,
    "scale": lambda: poutine.scale(scale=3.0),
    "mask": lambda: poutine.mask(mask=False),
    "particles": lambda: pyro.plate("particles", 5, dim=-2),
    "plate without a dimension": lambda: pyro.plate("outside", 4),
    "plate of the same name": lambda: pyro.plate("units", 4),
    "plate in the same place": lambda: pyro.plate("outside", 4, dim=-1),
    "subsampled plate": lambda: pyro.plate("outside", 8, subsample_size=4),
    "block": poutine.block,
    "block one": lambda: poutine.block(hide=["mu"]),
    "replay": lambda: poutine.replay(trace=poutine.trace(poutine.do(conjugate_normal, other())).get_trace(normals(4))),
    "condition": lambda: poutine.condition(data=other()),
    "do": lambda: poutine.do(data=other()),
    "uncondition": poutine.uncondition,
    "lift": lambda: poutine.lift(prior=dist.Normal(0.0, 1.0)),
    "seed": lambda: poutine.seed(rng_seed=7),
    "enumerate": lambda: poutine.enum(first_available_dim=-2),
    "infer_config": lambda: poutine.infer_config(config_fn=lambda site: {"is_auxiliary": True}),
    "initialize": lambda: InitMessenger(init_to_feasible),
    "reparam": lambda: poutine.reparam(config={"y": LocScaleReparam(0.0)}),
    "non-reparameterized": TrackNonReparam,
    "parameters": lambda: poutine.trace(param_only=True),
}


def check_invisible(handler):
    """Every method gives inside the handler what it gives outside, and an outer trace sees nothing."""
    log_joint = LogJoint(conjugate_normal, normals(4))
    packed = normals(5, seed=3)

    def results():
        pyro.set_rng_seed(1)
        made_here = LogJoint(conjugate_normal, normals(4))
        return [log_joint(packed), made_here(packed), log_joint.initial(), log_joint.unconstrain(dict(constrained))]

    constrained = log_joint.constrain(packed)
    expected = results()
    with poutine.trace() as outer, handler:
        inside = results()
    assert all(map(torch.equal, inside, expected))
    assert not outer.trace.nodes


@pytest.mark.parametrize("name", HANDLERS)
def test_invisible_to(name):
    check_invisible(HANDLERS[name]())


@pytest.mark.parametrize("name", ["trace", "scale", "mask", "particles", "condition", "do", "uncondition"])
def test_invisibility_check_finds_an_unblocked_run(monkeypatch, name):
    handler = HANDLERS[name]()
    monkeypatch.setattr(laplace_amort.model.log_joint.poutine, "block", nullcontext)
    with pytest.raises((AssertionError, ModelError, RuntimeError)):
        check_invisible(handler)


def test_invisible_inside_a_guide_in_its_own_plate():
    """A guide may open the model's subsampled plate and evaluate inside it, with the plate's indices."""
    z, packed = normals(6), normals(3, seed=3)
    log_joint = LogJoint(subsampled, z, 2)
    with pyro.plate("units", 6, subsample_size=2) as indices:
        inside = log_joint.with_indices(units=indices)(packed)
    assert torch.equal(inside, LogJoint(subsampled, z, subsample=indices)(packed))


def test_parameters_of_the_model_move_by_the_models_own_run_only():
    """SVI captures them from its run of the model; the inner run neither hides nor doubles their gradient."""
    z = normals(4)
    log_joint = LogJoint(with_param, z)

    def guide(z):
        with torch.no_grad():
            value = log_joint(torch.zeros(1))
        loc = pyro.param("loc", torch.zeros(())) + 0 * value
        pyro.sample("mu", dist.Delta(loc))

    loss = Trace_ELBO().differentiable_loss(with_param, guide, z)
    expected = torch.autograd.grad(loss, pyro.param("noise").unconstrained())[0]
    before = pyro.param("noise").unconstrained().detach().clone()
    SVI(with_param, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO()).step(z)
    torch.testing.assert_close(pyro.param("noise").unconstrained().detach(), before - 1e-3 * expected)


def test_random_numbers_are_left_alone():
    log_joint, packed = LogJoint(dependent_support, normals(3)), normals(4)
    state = torch.get_rng_state()
    log_joint(packed)
    log_joint.unconstrain(log_joint.constrain(packed))
    assert torch.equal(torch.get_rng_state(), state)


def switching(extra):
    """A model whose latent sites depend on an argument."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if extra:
        x = x + pyro.sample("y", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def one_latent(fn):
    def model():
        pyro.sample("x", fn)

    return model


def random_factor():
    return dist.TransformedDistribution(
        dist.Normal(torch.zeros(2, 2), 1.0).to_event(2), dist.transforms.LowerCholeskyTransform()
    )


def sequential_subsample(z):
    for i in pyro.plate("units", len(z), subsample_size=2):
        pyro.sample(f"y_{i}", dist.Normal(z[i], 1.0))


def everything_observed(z):
    pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(z)]).to_event(1), obs=z)


def conjugate(method, *args):
    return getattr(LogJoint(conjugate_normal, normals(4)), method)(*args)


def nested(method, *args):
    return getattr(LogJoint(nested_plates, normals(2, 3)), method)(*args)


REFUSED = {
    "categorical latent": (
        lambda: LogJoint(one_latent(dist.Categorical(torch.ones(2)))),
        "latent site 'x' is discrete (Categorical), and a Hessian needs continuous latents. If it is data, obs= is "
        "missing; if it is unknown, sum it out:\n    pyro.sample('x', ..., obs=data)\n    pyro.sample('observed', dist",
    ),
    "count latent": (lambda: LogJoint(one_latent(dist.Poisson(1.0))), "latent site 'x' is discrete (Poisson)"),
    "enumerated latent": (
        lambda: LogJoint(poutine.infer_config(one_latent(dist.Bernoulli(0.5)), lambda _: {"enumerate": "parallel"})),
        "latent site 'x' is discrete (Bernoulli)",
    ),
    "no latent": (lambda: LogJoint(everything_observed, normals(3)), "the model has no latent sample site: every one"),
    "matrix latent": (
        lambda: LogJoint(one_latent(random_factor())),
        "the support LowerCholesky() of latent site 'x' (TransformedDistribution) has no bijection from unconstrained "
        "space. Write the site in other coordinates, for instance with pyro.infer.reparam.",
    ),
    "direction latent": (
        lambda: LogJoint(one_latent(dist.ProjectedNormal(torch.ones(3)))),
        "of latent site 'x' (ProjectedNormal) has no bijection",
    ),
    "subsampling without indices": (
        lambda: LogJoint(subsampled, normals(6), 2)(torch.zeros(3)),
        "plate 'units' subsamples 2 of 6, and this inner run of the model would draw other units than the guide. Open "
        "the plate in the guide and hand its indices on:\n    plate = pyro.plate('units', 6, subsample_size=2, "
        "dim=...)\n    log_joint.with_indices(units=plate.indices)",
    ),
    "initial values without indices": (
        lambda: LogJoint(subsampled, normals(6), 2).initial(),
        "plate 'units' subsamples 2 of 6",
    ),
    "sequential subsampled plate": (
        lambda: LogJoint(sequential_subsample, normals(4)),
        "lies in the sequential, subsampled plate 'units'; vectorize it:\n"
        "    with pyro.plate('units', 4, subsample_size=2) as indices: ...",
    ),
    "new site": (
        lambda: LogJoint(switching, False).given(True)(torch.zeros(1)),
        "the model sampled site 'y', which it had not at set-up; its sites must be fixed",
    ),
    "vanished site": (
        lambda: LogJoint(switching, True).given(False)(torch.zeros(2)),
        "the latent sites of the model changed between runs: ['y']; they must be fixed",
    ),
    "data that grew": (
        lambda: LogJoint(poisson_lognormal, torch.ones(3)).given(torch.ones(4))(torch.zeros(5)),
        "plate 'units' around site 'y' has size 4 in this run of the model, and had 3 when its sites were looked for: "
        "did the arguments of the model change size? Make a new LogJoint for them.",
    ),
    "wrong number of elements": (
        lambda: conjugate("__call__", torch.zeros(2), torch.zeros(4)),
        "expected 5 unconstrained elements in the order mu (), y (4,); got shape (6,)",
    ),
    "no elements": (lambda: conjugate("unpack", torch.tensor(1.0)), "expected 5 unconstrained elements"),
    "missing name": (
        lambda: conjugate("__call__", {"mu": torch.tensor(0.0)}),
        "expected a value for each of ['mu', 'y']; missing ['y'], unknown []",
    ),
    "unknown name": (
        lambda: conjugate("pack", {"mu": torch.tensor(0.0), "y": torch.zeros(4), "x": torch.zeros(4)}),
        "missing [], unknown ['x']",
    ),
    "wrong shape of a site": (
        lambda: conjugate("pack", {"mu": torch.zeros(1), "y": torch.zeros(4)}),
        "site 'mu' has unconstrained shape (), got (1,)",
    ),
    "missing constrained value": (
        lambda: conjugate("unconstrain", {"y": torch.zeros(4)}),
        "missing ['mu'], unknown []",
    ),
    "unknown constrained value": (
        lambda: conjugate("unconstrain", {"mu": torch.tensor(0.0), "y": torch.zeros(4), "x": torch.zeros(4)}),
        "missing [], unknown ['x']",
    ),
    "value outside its support": (
        lambda: LogJoint(one_latent(dist.Exponential(1.0))).unconstrain({"x": torch.tensor(-1.0)}),
        "the value of site 'x' lies outside its support",
    ),
    "batch in the place of a plate": (
        lambda: conjugate("constrain", torch.zeros(3, 5)),
        "leading shape (3,) of the packed values overlaps the batch shape (4,) of site 'y'",
    ),
    "batch that would be scrambled": (
        lambda: nested("unpack", torch.zeros(7, 9)),
        "leading shape (7,) of the packed values overlaps the batch shape (2, 1) of site 'tau'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    refused, message = REFUSED[name]
    with pytest.raises(ModelError, match=re.escape(message)):
        refused()


@pytest.mark.parametrize("values", [(), (1.0, 2.0), ([torch.zeros(5)],), ({}, torch.zeros(5))])
def test_refuses_what_is_not_a_tensor(values):
    kinds = [type(value).__name__ for value in values]
    message = f"a LogJoint takes one mapping from site name to tensor, or tensors; got {kinds}"
    with pytest.raises(TypeError, match=re.escape(message)):
        conjugate("__call__", *values)


def without_its_shift_later():
    """A site vanishes in the second run."""
    runs = iter([True, *[False] * 9])

    def model():
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        if next(runs):
            pyro.sample("shift", dist.Uniform(low, low + y.exp()))

    return LogJoint(model)


@pytest.mark.parametrize(
    "use",
    [
        LogJoint.initial,
        LogJoint.prototype,
        lambda log_joint: log_joint(torch.zeros(3)),
        lambda log_joint: log_joint.constrain(torch.zeros(3)),
        lambda log_joint: log_joint.unconstrain({name: torch.tensor(0.5) for name in log_joint.sites}),
    ],
)
def test_a_site_that_vanishes_is_named(use):
    message = "the latent sites of the model changed between runs: ['shift']; they must be fixed"
    with pytest.raises(ModelError, match=re.escape(message)):
        use(without_its_shift_later())
