"""What can be written down: idioms of models, every distribution of the table, and what cannot, with its reason."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.distributions import ROWS
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import nn

from laplace_amort import LogJoint, RecordingError
from laplace_amort.autodiff import recorder as room
from laplace_amort.autodiff.recording import record

T = torch.tensor([0.3, -0.7, 0.9, 0.2], dtype=torch.float64)
Y = torch.tensor([[0.4, -0.2], [1.1, 0.6], [-0.5, 0.1]], dtype=torch.float64)
X = torch.linspace(-1, 1, 28, dtype=torch.float64).reshape(7, 4).sin()
ROW = torch.tensor([0, 1, 2, 0, 1, 2, 0])
SEEN = torch.tensor([True, False, True, True])
PRIOR = dist.Normal(torch.zeros(4, dtype=torch.float64), 1.0, validate_args=True).to_event(1)
COUNTS = torch.tensor([[1.0, 2.0, 0.0, 2.0], [0.0, 0.0, 5.0, 0.0]], dtype=torch.float64)


def written_slice(t, y):
    p = torch.zeros(4, dtype=t.dtype)
    p[1:-1] = t[:2]
    return p * t


def written_rows(t, y):
    table = torch.zeros(7, 2, dtype=t.dtype)
    table[:] = y[ROW]
    return table


def written_element(t, y):
    p = torch.zeros(3, 4, dtype=t.dtype)
    p[..., 0] = y[:, 0]
    p[..., -1] = t[0] * y[:, 1]
    return p


def written_columns(t, y):
    table = torch.zeros(3, 4, dtype=t.dtype)
    table[:, torch.tensor([0, 2])] = y  # a colon among the indices
    return table


def written_mask(t, y):
    a = t.clone()
    a[~SEEN] = 0.0
    return a**2


def written_where_latents_say(t, y):
    a = 2 * t
    a[a > 1] = 0.5
    return a


def grown(t, y):
    total = torch.zeros(4, dtype=t.dtype)
    for number in range(3):
        total += t**number
    return total


def recurrence(t, y):
    state = t[0]
    states = []
    for step in range(5):
        state = torch.tanh(state + t[1]) + step
        states.append(state)
    return torch.stack(states)


def scattered(t, y):
    return torch.zeros(3, dtype=t.dtype).scatter_(0, torch.tensor([2, 0, 1]), t[:3])


def added_by_index(t, y):
    return torch.zeros(3, dtype=t.dtype).index_add_(0, torch.tensor([0, 1, 2, 0]), t) ** 2


def squeezed(t, y):
    return (t.unsqueeze(0) @ X.T).squeeze_(0)


def covariance(t, y):
    distance = (X[:4, None, 0] - X[None, :4, 0]) ** 2
    return t[0].exp() * torch.exp(-distance * t[1].exp()) + 0.1 * torch.eye(4, dtype=t.dtype)


IDIOMS = {
    "vector @ matrix": lambda t, y: t @ X.T,
    "matrix @ vector": lambda t, y: X @ t,
    "vector @ vector": lambda t, y: t @ t,
    "matrix @ matrix": lambda t, y: y.mT @ y,
    "stack @ matrix": lambda t, y: X.expand(2, 7, 4) @ t.diag(),
    "matrix @ stack": lambda t, y: y @ y.mT.expand(2, 2, 3),
    "stack @ vector": lambda t, y: X.expand(2, 7, 4) @ t,
    "mv": lambda t, y: X.mv(t),
    "einsum": lambda t, y: torch.einsum("ni,i->n", X, t),
    "einsum of three": lambda t, y: torch.einsum("ni,i,nj->j", X, t, X[:, :2]),
    "linear": lambda t, y: nn.functional.linear(y, X[:3, :2]),
    "index": lambda t, y: y[ROW],
    "index on the right": lambda t, y: y.mT[..., ROW],
    "mask of data": lambda t, y: t[SEEN].exp(),
    "slices with negative ends": lambda t, y: t[1:] * t[:-1] + t[-3:],
    "gather": lambda t, y: t.gather(0, torch.tensor([3, 3, 0])),
    "take_along_dim": lambda t, y: y.take_along_dim(torch.tensor([[1], [0], [1]]), 1),
    "where": lambda t, y: torch.where(t > 0, t, t.exp()),
    "where, data": lambda t, y: torch.where(SEEN, t, 0.0),
    "clamp": lambda t, y: t.clamp(min=0.1, max=0.5),
    "cumsum": lambda t, y: t.cumsum(0),
    "cumprod": lambda t, y: t.cumprod(0),
    "flip": lambda t, y: t.flip(0) * t,
    "logsumexp": lambda t, y: y.logsumexp(-1),
    "logcumsumexp": lambda t, y: t.logcumsumexp(0),
    "softmax": lambda t, y: y.softmax(-1)[:, 0],
    "softplus": lambda t, y: nn.functional.softplus(t),
    "cat and stack": lambda t, y: torch.stack([torch.cat([t[:1], -t[:1]]), t[1:3]]),
    "split": lambda t, y: t.split(2)[1],
    "norm": lambda t, y: y.norm(dim=-1),
    "cholesky": lambda t, y: torch.linalg.cholesky(covariance(t, y)).diagonal().log(),
    "solve": lambda t, y: torch.linalg.solve(covariance(t, y), t),
    "inverse": lambda t, y: torch.linalg.inv(covariance(t, y)),
    "logdet": lambda t, y: torch.logdet(covariance(t, y)),
    "triangular solve": lambda t, y: torch.linalg.solve_triangular(covariance(t, y), t[:, None], upper=True),
    "diag_embed": lambda t, y: y.diag_embed(),
    "outer": lambda t, y: torch.outer(t, t).tril(),
    "a slice that is written": written_slice,
    "an element that is written": written_element,
    "columns that are written": written_columns,
    "rows that are written": written_rows,
    "a mask that is written": written_mask,
    "a mask of latents that is written": written_where_latents_say,
    "a sum that grows in place": grown,
    "masked_fill_": lambda t, y: t.clone().masked_fill_(~SEEN, 0.0),
    "index_put": lambda t, y: torch.zeros(7, 4, dtype=t.dtype).index_put((ROW,), t.expand(7, 4)) * X,
    "copy_": lambda t, y: torch.empty(4, dtype=t.dtype).copy_(t) ** 2,
    "scatter_": scattered,
    "index_add_": added_by_index,
    "squeeze_": squeezed,
    "a recurrence": recurrence,
    "a loop over elements": lambda t, y: torch.stack([t[i] * t[i - 1] for i in range(4)]),
    "float32 beside float64": lambda t, y: t.float().exp().double() * t,
    "a validated prior from outside": lambda t, y: PRIOR.log_prob(t),
    "a prior that expands": lambda t, y: dist.Normal(0.0, 1.0, validate_args=True).expand([4]).log_prob(t),
    "multinomial": lambda t, y: dist.Multinomial(5, t.softmax(-1)).log_prob(COUNTS),
    "ordered logistic": lambda t, y: dist.OrderedLogistic(t, t.new_tensor([-1.0, 0.0, 1.0])).log_prob(COUNTS[0]),
    "multivariate normal": lambda t, y: dist.MultivariateNormal(t, covariance(t, y)).log_prob(X),
}


@pytest.mark.parametrize("name", IDIOMS)
@pytest.mark.parametrize("validate", [False, True], ids=["plain", "validated"])
def test_idiom_is_recorded(name, validate):
    """Recorded, checked there by value and gradients at two other points, and mapped, with the gradients of each."""

    def log_joint(t, y):
        return -(IDIOMS[name](t, y) ** 2).sum() - (t**2).sum() - (y**2).sum()

    with pyro.validation_enabled(validate):
        recording = record(log_joint, T, Y)
        moved = T + 0.05, Y - 0.02
        assert recording(*moved).item() == pytest.approx(log_joint(*moved).item(), rel=1e-12)
    assert_maps(recording)


def assert_maps(recording):
    """Many points at once have the values, and the gradients, of each of them."""
    points = [(T + 0.1 * i, Y - 0.05 * i) for i in range(3)]
    together = [torch.stack(parts).requires_grad_() for parts in zip(*points, strict=True)]
    values = torch.func.vmap(recording)(*together)
    gradients = torch.autograd.grad(values.sum(), together, materialize_grads=True)
    for i, point in enumerate(points):
        point = [part.clone().requires_grad_() for part in point]
        value = recording(*point)
        torch.testing.assert_close(values[i], value)
        for many, one in zip(gradients, torch.autograd.grad(value, point, materialize_grads=True), strict=True):
            torch.testing.assert_close(many[i], one)


class MapsWrongly(torch.autograd.Function):
    """The sine at one point, its half at many at once."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()

    @staticmethod
    def vmap(info, in_dims, x):
        return x.sin() / 2, in_dims[0]


def test_what_maps_wrongly_is_not_recorded(monkeypatch):
    monkeypatch.setitem(room._INSTEAD, torch.ops.aten.sin.default, MapsWrongly.apply)
    with pytest.raises(RecordingError, match="several points at once differs from that at each of them by"):
        record(lambda t, y: t.sin().sum() + y.sum(), T, Y)


# Of each the reason: shapes or branches that follow from the values of latents.
NOT_RECORDED = {
    "Stable": "takes the value of a latent",  # it chooses, element by element, near which value it is evaluated
    "Wishart": "takes the value of a latent",  # it warns by the value of its degrees of freedom
    "SineBivariateVonMises": "takes the value of a latent",  # the number of terms of its series
    "SineSkewed": "takes the value of a latent",  # it scales down skewness that is too large, with a warning
}


@pytest.mark.parametrize("name", ROWS)
def test_distribution_is_recorded(name):
    row = ROWS[name]
    points = row.unconstrained()
    sizes = [point.numel() for point in points]

    def log_joint(t, y):
        parts = zip(t.split(sizes), points, strict=True)
        return row.log_joint(*[part.reshape(point.shape) for part, point in parts]) - (y**2).sum()

    arguments = torch.cat([point.reshape(-1) for point in points]), torch.zeros(1, 1)
    with pyro.validation_enabled(False):
        if name in NOT_RECORDED:
            with pytest.raises(RecordingError, match=NOT_RECORDED[name]):
                record(log_joint, *arguments)
        else:
            assert len(record(log_joint, *arguments)) > 0


def selected(t, y):
    return y[y > 0].sum()


def written_slice_of_a_copy(t, y):
    out = X[0].clone()
    out[2:] = t[:2]
    return (out**2).sum()


@pytest.mark.parametrize("function", [selected, written_slice_of_a_copy])
def test_what_the_page_of_limits_says_is_refused(function):
    with pytest.raises(RecordingError, match="fails near the point where it is recorded"):
        record(lambda t, y: function(t, y) + t.sum() + y.sum(), T, Y)


def test_a_branch_on_a_latent_is_refused():
    def log_joint(t, y):
        return (t.sum() if t[0] > 0 else (t**2).sum()) + y.sum()

    with pytest.raises(RecordingError, match="to branch on it"):
        record(log_joint, T, Y)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_branch_that_only_looks_like_validation_is_refused(sign):
    """Planted: a question about all elements, answered yes, that no distribution asks."""

    def log_joint(t, y):
        return (t.sum() if bool((sign * t > -5).all()) else (t**2).sum()) + y.sum()

    with pytest.raises(RecordingError, match="to branch on it"):
        record(log_joint, T, Y)


def test_where_a_distribution_would_raise_a_recording_is_nan():
    def log_joint(t, y):
        return dist.HalfNormal(1.0, validate_args=True).log_prob(t).sum() - (y**2).sum()

    t = T.abs()
    recording = record(log_joint, t, Y)
    assert recording(t, Y).item() == pytest.approx(log_joint(t, Y).item())
    outside = t.index_fill(0, torch.tensor(1), -0.1).requires_grad_()
    with pytest.raises(ValueError, match="within the support"):
        log_joint(outside, Y)
    value = recording(outside, Y)
    (gradient,) = torch.autograd.grad(value, outside)
    assert value.isnan()
    assert gradient.isnan().any()


def test_what_is_written_to_twice_is_what_it_was_at_each_time():
    """Planted aliases: a view that sees a later write, and a copy that does not."""

    def log_joint(t, y):
        a = 2 * t
        view, copy = a[1:], a.clone()
        a += 1
        return (a * copy).sum() * view.sum() + y.sum()

    recording = record(log_joint, T, Y)
    assert recording(2 * T, Y).item() == pytest.approx(log_joint(2 * T, Y).item(), rel=1e-12)


def test_data_that_is_written_to_is_not_spoiled():
    data = torch.ones(4, dtype=torch.float64)

    def log_joint(t, y):
        return (data.clone().mul_(t) ** 2).sum() + y.sum()

    record(log_joint, T, Y)
    assert (data == 1).all()


class Regression(PyroModule):
    """A module with a prior of a vector, made once."""

    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(torch.zeros(4, dtype=torch.float64), 1.0).to_event(1))
        self.net = nn.Linear(4, 1).double()

    def forward(self, z):
        mean = X @ self.weight + self.net(X).squeeze(-1)
        with pyro.plate("rows", len(z)):
            pyro.sample("z", dist.Normal(mean, 1.0), obs=z)


def masked_model(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0, validate_args=True))
    with pyro.plate("rows", len(z)), poutine.mask(mask=z > 0):
        pyro.sample("z", dist.Normal(mu, 1.0), obs=z)


@pytest.mark.parametrize("model", [Regression(), masked_model], ids=["PyroModule", "mask"])
def test_model_is_recorded(model):
    """Without Pyro's own look at values, which fits do without; the priors' validation stays."""
    log_joint = LogJoint(model, X[:, 0])
    with pyro.validation_enabled(False):
        recording = record(lambda t, y: log_joint(t) - (y**2).sum(), torch.zeros(log_joint.size), torch.zeros(1, 1))
    at = torch.full((log_joint.size,), 0.3)
    assert recording(at, torch.zeros(1, 1)).item() == pytest.approx(log_joint(at).item(), rel=1e-12)
