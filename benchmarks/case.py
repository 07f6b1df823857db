"""What one line of the report is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.timing import Call, Variants
from fastdiff.ops import dispatch

if TYPE_CHECKING:
    from benchmarks.cpu import Network


class Case(NamedTuple):
    """One comparison: the same work done by `ours` and by rivals, and the check that it is the same work."""

    title: str
    ours: str
    variants: Variants
    check: Callable[[], float | None]
    """Runs it once; returns the largest difference from the reference, None where there is none to compare with; raises
    AssertionError above the bound."""
    bytes_moved: int | None = None
    """Bytes that `ours` must move, for the share of copy bandwidth."""
    unit: str = "us"
    skipped: dict[str, str] | None = None
    """Rivals that are not there, and why."""
    also: tuple[str, ...] = ()
    """Variants that are other kernels of ours, no rivals."""
    make: Callable[[], Case] | None = None
    """Makes the case, where that takes long: called when its turn comes, and not before its title is known."""
    threads: int | None = None
    """Of torch, where they are not all."""
    network: Network | None = None
    """What there is to say of a network beside the times."""
    seconds: float | None = None
    """About how long it may be timed; five rounds at least."""


def later(title: str, ours: str, make: Callable[[], Case], *, threads: int | None = None) -> Case:
    """A case that is made when it is measured."""

    def early() -> float | None:
        raise AssertionError(f"{title} was checked before it was made")

    return Case(title, ours, {ours: early}, early, unit="ms", make=make, threads=threads)


def each(f: Callable[..., object], sets: Sequence[tuple[Any, ...]], **given: Any) -> list[Call]:
    """f on each of several sets of arguments: a variant that goes round its buffers."""
    return [partial(f, *arguments, **given) for arguments in sets]


def together(cases: dict[str, Iterator[Case]]) -> Iterator[Case]:
    """The same cases for several backends, the first with our kernels of the others added. All are checked.

    A backend that refuses one has no more of this op.
    """
    while True:
        found: list[Case] = []
        for backend, iterator in list(cases.items()):
            try:
                found.append(next(iterator))
            except StopIteration:
                return
            except dispatch.BackendUnavailable as error:
                print(f"{backend} is left out from here: {error}", flush=True)
                del cases[backend]
        if not found:
            return
        yield _one(found)


def _one(cases: list[Case]) -> Case:
    first, *others = cases
    assert all(case.title == first.title for case in others), [case.title for case in cases]
    kernels = {case.ours: case.variants[case.ours] for case in others}

    def check() -> float | None:
        return max((worst for case in cases if (worst := case.check()) is not None), default=None)

    return first._replace(variants=first.variants | kernels, check=check, also=(*first.also, *kernels))
