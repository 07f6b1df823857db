"""Covering arrays: few combinations of factors in which every pair of values of two factors still occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Cell = dict[str, Any]
Factors = Mapping[str, Sequence[Any]]
_Place = tuple[str, int]  # a factor and the number of one of its values


def _pairs(cell: Mapping[str, int]) -> Iterator[frozenset[_Place]]:
    return map(frozenset, itertools.combinations(cell.items(), 2))


def uncovered(factors: Factors, chosen: Sequence[Mapping[str, int]]) -> set[frozenset[_Place]]:
    """The pairs of values that occur in none of the cells, given as numbers of values."""
    wanted = {
        frozenset(((a, i), (b, j)))
        for a, b in itertools.combinations(factors, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    return wanted.difference(*map(_pairs, chosen)) if chosen else wanted


def _filled(factors: Factors, start: frozenset[_Place], left: set[frozenset[_Place]], rng: random.Random) -> Any:
    """A cell around one uncovered pair; every further factor takes the value that covers most."""
    cell = dict(start)
    others = [name for name in factors if name not in cell]
    rng.shuffle(others)
    for name in others:
        values = rng.sample(range(len(factors[name])), len(factors[name]))
        cell[name] = max(values, key=lambda i: sum(frozenset(((name, i), place)) in left for place in cell.items()))
    return cell


def numbers(factors: Factors, seed: int, least: int = 0) -> list[dict[str, int]]:
    """As `cells`, with the numbers of the values in their place."""
    rng, left, found = random.Random(seed), uncovered(factors, []), []
    while left:
        starts = rng.sample(sorted(left, key=sorted), min(len(left), 4))
        best = max((_filled(factors, start, left, rng) for start in starts), key=lambda c: len(left & set(_pairs(c))))
        found.append({name: best[name] for name in factors})
        left.difference_update(_pairs(best))
    for _ in range(100 * least):
        if len(found) >= least:
            break
        cell = {name: rng.randrange(len(values)) for name, values in factors.items()}
        if cell not in found:
            found.append(cell)
    return found


def cells(factors: Factors, seed: int, least: int = 0) -> list[Cell]:
    """At least `least` cells (while there are so many) that cover all pairs; the same ones for the same seed."""
    return [{name: factors[name][i] for name, i in cell.items()} for cell in numbers(factors, seed, least)]


def sampled(factors: Factors, seed: int, count: int) -> Iterator[Cell]:
    """`count` cells of the full product, or all of it where it is no larger."""
    total = 1
    for values in factors.values():
        total *= len(values)
    for number in sorted(random.Random(seed).sample(range(total), min(count, total))):
        cell, rest = {}, number
        for name, values in factors.items():
            rest, i = divmod(rest, len(values))
            cell[name] = values[i]
        yield cell
