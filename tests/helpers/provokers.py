"""The smallest code that provokes each message that docs/troubleshooting.rst quotes: models, log joints and guides."""

import pickle

import numpy
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, JitTrace_ELBO
from pyro.infer.autoguide import AutoGuideList

from laplace_amort import (
    Arrowhead,
    AutoLaplaceFamily,
    Boost,
    ClosedFormMode,
    FreeMode,
    LogJoint,
    MarginalCurvature,
    NewtonMode,
    NoRepair,
    SoftAbs,
    arrowhead_information,
    check_paths,
    check_structure,
    dual_path,
    dual_path_param,
    observed_information,
    subsample_information,
)
from laplace_amort.guide.routes import ExtraLoss

Z = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def counts_model(z=Z, size=None, scale=0.5):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z), subsample_size=size) as index:
        y = pyro.sample("y", dist.Normal(mu, scale))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z[index])


def ratings(z=Z):
    """A positive site in each unit."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.LogNormal(mu, 0.5))
        pyro.sample("z", dist.Poisson(y), obs=z)


def without_plate(z=Z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=z)


def discrete(z=Z):
    with pyro.plate("units", len(z)):
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Normal(kind, 1.0), obs=z)


GROUP = torch.arange(6) % 3
ANSWERS = (torch.arange(6) % 2).double()


def answers_of_groups(answers, design=None, inside=False):
    """Two answers of each of three groups, looked up in a plate of their own; or, by mistake, in that of the groups."""
    with pyro.plate("groups", 3):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        if inside:
            pyro.sample("z", dist.Bernoulli(logits=y[GROUP]), obs=answers)
            return
    with pyro.plate("answers", 6):
        pyro.sample("z", dist.Bernoulli(logits=y[GROUP] if design is None else design @ y), obs=answers)


class OwnBernoulli(dist.Bernoulli):
    """A density of the user's own, which is given its data as they are."""

    def log_prob(self, value):
        return -torch.nn.functional.binary_cross_entropy_with_logits(self.logits, value, reduction="none")


def of_arrays(answers=(), design=None, kind=dist.Bernoulli):
    """Arrays from around the model, and distributions of the user's own."""
    with pyro.plate("groups", 3):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
    with pyro.plate("answers", 6):
        pyro.sample("z", kind(logits=y[GROUP] if design is None else design() @ y), obs=answers())


def with_label(label):
    with pyro.plate("groups", 3):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(y + label, 1.0), obs=torch.zeros(3))


def proportions(z):
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Beta(y.exp(), 2.0), obs=z)


def imputed_group(seen):
    """A covariate of two kinds, of which some are missing."""
    with pyro.plate("units", 3):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Bernoulli(0.5), obs=torch.ones(3), obs_mask=seen)
        pyro.sample("z", dist.Normal(y + x, 1.0), obs=Z)


class Frame(dict):
    """What of a frame of pandas is seen here."""

    columns = ("z",)

    def to_numpy(self):
        return ANSWERS.numpy()


def looked_up(group, size=6):
    with pyro.plate("groups", 3):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
    with pyro.plate("answers", size):
        pyro.sample("z", dist.Bernoulli(logits=y[group]), obs=ANSWERS)


def more_data_than_units(z):
    with pyro.plate("units", 3):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def loop(z=Z, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("units", len(z), subsample_size=size):
        pyro.sample(f"z_{i}", dist.Normal(pyro.sample(f"y_{i}", dist.Normal(mu, 1.0)), 1.0), obs=z[i])


def observed(z=Z):
    pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=z)


def two_subsamples(z=Z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("regions", 2, subsample_size=1):
        pyro.sample("region", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        pyro.sample("z", dist.Normal(pyro.sample("y", dist.Normal(mu, 1.0)), 1.0), obs=z)


def directions(z=Z):
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.ProjectedNormal(torch.ones(2)))
        pyro.sample("z", dist.Normal(y[..., 0], 1.0), obs=z)


def changing(first):
    """A model with one site more or less from its second run on."""
    runs = iter([first, not first] + [not first] * 9)

    def model(z):
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0)) if next(runs) else 0.0
            pyro.sample("z", dist.Normal(y + shift, 1.0), obs=z)

    return model


def detached_bounds(z=Z):
    top = pyro.sample("top", dist.LogNormal(2.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Uniform(0.0, float(top)))
        pyro.sample("z", dist.Poisson(y), obs=z)


def noisy(z=Z):
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(torch.randn(()), 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def random_walk(z=Z):
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(0.0, 3.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)
    pyro.factor("walk", dist.Normal(y[..., :-1], sd).log_prob(y[..., 1:]).sum(-1))


def grows(size):
    """The plate has a size that follows from the value of an argument, not from its shape."""
    return lambda z: counts_model(torch.ones(int(size[0])))


def with_more_globals(z=Z, more=False):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    mu = mu + pyro.sample("nu", dist.Normal(0.0, 1.0)) if more else mu
    with pyro.plate("units", len(z)):
        pyro.sample("z", dist.Normal(pyro.sample("y", dist.Normal(mu, 1.0)), 1.0), obs=z)


def simplex(z=Z):
    with pyro.plate("units", len(z)):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("z", dist.Categorical(p), obs=torch.tensor([0, 1, 2]))


def kinked(z=Z):
    """A Laplace prior puts its kink where the mode is."""
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Laplace(0.0, 0.1))
        pyro.sample("z", dist.Normal(y, 1.0), obs=0.1 * z)


def saddle(z=Z):
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.ImproperUniform(constraints.real, (3,), ()))
        pyro.factor("constant", 0 * y)


def run(model, *args, start=True, **options):
    """Call a guide once."""
    pyro.clear_param_store()
    guide = AutoLaplaceFamily(model, **options)
    guide(*args)
    return guide


def log_joint(theta, y):
    return -(theta**2).sum() - ((y - theta) ** 2).sum()


def second_call(first, second, model=with_more_globals, **options):
    run(model, *first, **options)(*second)


def resized():
    size = [3]
    model = grows(size)
    guide = run(model, Z)
    size[0] = 4
    guide(Z)


def unpickled():
    guide = run(lambda z: counts_model(z), Z)
    pickle.loads(pickle.dumps(guide))(Z)


def in_a_list():
    pyro.clear_param_store()
    guides = AutoGuideList(counts_model)
    guides.append(AutoLaplaceFamily(counts_model, create_plates=lambda: pyro.plate("units", 3)))
    guides()


def two_choices():
    def model(z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", 3, subsample=torch.tensor([0, 1])) as index:
            pyro.sample("z", dist.Normal(pyro.sample("y", dist.Normal(mu, 1.0)), 1.0), obs=z[index])

    run(model, Z, create_plates=lambda z: pyro.plate("units", 3, subsample=torch.tensor([1, 2]), dim=-1))


def inference_mode():
    guide = run(counts_model)
    with torch.inference_mode():
        guide()


def jit():
    guide = run(counts_model)
    SVI(counts_model, guide, pyro.optim.Adam({"lr": 0.01}), JitTrace_ELBO()).step()


class HalfTwice(torch.autograd.Function):
    """Its derivative is wrong in one of two arguments."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad * b, grad * a.detach() * 2


class Once(torch.autograd.Function):
    """Differentiable once."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def leaf(*shape):
    return torch.zeros(*shape, requires_grad=True)


def third_route():
    theta = leaf(2)
    dual = dual_path(theta)
    y = dual.mean.exp()
    check_paths(dual, y, (dual.curvature * y * theta).sum())


def leak():
    dual = dual_path(leaf(2))
    check_paths(dual, dual.curvature.exp())


def missing():
    dual = dual_path(leaf(2))
    check_paths(dual, dual.mean.detach().exp())


def closed(fn, model=counts_model):
    run(model, Z, mode=ClosedFormMode(fn))


MODEL_MESSAGES = {
    "ModelError: no latent site lies in a plate (...), so there are no units.": lambda: run(without_plate),
    "ModelError: the model has no latent sample site: every one is observed": lambda: run(observed),
    "ModelError: latent site '...' is discrete (...), and a Hessian needs continuous latents.": lambda: run(discrete),
    "ModelError: site '...' has ... elements, and lies in plate '...' of size": lambda: run(
        answers_of_groups, ANSWERS, None, True
    ),
    "ModelError: observed site '...' (...) has data of ..., which its density cannot take": lambda: run(
        of_arrays, ANSWERS.long, None, OwnBernoulli
    ),
    "ModelError: observed site '...' (...) has ... of ... values that are impossible, the first": lambda: run(
        answers_of_groups, ANSWERS + 1
    ),
    "ModelError: observed site '...' has data that are no tensor, but": lambda: run(of_arrays, ANSWERS.numpy),
    "ModelError: the model got data that are no tensors after site": lambda: run(
        of_arrays, ANSWERS.double, torch.eye(6, 3).numpy
    ),
    "ModelError: observed site '...' (...) has ... of ... values that are on the edge of the support": lambda: run(
        proportions, torch.tensor([0.2, 1.0])
    ),
    "ModelError: site '...' (...) has ... elements that obs_mask hides, and site '...' depends on their": lambda: run(
        imputed_group, torch.tensor([True, False, True])
    ),
    "ModelError: argument ... of the model has ..., and tensors have numbers": lambda: run(
        with_label, numpy.array(["a", "b", "a"])
    ),
    "ModelError: argument ... of the model is a ..., with which it does not run": lambda: run(with_label, Frame()),
    "ModelError: '...' of a distribution ... after site '...' is NaN": lambda: run(
        answers_of_groups, ANSWERS, torch.full((6, 3), torch.nan)
    ),
    "ModelError: the model looks up element ... after site '...', and there are": lambda: run(looked_up, GROUP + 1),
    "ModelError: an index after site '...' is no integer": lambda: run(looked_up, GROUP.double()),
    "ModelError: site '...' has ... elements, and lies in plate '...' of size ... Data and covariates must have": (
        lambda: run(looked_up, GROUP, 5)
    ),
    "RuntimeError: The size of tensor a (...) must match the size of tensor b": lambda: run(
        more_data_than_units, Z[[0, 1, 2, 0]]
    ),
    "ModelError: the model puts tensors of different dtypes together": lambda: run(
        answers_of_groups, ANSWERS, torch.nn.functional.one_hot(GROUP).float()
    ),
    "ModelError: latent site '...' lies in the sequential plate '...', a loop in Python": lambda: run(loop),
    "ModelError: latent site '...' lies in the sequential, subsampled plate '...'; vectorize it": lambda: run(
        loop, Z, 2
    ),
    "ModelError: no latent site lies in a plate named '...'": lambda: run(counts_model, unit_plate="schools"),
    "ModelError: latent site '...' is global, but lies in plate '...' too, which subsamples": lambda: run(
        two_subsamples
    ),
    "ModelError: the support ... of latent site '...' (...) has no bijection from unconstrained space.": lambda: run(
        directions
    ),
    "ModelError: the model sampled site '...', which it had not at set-up; its sites must be fixed": lambda: run(
        changing(False), Z
    ),
    "ModelError: the latent sites of the model changed between runs: ...; they must be fixed": lambda: run(
        changing(True), Z
    ),
    "ModelError: plate '...' around site '...' has size ... in this run of the model, and had": resized,
    "ModelError: the support of site '...' has bounds ... in this run of the model, ... in another": lambda: run(
        detached_bounds
    ),
    "ModelError: the log joint of the model is ... and then ... at one and the same latents": lambda: run(noisy),
    "ModelError: the guide was set up for ... global elements and ... in each unit": lambda: second_call(
        [Z], [Z, True]
    ),
    "ModelError: the guide was set up for ... units, this call has ..., and the centers of FreeMode": lambda: (
        second_call([Z], [Z[:2]], mode=FreeMode())
    ),
    "ModelError: MarginalCurvature is the curvature along the mode of the units": lambda: AutoLaplaceFamily(
        counts_model, FreeMode(), head=MarginalCurvature()
    ),
    "ModelError: this guide was saved without its model": unpickled,
    "ModelError: this guide is part of an AutoGuideList, which makes the plates.": in_a_list,
    "ModelError: the mean of site '...' is no integral over one normal variable": lambda: run(simplex, Z).mean(Z),
    "ModelError: the value of site '...' lies outside its support, or on its boundary": lambda: LogJoint(
        ratings, Z
    ).unconstrain({"mu": torch.zeros(()), "y": -Z}),
    "ModelError: expected a value for each of ...; missing ..., unknown ...": lambda: LogJoint(
        counts_model, Z
    ).unconstrain({"mu": torch.zeros(())}),
    "ModelError: expected ... unconstrained elements in the order ...; got shape": lambda: LogJoint(counts_model, Z)(
        torch.zeros(3)
    ),
    "ModelError: leading shape ... of the packed values overlaps the batch shape ... of site": lambda: LogJoint(
        counts_model, Z
    ).unpack(torch.zeros(5, 4)),
    "TypeError: a LogJoint takes one mapping from site name to tensor, or tensors": lambda: LogJoint(counts_model, Z)(
        1.0
    ),
    "ModelError: plate '...' subsamples ... of ..., and this inner run of the model would draw other units": lambda: (
        LogJoint(counts_model, Z, 2)(torch.zeros(3))
    ),
    "ModelError: site '...' lies in plate '...', which subsamples ... of ...; the density of a joint draw": lambda: (
        LogJoint(counts_model, Z, 2).sample_sites(torch.zeros(3))
    ),
    "ModelError: the model takes the units ... of plate '...' by subsample=, and the guide's": two_choices,
    "StructureError: units are not independent of each other given the globals": lambda: run(random_walk),
    "StructureError: the blocks are not those of log_joint at this point": lambda: check_structure(
        log_joint,
        torch.zeros(1),
        torch.zeros(3, 1),
        arrowhead_information(lambda t, y: 2 * log_joint(t, y), torch.zeros(1), torch.zeros(3, 1)),
    ),
    "InformationError: log_joint returned a tensor of shape ..., not a scalar.": lambda: observed_information(
        lambda y: -(y**2), torch.zeros(2)
    ),
    "InformationError: log_joint does not depend on argument '...'": lambda: observed_information(
        lambda theta, y: -(y**2).sum(), torch.zeros(1), torch.zeros(2)
    ),
    "InformationError: the result of log_joint is not connected to any argument": lambda: observed_information(
        lambda y: -(y.detach() ** 2).sum(), torch.zeros(2)
    ),
    "InformationError: the second derivative of log_joint with respect to argument '...' does not exist": lambda: (
        observed_information(lambda y: -Once.apply(y).sum(), torch.ones(2))
    ),
    "InformationError: ... is ... at index ... Is a value outside its support": lambda: observed_information(
        lambda y: -y.sqrt().sum(), torch.zeros(2)
    ),
    "InformationError: observed information needs autograd, which inference_mode switches off": inference_mode,
    "InformationError: torch.jit.trace cannot hold a Hessian": jit,
    "InformationError: the Hessian of log_joint is not symmetric": lambda: check_structure(
        lambda t, y: -(t**2).sum() - (y**2).sum() + HalfTwice.apply(t, y[0]).sum(), torch.ones(1), torch.ones(3, 1)
    ),
    "ValueError: global_ has shape ... and local ...; expected (d,) and (N, k)": lambda: arrowhead_information(
        log_joint, torch.zeros(()), torch.zeros(3)
    ),
    "ModeNotFoundError: ... no convergence in the steps allowed": lambda: run(
        counts_model, Z, mode=NewtonMode(max_steps=0)
    ),
    "ModeNotFoundError: ... the gradient or the curvature overflows or is NaN where the search begins": lambda: run(
        counts_model, init_loc_fn=lambda site: torch.full(site["fn"].shape(), 400.0)
    ),
    "ModeNotFoundError: ... steps came to nothing: is there a kink": lambda: run(kinked),
    "ModeNotFoundError: ... the gradient is zero where the log joint is flat or curves upwards": lambda: run(saddle),
    "ModeNotFoundError: the closed form is not finite for ... of ... units": lambda: closed(
        lambda sites, z: {"y": 1 / (z - z[0])}
    ),
    "ModeWarning: the closed form is not the mode of ... of ... units": lambda: closed(lambda sites, z: {"y": z}),
    "TypeError: the closed form returned ..., not a dict of the local sites by name.": lambda: closed(
        lambda sites, z: z.log()
    ),
    "TypeError: the closed form returned ... for site '...', not a tensor": lambda: closed(lambda sites, z: {"y": 0.0}),
    "ModelError: the value of local site '...' has shape ..., and the site has batch shape": lambda: closed(
        lambda sites, z: {"y": sites["mu"]}
    ),
    "ValueError: FreeMode has no parameter yet": lambda: FreeMode().find(None, None, None),
    "NotPositiveDefiniteError: matrix is too far from positive definite": lambda: SoftAbs(max_relative_change=1.9)(
        -torch.eye(2)
    ),
    "NotPositiveDefiniteError: matrix is not positive definite: its smallest eigenvalue is": lambda: NoRepair()(
        -torch.eye(2)
    ),
    "NotPositiveDefiniteError: the matrix is nan at index": lambda: SoftAbs()(torch.full((2, 2), torch.nan)),
    "NotPositiveDefiniteError: the tail of unit ... is not positive definite": lambda: Arrowhead(
        torch.eye(1), torch.zeros(2, 1, 1), -torch.ones(2, 1, 1)
    ),
    "NotPositiveDefiniteError: the Schur complement is not positive definite": lambda: (
        Arrowhead(torch.eye(1), torch.ones(2, 1, 1), torch.ones(2, 1, 1)).global_scale_tril
    ),
    "ValueError: the matrix is not symmetric": lambda: SoftAbs()(torch.tensor([[1.0, 2.0], [0.0, 1.0]])),
    "RuntimeError: this Boost has no parameter yet": lambda: Boost()(torch.eye(2)),
    "ValueError: coordinates are subsampled by different factors": lambda: subsample_information(
        torch.eye(3), torch.tensor([1.0, 2.0, 3.0])
    ),
    "PathLeakError: mode (...) descends from the curvature output of dual_path": leak,
    "PathLeakError: log_prob depends on the raw parameter past both outputs of dual_path": third_route,
    "PathMissingWarning: the mode does not reach the mean output of dual_path": missing,
    "PathError: there is no graph to follow": lambda: check_paths(dual_path(torch.zeros(2)), torch.zeros(2)),
    "PathError: hide() needs the value of a parameter": lambda: ExtraLoss(pyro.infer.Trace_ELBO()).hide(leaf(2).exp()),
    "TypeError: value has dtype ..., which carries no gradient": lambda: dual_path(torch.arange(2)),
    "TypeError: the initial value of parameter '...' has dtype ..., which carries no gradient": lambda: dual_path_param(
        "theta", torch.arange(2)
    ),
}
