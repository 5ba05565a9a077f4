"""Are the globals identified? The direction in which the information of the globals says least, and that in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from laplace_amort.types import Vector

__all__ = ["EXACT", "describe_flattest", "flattest", "is_flat"]

EXACT = 1e-10
"""Share of the curvature of each global by itself below which that of second derivatives is rounding error."""

# Of single precision, and of dimensions whose rounding errors add up: times the rounding error.
_ROUNDING = 64
# Globals that a sentence names, and the share of the largest part of a direction that counts as none.
_NAMED, _NO_PART = 6, 0.01
# Share of curvature upwards that no rounding error makes, nor differences of gradients.
_UPWARDS = 1e-5


def flattest(information: Vector) -> tuple[float, Vector]:
    """Return the direction in which an objective curves least downwards, with each global in a scale of its own.

    :param Vector information: the negative second derivative, ``(d, d)``, with ``d`` at least 1.
    :return: its curvature, as a share of what each global has by itself: 1 where they are independent, 0 where it is
        flat, negative where the objective curves upwards; and the direction ``(d,)``, its largest part 1 in size.

    Example: only the sum of two globals is known::

        >>> share, direction = flattest(numpy.array([[1.0, 1.0], [1.0, 1.0]]))
        >>> abs(share) < 1e-12, (direction / direction[0]).round(3).tolist()
        (True, [1.0, -1.0])
    """
    scale = numpy.abs(numpy.diag(information)).clip(min=numpy.finfo(float).tiny) ** -0.5
    shares, vectors = numpy.linalg.eigh(scale[:, None] * information * scale)
    direction = scale * vectors[:, 0]
    return float(shares[0]), direction / numpy.abs(direction).max()


def is_flat(information: Vector, rounding: float, least: float = EXACT) -> bool:
    """Whether a direction has no more curvature, up or down, than rounding errors leave by chance.

    Do not use it to see how well globals are identified: a share above ``least`` may still be tiny.

    :param Vector information: ``(d, d)``.
    :param float rounding: relative rounding error of the arithmetic.
    :param float least: share of curvature that counts as some.

    Example::

        >>> weak = numpy.array([[1.0, 1.0], [1.0, 1.0 + 1e-7]])   # a prior a thousand times wider than the data
        >>> is_flat(weak, 2e-16), is_flat(numpy.ones((2, 2)), 2e-16)
        (False, True)
    """
    if not len(information):
        return False
    return abs(flattest(information)[0]) < max(least, _ROUNDING * len(information) * rounding)


def describe_flattest(names: Sequence[str], positive: Sequence[float], information: Vector) -> str:
    """Say which globals cannot be told apart, and what to do about it; of an information that is that of no maximum.

    :param names: of the globals, ``d`` of them, with indices.
    :param positive: of each, whether it is the logarithm of something positive.
    :param Vector information: ``(d, d)``.
    """
    share, direction = flattest(information)
    size = numpy.abs(direction).round(6)  # so that rounding errors order nothing
    order = [int(i) for i in numpy.argsort(-size, kind="stable") if size[i] >= _NO_PART]
    direction = direction * numpy.sign(direction[order[0]])
    parts = " ".join(f"{direction[i]:+.2g} {names[i]}" for i in order[:_NAMED])
    parts += f" and {len(order) - _NAMED} more" if len(order) > _NAMED else ""
    first = names[order[0]]
    proper = "dist.HalfNormal(10.)" if positive[order[0]] else "dist.Normal(0., 10.)"
    prior = f"    pyro.sample('{first.split('[')[0]}', {proper})   # or any other proper prior"
    if share < -_UPWARDS:
        return (
            f"flattest is the direction {parts}, in unconstrained space: the objective curves upwards there, by "
            f"{-share:.2g} of the curvature that each global has by itself, and has no maximum. Leave {first} out, or "
            f"give it a prior that holds it:\n{prior}"
        )
    if len(order) == 1:
        return (
            f"flattest is the direction {parts}, in unconstrained space: neither data nor priors say anything of "
            f"{first}. Leave it out, or give it a proper prior:\n{prior}"
        )
    curvature = f"{share:.2g}" if abs(share) >= EXACT else f"under {EXACT:g}"  # of which the digits are rounding errors
    sums = (
        "\nOf an intercept and the effects of all levels of a factor, let the effects sum to zero:\n"
        "    effects = torch.cat([free, -free.sum(-1, keepdim=True)], -1)   # free has one fewer than there are levels"
    )
    return (
        f"flattest is the direction {parts}, in unconstrained space: neither data nor priors tell one place along it "
        f"from another (its curvature is {curvature} of what each global has by itself), so the standard errors of "
        f"these globals mean nothing. Leave one of them out, or give one a proper prior:\n{prior}"
        + (sums if any("[" in names[i] for i in order) else "")
    )
