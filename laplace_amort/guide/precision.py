"""The numbers that a fit moves: those of the guide itself, or twins of them in double precision."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laplace_amort.autodiff import Arithmetic, InDouble, narrowed
from laplace_amort.errors import PrecisionError
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.family import Family, gaussian_of
from laplace_amort.guide.gaussian import LaplaceGaussian
from laplace_amort.guide.heads import Head
from laplace_amort.guide.storing import apart_from_store
from laplace_amort.guide.warm_start import WarmStart
from laplace_amort.model import UnitModel
from laplace_amort.units import FreeMode, Mode, NewtonMode

__all__ = ["Numbers", "OwnNumbers", "numbers_of"]


class MovableFamily(Family, Protocol):
    """A family with parameters."""

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters, those of its strategies too."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Return them with their names."""

    def gaussian_of(
        self, unit_model: UnitModel, *, mode: Mode | None = None, head: Head | None = None
    ) -> LaplaceGaussian:
        """Return the Gaussian where it stands."""


class Numbers(Protocol):
    """What moves in a fit, and the model that takes it.

    Attributes: ``family``, which makes a Gaussian of where the globals stand; ``model_parameters``, by name; and
    ``reason``, why it is not in double precision, empty if it is.
    """

    family: MovableFamily
    model_parameters: dict[str, Tensor]
    reason: str

    def of(self, model: UnitModel) -> UnitModel:
        """Return a model of the guide's as one of these numbers."""

    def hand_back(self) -> None:
        """Put the guide, and the model's own parameters, where these numbers are."""


class OwnNumbers:
    """The numbers of the guide itself.

    :param AutoLaplaceFamily guide: the guide.
    :param dict model_parameters: of the model itself, by name.
    :param str reason: why there are no others.
    """

    def __init__(self, guide: AutoLaplaceFamily, model_parameters: dict[str, Tensor], reason: str = "") -> None:
        self.family: Any = guide
        self.model_parameters = model_parameters
        self.reason = reason

    def of(self, model: UnitModel) -> UnitModel:
        """Return the model as it is."""
        return model

    def hand_back(self) -> None:
        """Do nothing: the guide is there."""


class DoubleNumbers:
    """Twins of the numbers of a guide in double precision: the guide moves when it is told to.

    :param AutoLaplaceFamily guide: in a lower precision.
    :param dict model_parameters: of the model itself, by name.
    """

    reason = ""

    def __init__(self, guide: AutoLaplaceFamily, model_parameters: dict[str, Tensor]) -> None:
        guide.follow_store()
        self.guide = guide
        self.model_parameters: dict[str, Tensor] = {name: _twin(leaf) for name, leaf in model_parameters.items()}
        self._pairs = [(leaf, self.model_parameters[name]) for name, leaf in model_parameters.items()]
        self.arithmetic = InDouble(self._pairs)
        self.family: Any = DoubleFamily(guide, self.arithmetic)
        twins = dict(self.family.named_parameters())
        self._pairs += [(leaf, twins[_name_of(name)]) for name, leaf in guide.named_parameters()]

    def of(self, model: UnitModel) -> UnitModel:
        """Return the model as it is in double precision."""
        return model.under(self.arithmetic)

    @torch.no_grad()
    def hand_back(self) -> None:
        """Round to the precision of the guide, and of the model's own parameters."""
        for leaf, twin in self._pairs:
            leaf.copy_(twin)
        self.guide._warm_start.restore(self.family._warm_start.state())


class DoubleFamily(nn.Module):
    """The family of a guide in double precision, apart from Pyro's store.

    :param AutoLaplaceFamily guide: after its first call.
    :param arithmetic: in which functions of the user's are called.
    """

    def __init__(self, guide: AutoLaplaceFamily, arithmetic: Arithmetic) -> None:
        super().__init__()
        loc: Any = guide.loc
        self.loc = _twin(loc)
        mode: Any = _in_double(guide.mode)
        self.mode = mode if isinstance(mode, NewtonMode | FreeMode) else _ModeInDouble(mode, arithmetic)
        self.head_repair, self.tail_repair = _in_double(guide.head_repair), _in_double(guide.tail_repair)
        self.head: Head = _in_double(guide.head)
        self._warm_start: WarmStart = _in_double(guide._warm_start)
        for name, leaf in guide.named_parameters():  # such as a subclass may have
            if _name_of(name) not in dict(self.named_parameters()):
                self.register_parameter(name.replace(".", "_"), _twin(leaf))

    def gaussian_of(
        self, unit_model: UnitModel, *, mode: Mode | None = None, head: Head | None = None
    ) -> LaplaceGaussian:
        """Return the Gaussian there; see :meth:`AutoLaplaceFamily.gaussian_of`."""
        chosen: Any = mode or self.mode
        return gaussian_of(self, unit_model, chosen, head or self.head)


class _ModeInDouble(nn.Module):
    """A mode that calls a function of the user's with the arguments of the model, which have another precision."""

    def __init__(self, mode: Any, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.mode, self.arithmetic = mode, arithmetic

    def prepare(self, start: Tensor) -> _ModeInDouble:
        """Return itself: it is prepared."""
        return self

    def find(self, problem: UnitModel, global_: Tensor, start: Tensor) -> Tensor:
        """Return the modes ``(N, k)`` at globals ``(d,)``."""
        with self.arithmetic:
            found: Tensor = self.mode.find(problem, global_, start)
            return found


def _in_double(strategy: Any) -> Any:
    """A copy of a strategy, with parameters and buffers in double precision, apart from the store."""
    copied = apart_from_store(strategy)
    return copied.double() if isinstance(copied, nn.Module) else copied


def _twin(leaf: Tensor) -> nn.Parameter:
    return nn.Parameter(leaf.detach().double().clone(), requires_grad=leaf.requires_grad)


def _name_of(name: str) -> str:
    """The name in the twin of a parameter of a guide."""
    return "loc" if name == "loc_unconstrained" else name


def numbers_of(guide: AutoLaplaceFamily, model: UnitModel) -> Numbers:
    """Return what a fit of a guide is to move: twins in double precision, unless the guide has that itself.

    :param AutoLaplaceFamily guide: after its first call.
    :param UnitModel model: of the guide, at the data.
    """
    own = model.density.parameters()
    if _stands(guide).dtype == torch.float64:
        return OwnNumbers(guide, own)
    try:
        numbers = DoubleNumbers(guide, own)
        _check(numbers, model)
    except Exception as error:  # whatever a model may raise that is not written for it
        return OwnNumbers(guide, own, str(error).partition("\n")[0] or type(error).__name__)
    return numbers


@torch.no_grad()
def _check(numbers: DoubleNumbers, model: UnitModel) -> None:
    """Run the model in double precision, and see whether it stays in it.

    Values are not compared: densities with a bound on probabilities have another one in another precision.

    :raises PrecisionError: if it loses digits on the way, or has no value where it has one as it is written.
    """
    loc, family = _stands(numbers.guide), numbers.family
    local = numbers.guide._warm_start.at(model.units, loc)
    wide = numbers.of(model)
    found, operation = narrowed(lambda: _total(wide, family.loc, local.double()))
    if operation:
        raise PrecisionError(f"it makes less than double precision of a number ({operation})")
    if not math.isfinite(found) and math.isfinite(_total(model, loc, local)):
        raise PrecisionError(f"its log joint is {found} there, and is not in {loc.dtype}")


def _stands(guide: AutoLaplaceFamily) -> Tensor:
    """Return where the globals of a guide stand, ``(d,)``, without a graph."""
    loc: Any = guide.loc
    return torch.as_tensor(loc).detach()


def _total(model: UnitModel, global_: Tensor, local: Tensor) -> float:
    return sum(float(terms.double().sum()) for _, _, terms in model.terms(global_, local))
