"""Functions of a module replaced for a while: to time their calls, or to look at what they are given."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Function = Callable[..., Any]


@contextmanager
def replaced(module: str, name: str, make: Callable[[Function], Function]) -> Iterator[None]:
    """Within the block `module.name` is what `make` makes of it. Raises ImportError, AttributeError."""
    owner = importlib.import_module(module)
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)
