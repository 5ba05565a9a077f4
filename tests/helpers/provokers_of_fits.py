"""The smallest code that provokes each message of docs/troubleshooting.rst: fits, diagnoses and checks of guides."""

import pyro
import pyro.distributions as dist
import torch

from helpers import causes
from helpers.fit_models import (
    ANSWERS,
    SCHOOLS,
    branching,
    either_sign,
    flat,
    gaussian,
    guide_for,
    kinked,
    nowhere,
    one_answer,
    poisson,
    poisson_counts,
    schools,
    subsampled,
    tails,
    weighted,
)
from helpers.planted_guides import make_guide, model
from helpers.provokers import Z, counts_model
from laplace_amort import (
    FitResult,
    FixedDrawELBO,
    GaussHermite,
    LogJoint,
    MarginalLaplace,
    MarginalQuadrature,
    QuasiNewton,
    Stochastic,
    TrustRegion,
    diagnose,
    fit,
    observed_information,
)
from laplace_amort.testing import check_guide


def global_kink(z):
    mu = pyro.sample("mu", dist.Laplace(0.3, 0.01))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def only_single(z):
    """A model that refuses every dtype but one."""
    if z.dtype != torch.float32:
        raise TypeError(f"this model takes torch.float32, got {z.dtype}")
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def with_parameter(z):
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("units", len(z)):
        pyro.sample("z", dist.Normal(pyro.sample("y", dist.Normal(mu, 1.0)), 1.0), obs=z)


def summed(z):
    """Units are independent, but the model adds their terms up itself."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
    pyro.factor("z", -((y - z) ** 2).sum(-1))


def frozen(z):
    """A scale that goes through NumPy: a constant of the recording."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 1 + 1e-4 * torch.as_tensor(mu.detach().numpy()).sin()
    with pyro.plate("units", len(z)):
        pyro.sample("z", dist.Normal(pyro.sample("y", dist.Normal(mu, scale)), 1.0), obs=z)


def answers(z):
    """Five answers of each unit: the joint curvature of the scale is negative."""
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(1.0, tau))
        pyro.sample("z", dist.Binomial(5, logits=y), obs=z)


def one_sided(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.StudentT(4.0, mu, 10.0))
        pyro.sample("z", dist.Bernoulli(logits=y), obs=z)


def heavy_units(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.StudentT(1.5, mu, 1.0))
        pyro.sample("z", dist.Normal(y, 30.0), obs=z)


def heavy_scale(z):
    """One unit says nothing against a scale without end."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(0.0, tau))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def fitted(model, *args, **options):
    """What a fit says: how it ended, and its notes."""
    result = fit(model, *args, progress=False, **options)
    return [f"{result.status.name}: {result.status}", *(f"note: {note}" for note in result.notes)]


def diagnosed(model, *args, simulations=0, **options):
    """What a diagnosis says of what is not good."""
    result = fit(model, *args, progress=False, **options)
    found = diagnose(result, simulations=simulations, progress=False)
    return [f"{f.name}: {f.sentence}" for f in found.findings if f.level > 0]


def judged(model, *args, **options):
    """What a verdict rests on."""
    result = fit(model, *args, progress=False, **options)
    return [f"{reason.verdict.name}: {reason.sentence}" for reason in result.judgement.reasons]


def bent(z):
    """Globals along ridges that bend far away."""
    a = pyro.sample("a", dist.Normal(0.0, 10.0).expand([6]).to_event(1))
    pyro.sample("b", dist.Normal(a[..., :5] ** 2, 0.1).to_event(1))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(a[..., 5:6], 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def either_sign_of_all(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu**2, 0.5))
        pyro.sample("z", dist.Normal(y, 0.5), obs=z)


def interrupted():
    runs = iter(range(100))

    def model(z):
        if next(runs, 0) == 30:
            raise KeyboardInterrupt
        return branching(z)

    return fitted(model, Z)


def another_fit():
    first = fit(gaussian, guide_for(gaussian), Z, progress=False)
    fit(gaussian, guide_for(gaussian), 2 * Z, resume=first)


def other_units():
    first = fit(gaussian, guide_for(gaussian), Z, progress=False)
    fit(gaussian, guide_for(gaussian), Z[:2], resume=first)


def no_fit_file():
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save({"loc": torch.zeros(2)}, path)
        fit(gaussian, guide_for(gaussian), Z, resume=path)


def no_model():
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.laf"
        fit(gaussian, Z, progress=False).save(path)
        FitResult.load(path).posterior.sample(10)


def no_posterior():
    _ = fit(nowhere, guide_for(nowhere), Z, progress=False).posterior


def another_model():
    fit(gaussian, guide_for(counts_model), Z)


def one_latent():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def checked(guide, model=one_latent, *args):
    pyro.clear_param_store()
    check_guide(model, guide, *args)


def drawing(fn):
    """A guide that draws ``x`` from what is made of a parameter."""
    return lambda: pyro.sample("x", fn(pyro.param("loc", torch.tensor(0.5))))


def elsewhere():
    pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0), infer={"is_auxiliary": True})


def too_many():
    normal = dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1)
    pyro.sample("x", dist.Delta(pyro.sample("raw", normal, infer={"is_auxiliary": True}).sum(-1)))


def stateful(calls=[0]):  # noqa: B006
    calls[0] += 1
    pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)) + 0.1 * calls[0], 1.0))


def kink_model():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("kink", -x.abs())


def kink_guide():
    log_joint = LogJoint(kink_model)
    loc = pyro.param("loc", torch.zeros(1))
    normal = dist.MultivariateNormal(loc, precision_matrix=observed_information(log_joint, loc))
    log_joint.sample_sites(pyro.sample("joint", normal, infer={"is_auxiliary": True}))


FIT_MESSAGES = {
    "TypeError: fit needs a guide of the amortized Laplace family, got": lambda: fit(
        gaussian, pyro.infer.autoguide.AutoNormal(gaussian), Z
    ),
    "ModelError: the guide was made for another model than the one given": another_model,
    "TypeError: objective must be one such as": lambda: fit(
        gaussian, guide_for(gaussian), Z, objective=pyro.infer.Trace_ELBO()
    ),
    "TypeError: optimizer must be TrustRegion() or QuasiNewton()": lambda: fit(
        gaussian, guide_for(gaussian), Z, optimizer=torch.optim.Adam
    ),
    "DeprecationWarning: Stochastic is an objective": lambda: fit(
        gaussian, guide_for(gaussian), Z, optimizer=Stochastic(window=20, max_steps=20)
    ),
    "DeprecationWarning: num_draws is a setting of FixedDrawELBO": lambda: fit(
        gaussian, guide_for(gaussian), Z, num_draws=4
    ),
    "TypeError: Stochastic() steps by an optimizer of torch's, and ... is another.": lambda: fit(
        gaussian, guide_for(gaussian), Z, objective=Stochastic(), optimizer=QuasiNewton()
    ),
    "TypeError: Stochastic() follows the ELBO of the guide, and ...() is another objective.": lambda: fit(
        gaussian, guide_for(gaussian), Z, objective=MarginalLaplace(), optimizer=Stochastic()
    ),
    "TypeError: TrustRegion needs an objective with second derivatives": lambda: fit(
        gaussian, Z, objective=FixedDrawELBO(), optimizer=TrustRegion()
    ),
    "ValueError: num_draws must be even": lambda: FixedDrawELBO(num_draws=5),
    "ValueError: a grid of ... points along each of the ... dimensions of a unit has": lambda: GaussHermite(9).points(
        4, Z
    ),
    "ModelError: the model takes ... of ... units of plate '...' at a time, and ... needs all of them": lambda: fit(
        subsampled, guide_for(subsampled), Z, 2, objective=MarginalLaplace()
    ),
    "ModelError: this objective moves the latents of the model, and '...' is a parameter.": lambda: fit(
        with_parameter, guide_for(with_parameter), Z, objective=MarginalLaplace()
    ),
    "StructureError: ... of site '...' depends on ... units": lambda: fit(
        summed, guide_for(summed), Z, objective=MarginalQuadrature()
    ),
    "MAX_STEPS: not converged in the steps allowed": lambda: fitted(
        poisson, poisson_counts(5), objective=MarginalLaplace(), optimizer=TrustRegion(max_steps=2)
    ),
    "TOO_FEW_DRAWS: converged for its own draws only": lambda: fitted(schools, *SCHOOLS, objective=FixedDrawELBO()),
    "note: after ... evaluations the objective was still rising": lambda: fitted(
        poisson, poisson_counts(5), optimizer=TrustRegion(max_steps=2)
    ),
    "STUCK: not converged: no step improves the objective although its gradient is not zero": lambda: fitted(
        global_kink, Z, objective=MarginalLaplace(), optimizer=QuasiNewton()
    ),
    "note: the log joint has rounding errors of": lambda: fitted(causes.in_single, causes.HEIGHT, causes.YEAR),
    "COLLAPSED: not converged: a scale ran to zero together with the globals that it is the scale of": lambda: fitted(
        causes.crossed, causes.ANSWERS
    ),
    "note: ... ran to ... together with the ... elements of": lambda: fitted(causes.crossed, causes.ANSWERS),
    "KINKED: not converged: the density has a kink, as of abs, relu, clamp, max or a Laplace density": lambda: fitted(
        causes.errors, causes.TIMES
    ),
    "note: the density has a kink along": lambda: fitted(causes.errors, causes.TIMES),
    "NO_MAXIMUM: not converged: at the best point the objective is flat or curves upwards": lambda: fitted(
        flat, Z, objective=MarginalQuadrature()
    ),
    "note: neither data nor prior say anything of": lambda: fitted(causes.hidden_prior, causes.MASKED),
    "START_FAILED: not begun: the objective does not exist at the start nor near it": lambda: fitted(nowhere, Z),
    "note: nothing else was found to be wrong. Start elsewhere": lambda: fitted(nowhere, Z),
    "INTERRUPTED: interrupted: the guide stands at the best point found": interrupted,
    "ValueError: there is no posterior": no_posterior,
    "note: every evaluation ran the model in Python, which takes longer: the model takes the value": lambda: fitted(
        branching, Z
    ),
    "note: every evaluation ran the model in Python, which takes longer: the ... of the recorded model": lambda: fitted(
        frozen, Z
    ),
    "note: and for one point at a time, which takes up to 100 times as long: ...": lambda: fitted(branching, Z),
    "note: computed in torch.float32, since the model does not run in double precision: ...": lambda: fitted(
        only_single, Z.float()
    ),
    "note: the last point without an objective": lambda: fitted(nowhere, Z),
    "note: flattest is the direction": lambda: fitted(flat, Z, objective=MarginalQuadrature()),
    "note: the curvature of ... changes by ... % within": lambda: fitted(kinked, Z, objective=MarginalLaplace()),
    "ResumeError: the saved fit went another way than this one": another_fit,
    "ResumeError: the saved fit has ... parameters and units ..., and this guide has others.": other_units,
    "ResumeError: ... was not written by FitResult.save": no_fit_file,
    "NeedsModelError: this fit was read from a file without its model": no_model,
    "INEXACT: better integrals over the units (...) give another posterior": lambda: judged(
        one_answer, ANSWERS, objective=MarginalLaplace()
    ),
    "NO_MOMENTS: ... has no ...: its density falls as ... to the power of": lambda: judged(heavy_scale, 30 * Z[:1]),
    "WEIGHTED: '...' counts with a weight (poutine.scale": lambda: judged(weighted, poisson_counts(10).double()),
    "POORLY_COVERED: k-hat of the importance weights of the globals is": lambda: judged(bent, Z),
    "SEVERAL_MODES: unit ... has another mode": lambda: judged(either_sign, Z),
    "SEVERAL_MODES: the globals have another mode, with about ... % of the mass": lambda: judged(either_sign_of_all, Z),
    "SEVERAL_MODES: ... optima were found, and the second has about ... % of the mass": lambda: judged(
        either_sign_of_all, Z, starts=8
    ),
    "KINKED: the curvature of ... changes by ... % within": lambda: judged(kinked, Z, objective=MarginalLaplace()),
    "NOT_A_MAXIMUM: the precision of the ... is not that of a maximum": lambda: judged(
        answers, (5 * ANSWERS[:50]).clamp(1, 4), objective=FixedDrawELBO()
    ),
    "NOT_COMPARED: check=False left the comparison out": lambda: judged(gaussian, Z, check=False),
    "NOT_COMPARED: it was fitted in minibatches": lambda: judged(
        subsampled, Z, 2, objective=Stochastic(accuracy=2.0, window=20, max_steps=4000)
    ),
    "convergence: not converged": lambda: diagnosed(
        gaussian, Z, objective=MarginalLaplace(), optimizer=TrustRegion(max_steps=1)
    ),
    "repair, globals: the precision is not that of a maximum": lambda: diagnosed(
        answers, (5 * ANSWERS[:50]).clamp(1, 4), objective=FixedDrawELBO()
    ),
    "k-hat, globals: the tail of the importance weights is too heavy, or few draws count": lambda: diagnosed(
        tails, Z, objective=MarginalLaplace()
    ),
    "k-hat, globals: the Gaussian does not cover the marginal density of the globals": lambda: diagnosed(
        tails, Z, objective=FixedDrawELBO()
    ),
    "error, globals: against ..., worst of all at": lambda: diagnosed(one_answer, ANSWERS, objective=MarginalLaplace()),
    "error, units: against ..., worst of all at": lambda: diagnosed(one_answer, ANSWERS, objective=FixedDrawELBO()),
    "skewness, units: worst of all unit": lambda: diagnosed(one_sided, ANSWERS, objective=MarginalLaplace()),
    "k-hat, units: worst of all unit": lambda: diagnosed(heavy_units, 30 * Z, objective=MarginalLaplace()),
    "second start: unit ... has another mode": lambda: diagnosed(either_sign, Z, objective=MarginalLaplace()),
    "simulated scores: ... data sets drawn from the model do not agree with its marginal density": lambda: diagnosed(
        weighted, poisson_counts().double(), objective=MarginalLaplace(), simulations=25
    ),
    "GuideCheckError: ... path leak at": lambda: checked(make_guide("leak"), model, Z),
    "GuideCheckError: ... partial Hessian at": lambda: checked(make_guide("scale once too often"), model, Z),
    "GuideCheckError: ... log density at": lambda: checked(make_guide("missing Jacobian in the density"), model, Z),
    "GuideCheckError: ... ELBO gradient at": lambda: checked(make_guide("detached mode"), model, Z),
    "GuideCheckError: ... Finite differences cannot decide": lambda: checked(kink_guide, kink_model),
    "GuideCheckError: the guide draws no continuous site": lambda: checked(drawing(dist.Delta)),
    "GuideCheckError: site '...' of the guide (...) is not reparameterized": lambda: checked(
        drawing(lambda loc: dist.Normal(loc, 1.0).has_rsample_(False))
    ),
    "GuideCheckError: the guide has no parameter": lambda: checked(one_latent),
    "GuideCheckError: the loss differs between two runs with the same seed": lambda: checked(stateful),
    "GuideCheckError: the guide is not Gaussian in unconstrained coordinates": lambda: checked(
        drawing(lambda loc: dist.StudentT(3.0, loc, 1.0))
    ),
    "GuideCheckError: the guide has no site for the latents": lambda: checked(elsewhere),
    "GuideCheckError: the guide draws ... numbers for ... unconstrained latents of the model": lambda: checked(
        too_many
    ),
}
