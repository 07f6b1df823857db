"""A part of the report that compares no times of variants in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Note(NamedTuple):
    """Something that is measured once."""

    title: str
    measure: Callable[[], dict[str, Any]]
    """Its record."""
    lines: Callable[[dict[str, Any]], list[str]]
    """The record as Markdown."""
