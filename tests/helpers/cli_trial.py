"""A user's files for the tests of the command line: models, and the rows of a trial in five clinics."""

MODELS = """\
import pyro
import pyro.distributions as dist
import torch
from laplace_amort import AutoLaplaceFamily, MarginalCurvature


def model(clinic, arm, healed, total):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    effect = pyro.sample("effect", dist.Normal(0.0, 5.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("clinics", int(clinic.max()) + 1):
        level = pyro.sample("level", dist.Normal(mu, sigma))
    with pyro.plate("rows", len(healed)):
        logits = level[..., clinic] + effect * arm
        pyro.sample("healed", dist.Binomial(total, logits=logits), obs=healed)


def with_parameter(clinic, arm, healed, total):
    center = pyro.param("center", torch.zeros(()))
    mu = pyro.sample("mu", dist.Normal(center, 5.0))
    with pyro.plate("clinics", int(clinic.max()) + 1):
        level = pyro.sample("level", dist.Normal(mu, 1.0))
    with pyro.plate("rows", len(healed)):
        pyro.sample("healed", dist.Binomial(total, logits=level[..., clinic]), obs=healed)


def named(clinic, arm, healed, total):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2)).to_event(1))
    factor = pyro.sample("L", dist.LKJCholesky(2, 2.0))
    pyro.deterministic("ratio", tau[..., 0] / tau[..., 1])
    with pyro.plate("clinics", int(clinic.max()) + 1):
        scale_tril = tau.unsqueeze(-1) * factor
        level = pyro.sample("level", dist.MultivariateNormal(mu + torch.zeros(2), scale_tril=scale_tril))
    with pyro.plate("rows", len(healed)):
        rows = level[clinic]
        pyro.sample("healed", dist.Binomial(total, logits=rows[:, 0] + rows[:, 1] * arm), obs=healed)


def cauchy(clinic, arm, healed, total):
    pyro.sample("nu", dist.HalfCauchy(1.0))
    model(clinic, arm, healed, total)


def of_dict(data):
    model(data["clinic"], data["arm"], data["healed"], data["total"])


def of_absent(data):
    model(data["clinik"])


def yes_or_no(clinic, arm, healed, prior=5.0, *, scale):
    mu = pyro.sample("mu", dist.Normal(0.0, prior))
    with pyro.plate("clinics", len(clinic.unique())):
        level = pyro.sample("level", dist.Normal(mu, scale))
    with pyro.plate("rows", len(healed)):
        pyro.sample("healed", dist.Bernoulli(logits=level[..., clinic]), obs=(healed > 5) * 1.0)
        assert arm.dtype == torch.get_default_dtype()


def case(clinic, arm, healed, total):
    return model, AutoLaplaceFamily(model, head=MarginalCurvature()), (clinic, arm, healed, total)


def pair(clinic, arm, healed, total):
    return model, [clinic, arm - 0.5, healed, total]


def triple(clinic):
    return model, None, (), {}, ()


def other_guide(clinic):
    return model, 3, ()


def bare_argument(clinic):
    return model, clinic


def shifted(clinic, arm, healed, total):
    model(clinic - 1, arm, healed, total)


def short(clinic, arm, healed, total):
    with pyro.plate("clinics", 2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    level[..., clinic]


def broken(clinic):
    raise ValueError("not today")


class Class:
    def __call__(self, clinic):
        pass


class Unready(pyro.nn.PyroModule):
    def forward(self, clinic, arm, healed, total):
        return model(clinic, arm, healed, total)


module = Unready()


def minibatch(healed):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(healed), subsample_size=4) as rows:
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("healed", dist.Normal(y, 1.0), obs=healed[rows])
"""
ROWS = """\
clinic,arm,healed,total
1,drug,11,36
1,control,10,37
2,drug,16,20
2,control,22,32
3,drug,14,19
3,control,7,19
4,drug,2,16
4,control,1,17
5,drug,6,17
5,control,0,12
"""
WAITS = """\
import signal
import sys
import pyro
import pyro.distributions as dist
from models import model

calls = []
# A process that a shell started in the background ignores Ctrl-C, and so would this one, its child.
signal.signal(signal.SIGINT, signal.default_int_handler)


def waiting(clinic, arm, healed, total):
    calls.append(None)
    if len(calls) == 24:
        print("under way", file=sys.stderr, flush=True)
        signal.pause()
    float(pyro.sample("n", dist.Normal(0.0, 1.0)).detach())  # so that it cannot be recorded
    model(clinic, arm, healed, total)
"""
