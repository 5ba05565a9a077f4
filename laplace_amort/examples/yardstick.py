"""Posteriors of an example beside a long run of NUTS: numbers, and what they mean in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate
from torch import Tensor

from laplace_amort.examples import datasets
from laplace_amort.examples.catalogue import EXAMPLES, Example

__all__ = ["Moments", "Yardstick"]

Moments = Mapping[str, tuple[Tensor, Tensor]]  # mean and standard deviation of each site, in constrained space

_POOR = 0.25  # posterior sds of the mean, and change of the log sd, past which a posterior is not to be relied on
_NAMED = 8  # numbers that are not to be relied on


@dataclass(frozen=True)
class Yardstick:
    """The reference posterior of one example.

    :param Example example: what its numbers mean.
    :param datasets.Reference reference: what NUTS found.
    """

    example: Example
    reference: datasets.Reference

    @classmethod
    def of(cls, name: str) -> Yardstick:
        """Return that of an example.

        :param str name: one of ``EXAMPLES``.
        :raises ValueError: if there is no such example.
        """
        if name not in EXAMPLES:
            raise ValueError(f"there is no demo '{name}'; the names are: {', '.join(EXAMPLES)}")
        return cls(EXAMPLES[name], datasets.reference(name))

    @property
    def title(self) -> str:
        """The line above everything."""
        return f"{self.reference.name}: {self.example.title}"

    def numbers(self, role: str) -> Iterator[tuple[str, str, int]]:
        """Yield label, site and flat index of every number that is "global", or "local"."""
        for name, summary in self.reference.variables.items():
            if summary.role == role:
                words = self.example.labels.get(name, ("",) * summary.mean.numel())
                for index, word in enumerate(words):
                    yield f"{name}[{index}] {word}".strip() if summary.mean.dim() else name, name, index

    def errors(self, moments: Moments, name: str) -> tuple[Tensor, Tensor]:
        """Return error of the mean in posterior sds, and ratio of sds, for the flattened elements of a site."""
        summary, (mean, sd) = self.reference.variables[name], moments[name]
        return ((mean - summary.mean) / summary.sd).flatten(), (sd / summary.sd).flatten()

    def report(
        self, posteriors: Mapping[str, Moments], evidence: Sequence[Mapping[str, str]], words: Iterable[Sequence[str]]
    ) -> str:
        """Show posteriors beside the reference: two tables, and a paragraph on each.

        :param posteriors: by label.
        :param evidence: rows of the table of their log evidences, by header.
        :param words: lines of each paragraph.
        """
        evidences = tabulate(evidence, "keys", stralign="right", colalign=("left",), disable_numparse=True)
        said = (
            f"Reference log evidence {self.reference.log_evidence:.3f} ± "
            f"{self.reference.log_evidence_standard_error:.3f}; what an ELBO lacks of it is the guide's KL divergence."
        )
        return "\n\n".join([self.title, self.table(posteriors), f"{evidences}\n{said}", *map("\n  ".join, words)])

    def table(self, posteriors: Mapping[str, Moments]) -> str:
        """Return a table of the globals: the reference, and below it each posterior with its errors.

        :param posteriors: by label.
        """
        rows = []
        for label, name, index in self.numbers("global"):
            summary = self.reference.variables[name]
            mean, sd = _at((summary.mean, summary.sd), index)
            rows.append([label, "NUTS", f"{mean:.4f}", f"{sd:.4f}"])
            for posterior, moments in posteriors.items():
                (mean, sd), (error, ratio) = _at(moments[name], index), _at(self.errors(moments, name), index)
                rows.append(["", posterior, f"{mean:.4f}", f"{sd:.4f}", f"{error:+.3f}", f"{ratio:.3f}"])
        headers = ["global", "posterior", "mean", "sd", "error / sd", "sd ratio"]
        return tabulate(rows, headers, stralign="right", colalign=("left", "left"), disable_numparse=True)

    def verdict(self, moments: Moments) -> list[str]:
        """Say in words, from the numbers alone, what to believe of a posterior."""
        lines = []
        for role, what in (("global", "global"), ("local", self.example.unit)):
            rows = [(label, *_at(self.errors(moments, name), index)) for label, name, index in self.numbers(role)]
            shifted, scaled = max(rows, key=lambda row: abs(row[1])), max(rows, key=lambda row: abs(math.log(row[2])))
            lines.append(
                f"Largest errors of a {what}: mean of {shifted[0]}, {shifted[1]:+.2f} posterior sds; "
                f"sd of {scaled[0]}, {_percent(scaled[2])}."
            )
            poor = [label for label, error, ratio in rows if abs(error) > _POOR or abs(math.log(ratio)) > _POOR]
            if poor:
                lines.append(f"Do not rely on this posterior for {_listed(poor)}.")
        return lines


def _at(values: tuple[Tensor, Tensor], index: int) -> tuple[float, float]:
    first, second = (float(value.flatten()[index]) for value in values)
    return first, second


def _percent(ratio: float) -> str:
    return f"{100 * abs(ratio - 1):.0f} % too {'wide' if ratio > 1 else 'narrow'}"


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
