"""Conditionals that are found once, and guesses of modes from those that are known."""

import pickle

import pytest
import torch
from helpers.models import normals

from laplace_amort.posterior import known as module
from laplace_amort.posterior.known import KnownConditionals, distinct_rows
from laplace_amort.units import Conditionals

N, K = 4, 2


class Searched:
    """Modes that are quadratic in the globals; counts what it is asked for."""

    def __init__(self, lost=()):
        self.asked, self.lost = [], lost

    def __call__(self, globals_):
        self.asked.append(len(globals_))
        mode = self.modes(globals_)
        found = torch.ones(len(globals_), N, dtype=torch.bool)
        for row in self.lost:
            mode[row], found[row] = 1e6, False
        return Conditionals(mode, torch.eye(K).expand(len(globals_), N, K, K), found)

    @staticmethod
    def modes(globals_):
        linear = globals_ @ normals(globals_.shape[1], N * K, seed=1)
        return (1 + linear + (globals_**2) @ normals(globals_.shape[1], N * K, seed=2)).reshape(-1, N, K)


def test_each_of_the_globals_is_searched_at_once():
    known, search, globals_ = KnownConditionals(), Searched(), normals(6, 3)
    first = known.at(globals_, search)
    assert torch.equal(first.mode, search.modes(globals_))
    mixed = globals_[[2, 2, 5]]
    assert torch.equal(known.at(mixed, search).mode, search.modes(mixed))
    more = torch.cat([globals_[:1], normals(2, 3, seed=9), globals_[:1]])
    there = known.at(more, search)
    torch.testing.assert_close(there.mode, search.modes(more))
    assert there.scale_tril.shape == (4, N, K, K)
    assert search.asked == [6, 2]


def test_the_same_new_globals_are_searched_once():
    known, search = KnownConditionals(), Searched()
    assert known.at(torch.ones(5, 3), search).mode.shape == (5, N, K)
    assert search.asked == [1]


def test_nothing_is_kept_beyond_the_memory(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 6 * (N * K + N * K * K + N))
    known, search, globals_ = KnownConditionals(), Searched(), normals(9, 3)
    known.at(globals_[:6], search)
    for _ in range(2):
        torch.testing.assert_close(known.at(globals_[3:], search).mode, search.modes(globals_[3:]))
        torch.testing.assert_close(known.at(globals_[6:], search).mode, search.modes(globals_[6:]))
    known.at(globals_[:6], search)
    assert search.asked == [6, 3, 6, 3, 3, 6, 3]


def test_no_globals():
    known, search = KnownConditionals(), Searched()
    assert known.at(torch.zeros(3, 0), search).mode.shape == (3, N, K)
    assert known.predicted(torch.zeros(3, 0), torch.zeros(3, N, K)).shape == (3, N, K)


def test_a_copy_learns_by_itself():
    known, search = KnownConditionals(), Searched()
    known.at(normals(2, 3), search)
    other = known.copy()
    other.at(normals(4, 3, seed=1), search)
    other.at(normals(2, 3), search)
    assert search.asked == [2, 4]
    known.at(normals(4, 3, seed=1), search)
    assert search.asked == [2, 4, 4]


def test_it_is_stored_empty():
    known, search = KnownConditionals(), Searched()
    known.at(normals(20, 1), search)
    again = pickle.loads(pickle.dumps(known))
    again.at(normals(20, 1), search)
    assert search.asked == [20, 20]


@pytest.mark.parametrize("lost", [(), (0, 3)])
def test_modes_are_guessed_by_a_regression(lost):
    known, search = KnownConditionals(), Searched(lost)
    globals_ = 3 + 0.1 * normals(40, 3)
    known.at(globals_, search)
    inside = globals_[10:20].mean(0, keepdim=True)
    nothing = torch.full((1, N, K), torch.nan)
    torch.testing.assert_close(known.predicted(inside, nothing), search.modes(inside), rtol=1e-8, atol=1e-8)


def test_no_guess_from_few_nor_outside():
    known, search, otherwise = KnownConditionals(), Searched(), normals(2, N, K)
    assert known.predicted(torch.zeros(2, 3), otherwise) is otherwise
    known.at(normals(20, 3), search)  # seven coefficients
    assert known.predicted(torch.zeros(2, 3), otherwise) is otherwise
    known.at(normals(20, 3, seed=5), search)
    guess = known.predicted(torch.tensor([[0.0, 0.0, 0.0], [0.0, 50.0, 0.0]]), otherwise)
    assert torch.equal(guess[1], otherwise[1])
    assert not torch.equal(guess[0], otherwise[0])


@pytest.mark.parametrize("found", [0, 20])
def test_no_guess_from_lost_modes(found):
    """Of forty places, few or none have all of their modes; there are seven coefficients."""
    known, otherwise = KnownConditionals(), normals(2, N, K)
    known.at(normals(40, 3), Searched(lost=range(found, 40)))
    assert known.predicted(torch.zeros(2, 3), otherwise) is otherwise


def test_distinct_rows():
    rows = torch.tensor([[1.0, 2.0], [0.0, 5.0], [1.0, 2.0]])
    distinct, which = distinct_rows(rows)
    assert torch.equal(distinct[which], rows)
    assert len(distinct) == 2
    distinct, which = distinct_rows(torch.zeros(3, 0))
    assert distinct.shape == (1, 0)
    assert which.tolist() == [0, 0, 0]
