"""The cells cover what they promise to cover."""

import itertools

import pytest

from tests.ops import pairwise

FACTORS = {"shape": "abcdefg", "dtype": "xyz", "act": (False, True), "layout": range(5), "one": ("only",)}


@pytest.mark.parametrize("seed", range(5))
def test_every_pair_occurs(seed):
    found = pairwise.cells(FACTORS, seed)
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(cell[a], cell[b]) for cell in found} == set(itertools.product(FACTORS[a], FACTORS[b]))
    # the two widest factors alone need 35 cells, the product has 210
    assert 35 <= len(found) <= 50


def test_a_missing_pair_is_seen():
    found = pairwise.numbers(FACTORS, 0)
    assert not pairwise.uncovered(FACTORS, found)
    lonely = [cell for cell in found if cell["shape"] == 3 and cell["layout"] == 4]
    rest = [cell for cell in found if cell not in lonely]
    assert frozenset((("shape", 3), ("layout", 4))) in pairwise.uncovered(FACTORS, rest)


def test_as_many_as_asked_and_always_the_same():
    found = pairwise.cells(FACTORS, 3, least=120)
    assert len(found) == 120
    assert found == pairwise.cells(FACTORS, 3, least=120)
    assert found != pairwise.cells(FACTORS, 4, least=120)
    assert len({tuple(cell.items()) for cell in found}) == 120


def test_the_product():
    whole = list(pairwise.sampled(FACTORS, 0, 10**9))
    assert sorted(map(str, whole)) == sorted(
        str(dict(zip(FACTORS, values, strict=True))) for values in itertools.product(*FACTORS.values())
    )
    part = list(pairwise.sampled(FACTORS, 0, 50))
    assert len(part) == 50
    assert all(cell in whole for cell in part)
