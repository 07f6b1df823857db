"""One torch.compile of the one step, for every solver, step count, weight, seed and condition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdiff.ops import step_
from fastdiff.sampling.run import Run
from fastdiff.sampling.state import Kind, Program, State
from fastdiff.sampling.step import one_step

Step = Callable[[Program, State, Kind], None]
# by network, so that every Sampler of a network finds what an earlier one compiled
_compiled: WeakKeyDictionary[Any, dict[Any, Step]] = WeakKeyDictionary()


def _made(program: Program, s: State, kind: Kind, options: dict[str, Any]) -> Step:
    """The compiled step of a network for one shape and kind of row."""
    try:
        steps = _compiled.setdefault(program.net, {})
    except TypeError as error:
        raise TypeError(f"fd.compiled: the network must be hashable and take weak references: {error}") from error
    tensors = [(t.shape, t.dtype) for t in tree_leaves(s) if isinstance(t, Tensor)]
    # the code of an energy's function, not the function: a lambda that is made anew in each call is compiled once
    energies = [(e.of, getattr(e.f, "__code__", e.f)) for e in program.energies]
    key = (*tensors, *energies, kind, program.variance, program.stages, repr(options))
    if key not in steps:

        def step(program: Program, s: State, kind: Kind) -> None:
            one_step(program, s, kind)

        # a code object of its own: dynamo allows one only so many compilations, and counts those of other shapes
        step.__code__ = step.__code__.replace()
        steps[key] = torch.compile(step, fullgraph=True, dynamic=False, **options)
    return steps[key]


@contextmanager
def _gradients(steered: bool) -> Iterator[None]:
    """Lets dynamo trace torch.autograd.grad, which it does in newer versions of torch, and when asked."""
    if not steered:
        yield
        return
    from torch._dynamo import config

    if not hasattr(config, "trace_autograd_ops"):
        raise ValueError(
            f"guidance by an energy needs a gradient in the step, which torch {torch.__version__} does not compile; "
            "pass run=fd.graph or run=fd.eager"
        )
    with config.patch(trace_autograd_ops=True):
        yield


class Compiled:
    """`torch.compile(fullgraph=True)` of the step, once for each kind of row, when one first needs it.

    mode, options, backend: of torch.compile.
    """

    def __init__(
        self,
        program: Program,
        s: State,
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        backend: str | Callable[..., Any] | None = None,
    ) -> None:
        given = {"mode": mode, "options": options, "backend": backend}
        # the public op: the compiler must see a registered one, where `program` holds a kernel's own function
        self.program, self.s = program._replace(step_=step_), s
        self.options = {name: value for name, value in given.items() if value is not None}

    def begin(self) -> None:
        """Nothing to do: the compiler's guards notice what has changed in the network."""

    def run(self, kind: Kind, count: int, noise: Tensor | None = None) -> None:
        """`count` steps. Raises ValueError for noise of the caller's own."""
        if noise is not None:
            raise ValueError("noise: a compiled step draws its own, by seed and index; pass run=fd.eager")
        step = _made(self.program, self.s, kind, self.options)
        with _gradients(kind.steered):
            for _ in range(count):
                step(self.program, self.s, kind)

    memory = 0

    def close(self) -> None:
        """Nothing to give back: what is compiled goes with the network."""


compiled = Run("compiled", Compiled, static=lambda _: True)
"""One compiled step: the first call takes as long as torch.compile takes, none after it."""
