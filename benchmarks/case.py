"""What one line of the report is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.timing import Variants


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
