r"""Observed information: the negative Hessian of a log joint density, every argument independent of the others.

.. math:: I(v) = -\nabla^2_v \log p(v, z), \qquad v = (v_1, \dots, v_m) \text{ flattened and concatenated.}
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from laplace_amort.errors import InformationError, NotPositiveDefiniteError
from laplace_amort.graph import ancestors_of, edges_above

__all__ = ["observed_information", "subsample_information"]

LogDensity = Callable[..., Tensor]

# Every function that the decorator returns shares the code of its wrapper.
_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__

_CURE = (
    "Replace that operation by one that torch can differentiate three times "
    "(not rsample of Gamma, Beta or Dirichlet, torch.cdist, or torch.igamma in its first argument)."
)


def observed_information(log_joint: LogDensity, *values: Tensor) -> Tensor:
    r"""Return the negative Hessian of a scalar function with respect to all its arguments together.

    Each argument counts as independent, even if one was computed from another: the function is called with copies, so
    the Hessian never sees :math:`\partial\hat y/\partial\hat\theta`, while derivatives *of the result* flow back into
    every value, and from there to whatever it was computed from. Pass the curvature output of
    :func:`~laplace_amort.dual_path.dual_path` for :math:`\theta`, so that :func:`~laplace_amort.dual_path.check_paths`
    and the gains apply.

    It is dense: ``D`` reverse passes, batched, and ``(D, D)`` numbers. Do not use it for many thousands of units.

    :param log_joint: a function of ``len(values)`` tensors that returns a scalar tensor.
    :param Tensor values: floating-point tensors of any shapes, ``D`` elements in all; on one device, of one dtype.
    :return: symmetric matrix of shape ``(D, D)``, differentiable to any order where gradients are enabled (that is
        third order and more in ``log_joint``), and without a graph under ``no_grad``.
    :raises InformationError: if the result is not a scalar, an argument does not matter, anything is NaN or infinite,
        an operation lacks a second derivative, or under inference mode or the JIT; the message names the argument.
    :raises TypeError: if a value is not a real floating-point tensor, or there are none.

    Example: a normal density has its precision as information, wherever it is taken::

        >>> import torch
        >>> log_joint = lambda mu, y: -2 * (y - mu) ** 2 - mu ** 2 / 2
        >>> observed_information(log_joint, torch.tensor(1.), torch.tensor(3.)).detach()
        tensor([[ 5., -4.],
                [-4.,  4.]])

    References:

    [1] Efron & Hinkley (1978), *Assessing the accuracy of the maximum likelihood estimator: observed versus expected
    Fisher information*, Biometrika 65(3), eq. 1.1.
    """
    names = _argument_names(log_joint, values)
    _check_values(names, values)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Copies make the arguments independent of each other, and leave the caller's graph alone.
        copies = [value.clone() if value.requires_grad else value.clone().requires_grad_() for value in values]
        result = log_joint(*copies)
        _check_scalar(result)
        _refuse_once_differentiable(result, copies, names)
        gradients = _gradients(result, copies, names)
        hessian = _hessian(gradients, copies, names)
        information = (hessian + hessian.mT) / -2
    return information if create_graph else information.detach()


def subsample_information(information: Tensor, scale: Tensor) -> Tensor:
    r"""Return the precision that a subsampled plate calls for, from the information of the scaled log joint.

    Pyro multiplies the terms of :math:`B` out of :math:`N` units by :math:`w = N/B`, so the Hessian of the *scaled* log
    joint gives blocks :math:`G, wC, wU`. The marginal precision of the globals, :math:`S = G - wC^\top U^{-1} C`, comes
    out right from them, and so does the regression :math:`W = U^{-1} C`; the conditional precision of a unit does not:
    it is :math:`U`, not :math:`wU`. The result is the precision with :math:`S`, :math:`W` and the unscaled :math:`U`,

    .. math:: \begin{pmatrix} S + C^\top U^{-1} C & C^\top \\ C & U \end{pmatrix}.

    Without subsampling (all scales 1) the information is returned as it is.

    :param Tensor information: ``(D, D)``, of the log joint as Pyro scales it.
    :param Tensor scale: ``(D,)``, the subsampling factor :math:`w` of every coordinate, 1 for globals.
    :return: ``(D, D)``, symmetric.
    :raises ValueError: if the shapes disagree, or more than one factor other than 1 occurs (nested subsampling).
    :raises NotPositiveDefiniteError: if the block of the units cannot be solved with.

    Example: one global, one of two units drawn::

        >>> import torch
        >>> scaled = torch.tensor([[5., 2.], [2., 4.]])              # G = 5, w C = 2, w U = 4, w = 2
        >>> subsample_information(scaled, torch.tensor([1., 2.]))    # C = 1, U = 2, S = 5 - 2 * 2 / 4 = 4
        tensor([[4.5000, 1.0000],
                [1.0000, 2.0000]])
    """
    if information.dim() != 2 or information.shape != scale.shape * 2:
        raise ValueError(
            f"information has shape {tuple(information.shape)} and scale {tuple(scale.shape)}; expected (D, D) and (D,)"
        )
    local = scale != 1
    factors = scale[local].unique()
    if factors.numel() == 0:
        return information
    if factors.numel() > 1:
        raise ValueError(
            f"coordinates are subsampled by different factors {factors.tolist()}: nested or several subsampled plates "
            "have no common weight. Subsample one plate, or pass the whole of the others."
        )
    inside, outside = local.nonzero().squeeze(-1), (~local).nonzero().squeeze(-1)
    scaled_tail = information[inside][:, inside]
    scaled_border = information[inside][:, outside]
    chol, info = torch.linalg.cholesky_ex(scaled_tail)
    if info.any():
        raise NotPositiveDefiniteError(
            f"the information of the {inside.numel()} subsampled coordinates is not positive definite (leading minor "
            f"{int(info)}): is the mode of the units the maximum at these globals? Compute it for this minibatch."
        )
    explained = scaled_border.mT @ torch.cholesky_solve(scaled_border, chol)
    weight = factors[0].to(information.dtype)
    precision = information.index_put((inside[:, None], inside), scaled_tail / weight)
    precision = precision.index_put((inside[:, None], outside), scaled_border / weight)
    precision = precision.index_put((outside[:, None], inside), scaled_border.mT / weight)
    head = information[outside][:, outside] - explained * (1 - 1 / weight)
    return precision.index_put((outside[:, None], outside), head)


def _gradients(result: Tensor, values: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    gradients = _differentiate(result, values, names, "first")
    for name, value, gradient in zip(names, values, gradients, strict=True):
        if gradient is None and value.numel():
            raise InformationError(
                f"log_joint does not depend on {name} (shape {tuple(value.shape)}), so its information is zero. Drop "
                "the argument, or use it inside log_joint (a closure over the outer variable is not seen)."
            )
    filled = [torch.zeros_like(v) if g is None else g for v, g in zip(values, gradients, strict=True)]
    # Look at the value only once the gradients are there: a NaN is easier to place by its argument.
    for name, gradient in zip(names, filled, strict=True):
        _check_finite(gradient, f"the gradient of log_joint with respect to {name}")
    _check_finite(result, "log_joint")
    return filled


def _hessian(gradients: Sequence[Tensor], values: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    size = flat.numel()
    if not (flat.requires_grad and size):  # log_joint is linear in everything, or there is nothing
        return flat.new_zeros(size, size)
    basis = torch.eye(size, dtype=flat.dtype, device=flat.device)
    rows = _differentiate(flat, values, names, "second", basis)
    columns = [
        basis.new_zeros(size, value.numel()) if row is None else row.reshape(size, value.numel())
        for row, value in zip(rows, values, strict=True)
    ]
    for name, column in zip(names, columns, strict=True):
        _check_finite(column, f"the second derivative of log_joint with respect to {name}")
    return torch.cat(columns, dim=1)


def _refuse_once_differentiable(result: Tensor, values: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse a Function whose backward is marked as differentiable once, on the way from an argument to the result.

    Torch itself does not complain: the error node that it leaves in the graph of the gradient leads on to no argument,
    so a second backward towards the arguments passes it by, and the Hessian would be short of a term.
    """
    edges = ancestors_of(result)
    marked = [edge for edge in edges if _is_marked(getattr(getattr(edge[0], "_forward_cls", None), "backward", None))]
    above = {getattr(node, "variable", node) for node, _ in edges_above(marked)} if marked else set()
    for name, value in zip(names, values, strict=True):
        if (value if value.is_leaf else value.grad_fn) in above:
            raise InformationError(
                f"the second derivative of log_joint with respect to {name} does not exist in torch: an operation in "
                f"log_joint is marked as differentiable once only.\n{_CURE}"
            )


def _is_marked(backward: object) -> bool:
    return getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE


def _differentiate(
    output: Tensor, values: Sequence[Tensor], names: Sequence[str], order: str, basis: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """One (batched) reverse pass; on failure, find the argument to blame by trying each alone."""

    def attempt(wanted: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            output,
            wanted,
            grad_outputs=basis,
            is_grads_batched=basis is not None,
            create_graph=True,
            allow_unused=True,
        )

    try:
        return attempt(values)
    except RuntimeError as error:
        for name, value in zip(names, values, strict=True):
            try:
                attempt([value])
            except RuntimeError as blamed:  # noqa: PERF203 (on the way to an error, speed is no concern)
                raise InformationError(
                    f"the {order} derivative of log_joint with respect to {name} does not exist in torch: {blamed}\n"
                    f"{_CURE}"
                ) from blamed
        raise InformationError(f"the {order} derivative of log_joint failed: {error}") from error


def _check_values(names: Sequence[str], values: Sequence[Tensor]) -> None:
    if not values:
        raise TypeError("observed_information needs at least one value: observed_information(log_joint, theta, y)")
    if torch.is_inference_mode_enabled():
        raise InformationError(
            "observed_information needs autograd, which inference_mode switches off for good. Use no_grad instead:\n"
            "    with torch.no_grad(): ..."
        )
    if torch.jit.is_tracing():
        raise InformationError(
            "torch.jit.trace cannot hold a Hessian, so JitTrace_ELBO cannot run this guide. Use Trace_ELBO() instead"
        )
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a real floating-point tensor, got {kind}")
        if value.is_inference():
            raise InformationError(
                f"{name} was made under inference_mode and cannot be differentiated; make it under no_grad instead"
            )
        if value.dtype != values[0].dtype or value.device != values[0].device:
            raise TypeError(
                f"{name} is {value.dtype} on {value.device}, but {names[0]} is {values[0].dtype} on "
                f"{values[0].device}; convert one of them: value.to(other)"
            )
        _check_finite(value, name)


def _check_scalar(result: object) -> None:
    if not isinstance(result, Tensor):
        raise InformationError(f"log_joint returned {type(result).__name__}, not a tensor")
    if result.dim() != 0:
        raise InformationError(
            f"log_joint returned a tensor of shape {tuple(result.shape)}, not a scalar. Sum it:\n"
            "    lambda *values: log_joint(*values).sum()"
        )
    if not result.requires_grad:
        raise InformationError(
            "the result of log_joint is not connected to any argument: it depends on none of them, or was detached, "
            "or was computed under no_grad"
        )


def _check_finite(tensor: Tensor, what: str) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        index = tuple(int(i) for i in (~finite).nonzero()[0])
        where = f" at index {index}" if index else ""
        raise InformationError(
            f"{what} is {tensor[index].item()}{where} (shape {tuple(tensor.shape)}). Is a value outside its support, "
            "or a square root, norm or cube root taken at zero?"
        )


def _argument_names(log_joint: LogDensity, values: Sequence[object]) -> list[str]:
    """Names as the user wrote them in the signature, else positions."""
    try:
        bound = inspect.signature(log_joint).bind(*values)
    except (TypeError, ValueError):  # builtins without a signature; a wrong count is the call's own error
        return [f"argument {i}" for i in range(len(values))]
    names: list[str] = []
    for name, value in bound.arguments.items():
        starred = bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"argument {len(names) + i}" for i in range(len(value))] if starred else [f"argument '{name}'"]
    return names
