"""A guide written by hand for a model with constraints, right or with one planted mistake."""

import contextlib

import pyro
import pyro.distributions as dist
import torch

from laplace_amort import LogJoint, SoftAbs, dual_path_param, observed_information


def model(z):
    """Real, unit-interval and positive globals: the logistic Jacobian has a second derivative."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    rho = pyro.sample("rho", dist.Beta(2.0, 3.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 0.5 + rho))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def mode(theta, z):
    return 0.5 * theta[0] + 0.3 * torch.log1p(z) * theta[1].exp()


def single_path_information(log_joint, theta, z):
    """Planted mistake: one copy of theta, so the Hessian in theta goes through the mode as well."""
    y = mode(theta, z)
    gradient = torch.cat(torch.autograd.grad(log_joint(theta, y), (theta, y), create_graph=True))
    rows = [torch.cat(torch.autograd.grad(g, (theta, y), create_graph=True, materialize_grads=True)) for g in gradient]
    hessian = torch.stack(rows)
    return -(hessian + hessian.mT) / 2


def information_of(bug, log_joint, theta, y_hat, z):
    if bug == "single path":
        return single_path_information(log_joint, theta.mean, z)
    if bug == "missing Jacobian in the Hessian":
        return observed_information(lambda *v: log_joint(*v) - log_joint.log_jacobian(torch.cat(v)), theta.mean, y_hat)
    information = observed_information(log_joint, theta.curvature, y_hat)
    if bug == "wrong sign":  # of the cross terms, so that the matrix stays positive definite
        sign = torch.ones(len(information)).index_fill(0, torch.tensor([0]), -1.0)
        information = information * sign * sign[:, None]
    return information * 2 if bug == "scale once too often" else information


def make_guide(bug=None):
    def guide(z):
        log_joint = LogJoint(model, z)
        theta = dual_path_param("theta_hat", torch.tensor([0.3, -0.2], dtype=z.dtype))
        y_hat = mode(theta.curvature if bug == "leak" else theta.mean, z)
        y_hat = y_hat.detach() if bug == "detached mode" else y_hat
        information = information_of(bug, log_joint, theta, y_hat, z)
        precision, _ = SoftAbs()(information.detach() if bug == "detached precision" else information)
        loc = torch.cat([theta.mean, y_hat])
        normal = dist.MultivariateNormal(loc, precision_matrix=precision)
        joint = pyro.sample("joint", normal, infer={"is_auxiliary": True})
        if bug != "missing Jacobian in the density":
            log_joint.sample_sites(joint)
            return
        for name, value in log_joint.constrain(joint).items():
            with pyro.plate("units", len(z)) if name == "y" else contextlib.nullcontext():
                pyro.sample(name, dist.Delta(value))

    return guide
