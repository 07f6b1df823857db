"""Which function runs an op: the backends, what each refuses, and the choice between them.

The choice is made on the host when a call starts and is never read inside traced code. `auto` takes the first backend
that does not refuse; a backend asked for by name runs or raises `BackendUnavailable` with its reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

BACKENDS = ("triton", "cuda", "cpp", "reference")
"""In the order in which `auto` tries them."""

# a plain global, for the whole process: torch.compile guards on it, so that a compiled network follows `fd.backend`
_asked = os.environ.get("FASTDIFF_BACKEND") or "auto"


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run this op here, or not with these arguments."""


class Backend(NamedTuple):
    """A way to run an op. `missing()`, and `refuses` of a call's arguments, return a reason, or None."""

    run: Callable[..., Any]
    missing: Callable[[], str | None]
    refuses: Callable[..., str | None]


_table: dict[str, dict[str, Backend]] = {}


def register(
    op: str,
    name: str,
    run: Callable[..., Any],
    *,
    missing: Callable[[], str | None] = lambda: None,
    refuses: Callable[..., str | None] = lambda *_, **__: None,
) -> None:
    """Make `run` the backend `name` of `op`. `refuses` gets the arguments of the call."""
    assert name in BACKENDS, name
    _table.setdefault(op, {})[name] = Backend(run, missing, refuses)


def ops() -> list[str]:
    """The names of all registered ops."""
    return sorted(_table)


def reason(op: str, name: str, *args: Any, **given: Any) -> str | None:
    """Why backend `name` will not run `op` (with these arguments, when given); None when it will."""
    if name not in _table[op]:
        return f"{op} has no {name} kernel yet"
    entry = _table[op][name]
    return entry.missing() or (entry.refuses(*args, **given) if args else None)


def asked() -> str:
    """The backend in force: `fd.backend`, else FASTDIFF_BACKEND as it was at import, else "auto"."""
    if _asked not in ("auto", *BACKENDS):
        raise ValueError(f"FASTDIFF_BACKEND={_asked!r} is no backend; accepted: auto, {', '.join(BACKENDS)}")
    return _asked


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block every op runs on backend `name`, or raises BackendUnavailable with the reason.

    name: "reference", "cpp", "triton", "cuda", or "auto". An op is resolved when its call (or the sampler's) starts.
    It holds for all threads of the process.
    """
    global _asked  # noqa: PLW0603  the one piece of global state
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend {name!r} is unknown; accepted: auto, {', '.join(BACKENDS)}")
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def chosen(op: str, *args: Any, **given: Any) -> str:
    """The name of the backend that will run `op` with these arguments. Raises BackendUnavailable."""
    name = asked()
    if name == "auto":
        return next(n for n in BACKENDS if n in _table[op] and reason(op, n, *args, **given) is None)
    why_not = reason(op, name, *args, **given)
    if why_not is not None:
        raise BackendUnavailable(f"{op} on {name}: {why_not}; use fd.backend('auto') or see `fastdiff doctor`")
    return name


def choose(op: str, *args: Any, **given: Any) -> Callable[..., Any]:
    """The function that will run `op` with these arguments. Raises BackendUnavailable."""
    return _table[op][chosen(op, *args, **given)].run


def why(op: str, *args: Any, **given: Any) -> str:
    """One line a backend: whether it would run `op` (a call with these arguments, where given), or why not.

    The one that `auto` takes is marked.
    """
    if op not in _table:
        raise ValueError(f"op {op!r} is unknown; accepted: {', '.join(ops())}")
    reasons = {name: reason(op, name, *args, **given) for name in BACKENDS}
    first = next(name for name, why_not in reasons.items() if why_not is None)
    return "\n".join(
        f"{name:10s}{why_not or ('runs, taken by auto' if name == first else 'runs')}"
        for name, why_not in reasons.items()
    )
