"""The guide of ``AutoLaplaceFamily`` written by hand with D x D matrices, and noise that both of them are given.

Nothing here knows of arrowheads, layouts or the guide's modes: the Hessian is dense, units are found by counting, the
mode is climbed to by the log joint itself and differentiated by the implicit function theorem.
"""

from __future__ import annotations

from collections import Counter

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from laplace_amort import LogJoint, SoftAbs, dual_path, observed_information, subsample_information


def joint_curvature(twin, theta, schur_complement):
    """The observed information as it is."""
    return schur_complement


def marginal_curvature(twin, theta, schur_complement):
    """The curvature of log p(theta, y(theta), z) - w/2 sum log|U_i|, along a mode that is exact to third order."""
    y = twin.find_mode(theta.detach()).detach()

    def marginal(theta: Tensor) -> Tensor:
        mode = y
        for _ in range(2):
            with torch.enable_grad():
                tail = observed_information(lambda y, theta=theta: twin.density(theta, y), mode)
            mode = mode + torch.linalg.solve(tail, twin.slope(theta, mode))
        tail = observed_information(lambda y: twin.density(theta, y), mode)
        return twin.density(theta, mode) - twin.weight * torch.logdet(tail) / 2

    return observed_information(marginal, theta)


class DenseTwin:
    """A guide for a :class:`unit_models.UnitCase`; its parameter is ``twin_loc``, in the order of the model's globals.

    :param case: the model, its arguments and the name of the unit plate.
    :param loc: where the globals stand, ``(d,)``.
    :param tail_repair: of the units' blocks, and ``head_repair`` of the Schur complement.
    :param head: :func:`joint_curvature` or :func:`marginal_curvature`.
    :param indices: of subsampled plates, by name.
    """

    def __init__(self, case, loc, tail_repair=None, head_repair=None, head=joint_curvature, indices=None):
        self.log_joint = LogJoint.at_indices(indices or {}, case.model, *case.args, **case.kwargs)
        self.start = loc.detach().clone()
        self.tail_repair, self.head_repair = tail_repair or SoftAbs(), head_repair or SoftAbs()
        self.head = head
        global_, units = count_units(self.log_joint.sites, case.unit_plate)
        self.global_dim, (self.num_units, self.local_dim) = len(global_), units.shape
        self.order = torch.cat([global_, units.reshape(-1)])  # place in the packed vector of each of theta, y_1 .. y_N
        self.scale = self.log_joint.subsample_scale()[self.order]
        self.weight = float(self.scale[-1])

    def __call__(self, *args, **kwargs):
        mean, precision = self.gaussian(pyro.param("twin_loc", self.start))
        normal = dist.MultivariateNormal(mean, precision_matrix=precision)
        joint = pyro.sample("twin_joint", normal, infer={"is_auxiliary": True})
        return self.log_joint.sample_sites(joint[..., self.order.argsort()])

    def density(self, theta: Tensor, y: Tensor) -> Tensor:
        """The log joint of globals ``(d,)`` and units ``(N k,)``."""
        return self.log_joint(torch.cat([theta, y])[self.order.argsort()])

    def gaussian(self, loc: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(D,)`` and precision ``(D, D)`` over theta, y_1 .. y_N."""
        theta = dual_path(loc)
        y = self.mode(theta.mean)
        return torch.cat([theta.mean, y]), self.precision(theta.curvature, y)

    def precision(self, theta: Tensor, y: Tensor) -> Tensor:
        """The repaired information at independent values of theta and y, without the weight of a minibatch."""
        d = self.global_dim
        information = self.information(theta, y)
        head, border = information[:d, :d], information[d:, :d]
        tail = self.repaired_tail(information[d:, d:])
        explained = border.mT @ torch.linalg.solve(tail, border)
        schur = self.head(self, theta, head - explained)
        schur = self.repaired_head(schur, head)
        rows = [torch.cat([schur + explained, border.mT], 1), torch.cat([border, tail], 1)]
        return subsample_information(torch.cat(rows), self.scale)

    def information(self, theta: Tensor, y: Tensor) -> Tensor:
        """The observed information ``(D, D)``."""
        if not self.global_dim:
            return observed_information(lambda y: self.density(theta, y), y)
        return observed_information(self.density, theta, y)

    def repaired_tail(self, tail: Tensor) -> Tensor:
        """The units' block ``(N k, N k)``, repaired unit by unit."""
        n, k = self.num_units, self.local_dim
        blocks = torch.stack([tail[i * k : (i + 1) * k, i * k : (i + 1) * k] for i in range(n)])
        torch.testing.assert_close(torch.block_diag(*blocks), tail)  # or the model has no units
        diagonal = blocks.diagonal(dim1=-2, dim2=-1)
        typical = (diagonal**2).mean(0).sqrt()
        blocks, _ = self.tail_repair(blocks, 0.01 * torch.hypot(diagonal, 0.01 * typical))
        return torch.block_diag(*blocks)

    def repaired_head(self, schur: Tensor, head: Tensor) -> Tensor:
        """The Schur complement, repaired in coordinates in which the head is the identity."""
        if not self.global_dim:
            return schur
        reference, _ = SoftAbs(floor=torch.finfo(head.dtype).eps ** (2 / 3))(head, (head.diagonal() ** 2 + 1).sqrt())
        root = torch.linalg.cholesky(reference)
        shares = torch.linalg.inv(root) @ schur @ torch.linalg.inv(root).mT
        return root @ self.head_repair((shares + shares.mT) / 2)[0] @ root.mT

    def mode(self, theta: Tensor) -> Tensor:
        """The mode of the units ``(N k,)``, with its derivative in theta by the implicit function theorem."""
        y, d = self.find_mode(theta.detach()), self.global_dim
        with torch.no_grad():
            information = self.information(theta, y)
            derivative = -torch.linalg.solve(information[d:, d:], information[d:, :d])
        # The slope is zero; its derivative in parameters of the model is not.
        by_params = torch.linalg.solve(information[d:, d:], self.slope(theta.detach(), y))
        return y + derivative @ (theta - theta.detach()) + by_params

    def slope(self, theta: Tensor, y: Tensor) -> Tensor:
        """The gradient in y, at a copy of it."""
        with torch.enable_grad():
            y = y.clone() if y.requires_grad else y.clone().requires_grad_()
            return torch.autograd.grad(self.density(theta, y), y, create_graph=True)[0]

    @torch.no_grad()
    def find_mode(self, theta: Tensor, steps: int = 60) -> Tensor:
        """Climb the log joint by Newton steps on absolute eigenvalues, each halved until it is no step down."""
        y = self.log_joint.initial()[self.order][self.global_dim :]
        for _ in range(steps):
            slope = self.slope(theta, y).detach()
            values, vectors = torch.linalg.eigh(observed_information(lambda y: self.density(theta, y), y))
            step = vectors @ ((vectors.mT @ slope) / values.abs().clamp(min=1e-3))
            if step.norm() < 1e-12 * (1 + y.norm()):
                return y + step
            here = self.density(theta, y)
            while not self.density(theta, y + step) >= here - 1e-13 * here.abs():
                step = step / 2
            y = y + step
        raise AssertionError("the mode of the twin was not found")

    def losses(self, loc: Tensor, noise: tuple[Tensor, Tensor]) -> Tensor:
        """Losses ``(P,)`` of draws made of given noise, by hand: log q(theta) + w sum log q(y_i | theta) - log p."""
        mean, precision = self.gaussian(loc)
        d, joint = self.global_dim, dist.MultivariateNormal(mean, precision_matrix=precision)
        flat = torch.cat([noise[0], noise[1].flatten(1)], dim=1)
        draws = mean + flat @ joint.scale_tril.mT
        log_q_global = torch.zeros(())
        if d:
            log_q_global = dist.MultivariateNormal(mean[:d], joint.covariance_matrix[:d, :d]).log_prob(draws[:, :d])
        log_q_local = joint.log_prob(draws) - log_q_global
        log_p = torch.stack([self.density(draw[:d], draw[d:]) for draw in draws])
        return log_q_global + self.weight * log_q_local - log_p

    def draws(self, loc: Tensor, noise: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
        """Constrained values by site of each draw made of given noise."""
        mean, precision = self.gaussian(loc)
        flat = torch.cat([noise[0], noise[1].flatten(1)], dim=1)
        draws = mean + flat @ dist.MultivariateNormal(mean, precision_matrix=precision).scale_tril.mT
        return [self.log_joint.constrain(draw[self.order.argsort()]) for draw in draws]


def count_units(sites, plate: str) -> tuple[Tensor, Tensor]:
    """Places in the packed vector of the globals ``(d,)`` and of each unit ``(N, k)``, found by numbering them."""
    global_, local = [torch.zeros(0, dtype=torch.long)], []
    for site in sites.values():
        numbers = torch.arange(site.slice.start, site.slice.stop).reshape(site.shape)
        frames = [frame for frame in site.plates if frame.name == plate]
        if not frames:
            global_.append(numbers.reshape(-1))
            continue
        axis = len(site.shape) - site.event_dim + frames[0].dim
        local.append(torch.stack([numbers.select(axis, unit).reshape(-1) for unit in range(frames[0].size)]))
    return torch.cat(global_), torch.cat(local, dim=1)


class Noise(Messenger):
    """Makes the auxiliary draws of a guide, or of the twin, from given standard normal noise, particle by particle.

    :param global_: ``(P, d)``.
    :param local: ``(P, N, k)``.
    """

    def __init__(self, global_: Tensor, local: Tensor) -> None:
        super().__init__()
        self.noise = {
            "_AutoLaplaceFamily_global": global_,
            "_AutoLaplaceFamily_local_noise": local,
            "twin_joint": torch.cat([global_, local.flatten(1)], dim=1),
        }
        self.used: Counter[str] = Counter()

    def _pyro_sample(self, msg) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self.noise:
            return
        particles = fn.shape().numel() // self.noise[name][0].numel()
        start = self.used[name]
        self.used[name] += particles
        noise = self.noise[name][start : start + particles].reshape(fn.shape())
        if isinstance(fn, dist.MultivariateNormal):
            noise = fn.loc + (fn.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        msg["value"] = noise


def standard_noise(particles: int, case, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Noise for so many particles of a model, ``(P, d)`` and ``(P, N, k)``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (particles, case.global_dim), (particles, case.num_units, case.local_dim)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def loss_and_gradients(elbo, case, guide, noise) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter in the store, that Pyro computes for given noise."""
    with Noise(*noise) as given:
        loss = elbo.loss_and_grads(case.model, guide, *case.args, **case.kwargs)
    assert given.used, "the guide drew none of the noise"
    assert set(given.used.values()) == {len(noise[0])}
    gradients = {}
    for name, leaf in pyro.get_param_store().named_parameters():
        if leaf.grad is not None:
            gradients[name], leaf.grad = leaf.grad, None
    return torch.as_tensor(loss), gradients
