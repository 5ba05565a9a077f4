"""An interrupted computation is taken up where it stood: the same results, the same state, no call made twice."""

import io

import numpy
import pytest
import torch

from laplace_amort.errors import ResumeError
from laplace_amort.fitting.journal import Journal
from laplace_amort.guide.warm_start import WarmStart

STEPS = 6


class Climb:
    """Steps of which each depends on the last result and on a memory that calls change, as those of a fit do."""

    def __init__(self, journal=None, stop=None):
        self.memory = WarmStart(torch.zeros(2, 1), global_dim=1)
        self.journal = self.made(*(journal or ()))
        self.stop, self.calls = stop, 0

    def made(self, entries=None, state=None):
        return Journal(entries, state, self.memory.state, self.memory.restore)

    def evaluate(self, x):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        start = self.memory.at(torch.arange(2), x)
        mode = start + (x.sin() - start) / 3
        self.memory.remember(torch.arange(2), x, mode, torch.full((2, 1, 1), float(x)))
        return mode.sum()

    def run(self, factor=0.7, steps=STEPS):
        x, path = torch.tensor([0.3]), []
        for _ in range(steps):
            label = f"at {float(x):.17g}"
            path.append(self.journal.call(label, lambda x=x: self.evaluate(x)))
            x = factor * x + path[-1]
        return path


def interrupted(stop, **options):
    climb = Climb(stop=stop, **options)
    with pytest.raises(KeyboardInterrupt):
        climb.run()
    return climb


def assert_same_state(climb, other):
    assert all(map(torch.equal, climb.memory.state(), other.memory.state()))


@pytest.mark.parametrize("stop", range(STEPS + 1))
def test_a_second_run_goes_on_where_the_first_was_interrupted(stop):
    whole = Climb()
    path = whole.run()
    first = interrupted(stop) if stop < STEPS else whole
    second = Climb((first.journal.entries, first.journal.state))
    assert second.journal.replaying is (stop > 0)
    assert second.run() == path
    assert second.calls == STEPS - stop
    assert not second.journal.replaying
    assert second.journal.entries == whole.journal.entries
    assert_same_state(second, whole)


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_state_is_restored_exactly_when_the_last_entry_is_read(stop):
    """Not before, as reading changes nothing, and not later, as the next call depends on it."""
    first = interrupted(stop)
    second = Climb((first.journal.entries, first.journal.state))
    untouched = Climb()
    if stop > 1:
        second.run(steps=stop - 1)
        assert second.journal.replaying
        assert_same_state(second, untouched)
    third = Climb((first.journal.entries, first.journal.state))
    third.run(steps=stop)
    assert_same_state(third, first)
    assert not all(map(torch.equal, third.memory.state(), untouched.memory.state()))


def test_an_interruption_while_reading_loses_nothing():
    first = interrupted(4)
    second = Climb((first.journal.entries, first.journal.state))
    second.run(steps=2)
    third = Climb((second.journal.entries, second.journal.state))
    assert third.run() == Climb().run()
    assert third.calls == STEPS - 4


def test_interrupted_again_and_again():
    kept, calls = None, 0
    for _ in range(STEPS):
        climb = Climb(kept, stop=1)
        try:
            path = climb.run()
        except KeyboardInterrupt:
            path = None
        kept, calls = (climb.journal.entries, climb.journal.state), calls + climb.calls
    assert path == Climb().run()
    assert calls == STEPS


def test_through_a_file():
    first, file = interrupted(3), io.BytesIO()
    torch.save((first.journal.entries, first.journal.state), file)
    file.seek(0)
    assert Climb(torch.load(file)).run() == Climb().run()


def test_without_its_state_the_second_run_would_differ():
    """Planted: what the calls depend on is not brought back."""
    first = interrupted(3)
    second = Climb()
    second.journal = Journal(first.journal.entries)
    assert second.run() != Climb().run()


# ---------------------------------------------------------------------------------------------------- another course


@pytest.mark.parametrize("stop", [2, STEPS - 1])
def test_another_course_is_refused(stop):
    first = interrupted(stop)
    second = Climb((first.journal.entries, first.journal.state))
    with pytest.raises(ResumeError, match=r"it has 'at (.*)' where this one has 'at (.*)'(.|\n)*Start anew"):
        second.run(factor=0.8)
    assert second.calls == 0
    assert second.journal.entries == first.journal.entries


def test_the_message_has_both():
    journal = Journal([("marginal 0 ab", 1.0)])
    with pytest.raises(ResumeError, match="it has 'marginal 0 ab' where this one has 'ELBO 16 ab'"):
        journal.call("ELBO 16 ab", lambda: 2.0)
    assert journal.call("marginal 0 ab", lambda: 2.0) == 1.0


# --------------------------------------------------------------------------------------------------------- one by one


def test_calls_that_fail_are_not_kept():
    taken = []
    journal = Journal(take=lambda: taken.append(1) or len(taken))
    with pytest.raises(ZeroDivisionError):
        journal.call("a", lambda: 1 / 0)
    assert (journal.entries, journal.state, taken) == ([], None, [])
    assert journal.call("a", lambda: 5) == 5
    assert (journal.entries, journal.state) == ([("a", 5)], 1)
    assert not journal.replaying


def test_the_entries_of_the_first_run_stay_as_they_are():
    entries = [("a", 1)]
    journal = Journal(entries)
    assert [journal.call(label, lambda: 2) for label in "ab"] == [1, 2]
    assert entries == [("a", 1)]
    assert journal.entries == [("a", 1), ("b", 2)]


def test_put_is_called_once_with_the_state_that_was_given():
    put = []
    journal = Journal([("a", 1), ("b", 2)], "state", take=lambda: "later", put=put.append)
    seen = []
    for label in "abcd":
        journal.call(label, lambda: 0)
        seen.append((list(put), journal.state))
    assert seen == [([], "state"), (["state"], "state"), (["state"], "later"), (["state"], "later")]


def test_results_of_any_kind_come_back():
    results = [None, numpy.arange(3.0), (torch.ones(2), "problem"), {"value": -numpy.inf}]
    first = Journal()
    for number, result in enumerate(results):
        first.call(str(number), lambda result=result: result)
    second = Journal(first.entries)
    for number, result in enumerate(results):
        assert second.call(str(number), lambda: pytest.fail("computed again")) is result
