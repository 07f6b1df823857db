"""Which function runs an op: the backends, what each refuses, and the choice between them.

The choice is made on the host when a call starts and is never read inside traced code. `auto` takes the first backend
that does not refuse; a backend asked for by name runs or raises `BackendUnavailable` with its reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

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
    by_name: str | None = None


_table: dict[str, dict[str, Backend]] = {}


def register(
    op: str,
    name: str,
    run: Callable[..., Any],
    *,
    missing: Callable[[], str | None] = lambda: None,
    refuses: Callable[..., str | None] = lambda *_, **__: None,
    by_name: str | None = None,
) -> None:
    """Make `run` the backend `name` of `op`. `refuses` gets the arguments of the call.

    by_name: why `auto` passes it by, where it does; asked for by name it runs.
    """
    assert name in BACKENDS, name
    _table.setdefault(op, {})[name] = Backend(run, missing, refuses, by_name)


def replace(op: str, name: str, **changes: Callable[..., Any]) -> None:
    """Change fields of a registered backend."""
    _table[op][name] = _table[op][name]._replace(**changes)  # type: ignore[arg-type]


def ops() -> list[str]:
    """The names of all registered ops."""
    return sorted(_table)


def reason(op: str, name: str, *args: Any, **given: Any) -> str | None:
    """Why backend `name` will not run `op` (with these arguments, when given); None when it will."""
    why_not = _missing(op, name)
    return why_not or ((_transformed(name) or _table[op][name].refuses(*args, **given)) if args else None)


def _missing(op: str, name: str) -> str | None:
    if name not in _table[op]:
        return f"{op} has no {name} kernel yet"
    return _table[op][name].missing()


def _transformed(name: str) -> str | None:
    """Kernels have one derivative, the backward one, and no rule for a batch of calls."""
    if name == "reference" or torch.compiler.is_compiling():
        return None
    if transforms():
        return "inside torch.func transforms and forward-mode derivatives only the reference runs"
    return None


def transforms() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative is at work."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


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
        for n in BACKENDS:
            if _automatic(op, n) and reason(op, n, *args, **given) is None:
                return n
        raise AssertionError(f"{op} has no reference")
    why_not = reason(op, name, *args, **given)
    if why_not is not None:
        raise BackendUnavailable(f"{op} on {name}: {why_not}; use fd.backend('auto') or see `fastdiff doctor`")
    return name


def _automatic(op: str, name: str) -> bool:
    return name in _table[op] and _table[op][name].by_name is None


# Looking for a kernel the first time imports it and changes the table. torch.compile keeps what it saw of a table when
# it first looked, so these two are run by it, not traced: the mark of torch.compiler.assume_constant_result, whose own
# import of the compiler takes a second.
for _constant in (_missing, _automatic):
    setattr(_constant, "_dynamo_marked_constant", True)  # noqa: B010


def run(op: str, name: str) -> Callable[..., Any]:
    """The function of backend `name`."""
    return _table[op][name].run


def choose(op: str, *args: Any, **given: Any) -> Callable[..., Any]:
    """The function that will run `op` with these arguments. Raises BackendUnavailable."""
    return run(op, chosen(op, *args, **given))


def why(op: str, *args: Any, **given: Any) -> str:
    """One line a backend: whether it would run `op` (a call with these arguments, where given), or why not.

    The one that `auto` takes is marked.
    """
    if op not in _table:
        raise ValueError(f"op {op!r} is unknown; accepted: {', '.join(ops())}")
    return "\n".join(f"{name:10s}{state(op, name, *args, **given)}" for name in BACKENDS)


def state(op: str, name: str, *args: Any, **given: Any) -> str:
    """What backend `name` would do with `op`: why it will not run, or that it runs, by name only or taken by `auto`."""
    reasons = {n: reason(op, n, *args, **given) for n in BACKENDS if n == name or _automatic(op, n)}
    label = _table[op][name].by_name if name in _table[op] else None
    if (why_not := reasons[name]) is not None:
        return f"{why_not}; {label}" if label else why_not
    if label:
        return f"runs by name only; {label}"
    return "runs, taken by auto" if name == next(n for n in reasons if reasons[n] is None) else "runs"
