"""The ops as PyTorch knows them: `torch.ops.fastdiff.<op>_<backend>`, with fake kernels, autograd and torch.compile.

An op says once what it is (`describe`) and which backends have a kernel for it (`kernel`). The kernels live in
`fastdiff/ops/<op>_<backend>.py` as `run` and `refuses`; they are imported, and registered with torch.library, when
their backend is asked for the first time. A plain eager call goes to `run` itself: the dispatcher costs more than a
small op.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.ops import cuda, dispatch, jit, native

NAMESPACE = "fastdiff"
MISSING = {"cpp": native.missing, "triton": jit.missing, "cuda": cuda.missing}


class Described(NamedTuple):
    """What torch must be told of an op, whichever backend runs it."""

    schema: str
    fake: Callable[..., Any]
    mutates: tuple[str, ...]
    setup: Callable[..., None] | None
    backward: Callable[..., Any] | None
    refuses: Callable[..., str | None] | None


_described: dict[str, Described] = {}
_TENSORS = (Tensor, nn.Parameter)

_waiting: dict[str, list[str]] = {backend: [] for backend in MISSING}  # ops whose kernels are not imported yet
_reasons: dict[str, str | None] = {}


def describe(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    mutates: tuple[str, ...] = (),
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    refuses: Callable[..., str | None] | None = None,
) -> None:
    """Say what `op` is. The schema's arguments are all positional and have no defaults: torch differentiates no
    keyword-only ones, and loses count of defaults beside lists of tensors.

    fake(*args) returns empty results of true shapes, dtypes and strides. setup(ctx, inputs, output) and
    backward(ctx, *grads) are those of torch.library.register_autograd; ctx.backend names the kernels' backend.
    refuses, of a call's arguments: why no kernel of any backend takes it, as for a gradient that none has.
    """
    _described[op] = Described(schema, fake, mutates, setup, backward, refuses)


def _stem(op: str, backend: str) -> str:
    return f"fastdiff.ops.{op.removesuffix('_backward').rstrip('_')}_{backend}"


def kernel(op: str, backend: str, *, by_name: str | None = None) -> None:
    """Declare that fastdiff/ops/<op>_<backend>.py runs `op`; by_name says why `auto` passes it by, where it does."""
    home = _stem(op, backend)
    _waiting[backend].append(op)

    # until missing() has imported the module, and has put its own functions in the place of these
    def run(*args: Any, **given: Any) -> Any:
        return sys.modules[home].run(*args, **given)

    def refuses(*args: Any, **given: Any) -> str | None:
        why: str | None = sys.modules[home].refuses(*args, **given)
        return why

    def missing() -> str | None:
        return _load(backend)

    dispatch.register(op, backend, run, missing=missing, refuses=_refusing(op, refuses), by_name=by_name)


def _load(backend: str) -> str | None:
    """Import and register the kernels of a backend; the reason why they cannot run here, None when they can."""
    if backend not in _reasons:
        _reasons[backend] = MISSING[backend]()
    while _reasons[backend] is None and _waiting[backend]:
        _attach(_waiting[backend].pop(), backend)
    return _reasons[backend]


def _refusing(op: str, own: Callable[..., str | None]) -> Callable[..., str | None]:
    """A backend's own refusals behind those of the op."""
    every = _described[op].refuses
    if every is None:
        return own

    def refuses(*args: Any, **given: Any) -> str | None:
        return every(*args, **given) or own(*args, **given)

    return refuses


def records_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would have to follow one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _nothing() -> None:
    """What a loaded backend misses."""


def _attach(op: str, backend: str) -> None:
    """Register the kernels of `op`, and of `<op>_backward` where described, with torch.library."""
    module = importlib.import_module(_stem(op, backend))
    _untraced(module.run)
    dispatch.replace(op, backend, run=module.run, missing=_nothing, refuses=_refusing(op, module.refuses))
    _define(op, backend, module.run)
    if f"{op}_backward" in _described:
        _untraced(module.run_backward)
        _define(f"{op}_backward", backend, module.run_backward)


def _untraced(launch: Callable[..., Any]) -> None:
    """Keep dynamo out of a launcher and all that it calls: it would take the addresses of this call for constants.

    It looks at every frame that runs eagerly inside a compiled function, as one does under a TorchDispatchMode. This is
    torch._dynamo's own way to skip code, without the second that importing it takes.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(launch.__code__, frames._FrameExecStrategy(skip, skip))


def _define(op: str, backend: str, run: Callable[..., Any]) -> None:
    what = _described[op]
    name = f"{NAMESPACE}::{op.rstrip('_')}_{backend}"
    define: Any = torch.library.triton_op if backend == "triton" else torch.library.custom_op
    registered = define(name, _by_position(run), mutates_args=what.mutates, schema=what.schema)
    registered.register_fake(what.fake)
    if what.backward is not None:
        setup = what.setup
        assert setup is not None

        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.backend = backend
            setup(ctx, inputs, output)

        registered.register_autograd(what.backward, setup_context=remember)


def _by_position(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with its keyword-only arguments given by position, in the order of its signature."""
    signature = inspect.signature(run, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.name != "out"]  # `out` is not of the schema
    first = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    def call(*args: Any) -> Any:
        return run(*args[:first], **dict(zip(names, args[first:], strict=True)))

    # triton_op makes the schema from the annotations, whatever schema it is given
    plain = [p.replace(kind=p.POSITIONAL_OR_KEYWORD, default=p.empty) for p in parameters]
    call.__signature__ = signature.replace(parameters=plain)  # type: ignore[attr-defined]
    return call


def registered(op: str, backend: str) -> Any:
    """The op torch.ops.fastdiff.<op>_<backend>, once the backend has been asked for."""
    return getattr(torch.ops.fastdiff, f"{op.rstrip('_')}_{backend}")


def call(op: str, *args: Any, **given: Any) -> Any:
    """Run `op` on the backend that `dispatch` chooses: its function directly, or the registered op around it.

    The registered op is for gradients, tracing, tensor subclasses and dispatch modes (fake tensors, counters).
    """
    backend = dispatch.chosen(op, *args, **given)
    if backend == "reference" or plain(*args, *given.values()):
        return dispatch.run(op, backend)(*args, **given)
    return registered(op, backend)(*args, **given)


def plain(*args: Any) -> bool:
    """Whether nothing but the kernel looks at these arguments: no gradient, no tracing, no subclass, no mode."""
    if jit.traced():
        return False
    grad = torch.is_grad_enabled()
    # a loop is twice as fast as all(), and most arguments are None
    for a in args:
        if a is not None and isinstance(a, Tensor) and (type(a) not in _TENSORS or (grad and a.requires_grad)):
            return False
    return True


def grads_of(formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Gradients of formula(*inputs) for those inputs that require them, by torch's autograd; None for the others.

    They can be differentiated again where grad mode is on.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: where one input was made from another, only the other's direct share is its gradient here
        apart = [None if v is None else v.view_as(v) for v in inputs]
        wanted = [v for v in apart if v is not None and v.requires_grad]
        found = iter(torch.autograd.grad(formula(*apart), wanted, grad, create_graph=again, allow_unused=True))
    return [next(found) if v is not None and v.requires_grad else None for v in inputs]


def shaped_like(v: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """grad (N, C) as the gradient of v: summed over the images where v is (C,), in v's dtype."""
    if v is None or grad is None:
        return None
    return (grad.sum(0) if v.ndim == 1 else grad).to(v.dtype)
