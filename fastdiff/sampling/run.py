"""How the rows of a plan are run.

A run makes, for a set of buffers, the steps that work on them; `loop` knows the rows on the host and asks for them.
`eager` repeats the one step from Python, `compiled` is one torch.compile of it, `graph` replays a CUDA graph of it;
`auto` is graph on CUDA devices and eager elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff import row
from fastdiff.sampling.call import Call
from fastdiff.sampling.reuse import fresh_rows
from fastdiff.sampling.state import Kind, Program, State, enter
from fastdiff.sampling.step import one_step

Each = Callable[[int, Tensor, Tensor], Tensor | None]
"""each(i, x, x0) after grid step i, with copies; what it returns, if anything, replaces x."""


class Steps(Protocol):
    """One step on one set of buffers, made ready to be repeated."""

    def begin(self) -> None:
        """A loop starts: what has changed since the last one must be noticed here."""

    def run(self, kind: Kind, count: int, noise: Tensor | None = None) -> None:
        """The next `count` rows, all of one kind; noise: z of this one row instead of Philox."""

    @property
    def memory(self) -> int:
        """Bytes that the steps hold beside the buffers."""

    def close(self) -> None:
        """Give it back."""


class Run(NamedTuple):
    """A way to run rows: `fd.eager`, `fd.compiled`, `fd.graph`, `fd.auto`; called with options, the same way with them.

    `fd.Sampler(den, shape, run=fd.graph)`, `run=fd.graph(unroll=4)`.
    """

    name: str
    make: Callable[..., Steps]
    """make(program, state, **options)."""
    static: Callable[[torch.device], bool] = lambda _: False
    """Whether a new shape costs a compilation or a capture there, so that batches are padded to a few sizes."""
    options: Mapping[str, Any] = {}

    def __call__(self, **options: Any) -> Run:
        """The same run with options."""
        return self._replace(options={**self.options, **options})

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"fd.{self.name}" + (f"({given})" if given else "")

    def steps(self, program: Program, s: State) -> Steps:
        """Steps on these buffers. Raises TypeError for an option that the run does not have."""
        known(self.options, self.name, self.make)
        return self.make(program, s, **self.options)


def known(options: Mapping[str, Any], name: str, make: Callable[..., Steps]) -> None:
    """Raises TypeError for an option that steps of this make do not have."""
    parameters = inspect.signature(make).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return  # it hands them on, and asks there
    accepted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = [option for option in options if option not in accepted]
    if unknown:
        raise TypeError(f"fd.{name}: unknown option {unknown[0]!r}; accepted: {', '.join(accepted) or 'none'}")


class Eager:
    """The step called from Python, with nothing kept."""

    def __init__(self, program: Program, s: State) -> None:
        self.program, self.s = program, s

    def begin(self) -> None:
        """Nothing to notice."""

    def run(self, kind: Kind, count: int, noise: Tensor | None = None) -> None:
        """`count` steps."""
        for _ in range(count):
            one_step(self.program, self.s, kind, noise)

    memory = 0

    def close(self) -> None:
        """Nothing to give back."""


def loop(
    steps: Steps,
    s: State,
    call: Call,
    *,
    each: Each | None = None,
    noise: Iterator[Tensor] | None = None,
    tick: Callable[[], object] | None = None,
) -> None:
    """Run the rows of a call, reading nothing back from the device: the result is left in s.x, the bad rows in s.bad.

    The host has the rows in float64; s holds them cast, on the device. Rows with W = 1 call the network on the
    conditional half only. noise: an iterator of z, one for each row that draws. Rows of one kind are asked for together
    where nobody looks in between.
    """
    rows, kinds = call.rows, _kinds(s, call)
    alone = noise is not None or tick is not None
    done = 0
    steps.begin()
    for kind, group in groupby(enumerate(kinds), key=lambda item: item[1]):
        numbers = [k for k, _ in group]
        if not alone and not kind.watched:
            steps.run(kind, len(numbers))
            continue
        for k in numbers:
            draws = noise is not None and rows[k, row.S] != 0
            steps.run(kind, 1, _padded(_next(noise, k).to(s.x), len(s.x)) if noise is not None and draws else None)
            if each is not None and kind.watched:
                _show(s, each, done, call.images, float(rows[k + 1, row.C_IN]))
                done += 1
            if tick is not None:
                tick()


def _kinds(s: State, call: Call) -> list[Kind]:
    """What the host knows of each row."""
    rows = call.rows[:-1]
    images = [len(s.x) if w == 1 else len(s.x_in) for w in rows[:, row.W]]
    watched = [call.watched and bool(end == 1) for end in rows[:, row.END]]
    steered = [bool(acts) for acts in (call.pulls != 0).any(1)]
    fresh = fresh_rows(images, 1 if call.reuse is None else call.reuse.every)
    return [Kind(*parts) for parts in zip(images, watched, steered, fresh, strict=True)]


def _next(noise: Iterator[Tensor], k: int) -> Tensor:
    z = next(noise, None)
    if z is None:
        raise ValueError(f"noise: the iterator ended before row {k}; give one z for each row that draws")
    return z


def _padded(z: Tensor, images: int) -> Tensor:
    """z for a batch that is padded."""
    return z if len(z) >= images else torch.cat([z, z[-1:].expand(images - len(z), *z.shape[1:])])


def _show(s: State, each: Each, i: int, images: int, c_in: float) -> None:
    """The caller's look at a step; what the caller returns replaces x."""
    assert s.x0 is not None
    x = s.x[:images]
    replaced = each(i, x.clone(), s.x0[:images].clone())
    if replaced is None:
        return
    if replaced.shape != x.shape:
        raise ValueError(f"each returned {tuple(replaced.shape)} for a state {tuple(x.shape)}; return x or None")
    x.copy_(replaced)
    enter(s, c_in)


eager = Run("eager", Eager)
"""The one step from Python: any network, any device, noise of your own."""
