"""The ways to do the work of a row: one call of a network (`unet`), or a loop of DDIM steps (`sampler`).

A variant is made ready once for a batch; `run(steps)` is then what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.nets import WITHOUT, Setting, tactics
from fastdiff.ops import dispatch
from fastdiff.sampling.run import Run

MODES: dict[str, dict[str, Any]] = {
    "torch.compile reduce-overhead": {"mode": "reduce-overhead"},
    "torch.compile max-autotune": {"mode": "max-autotune"},
    "torch.compile": {},
    "torch.compile reduce-overhead, loop reindexing": {
        "options": {"triton.cudagraphs": True, "loop_reindexing_after_fusion": True}
    },
}
"""The rival's settings of the compiler, by what is most wanted."""

OURS = "ours compiled"
"""Asks for our network under the compiler too."""


class Ready(NamedTuple):
    """A variant that can be timed."""

    run: Callable[[int], Tensor]
    """run(steps): that many network calls, or a loop of so many steps; the last result."""
    memory: Callable[[], int] = lambda: 0
    """Bytes of what it captured."""
    close: Callable[[], None] = lambda: None


class Variant(NamedTuple):
    """A way to do the work, not yet made ready."""

    name: str
    net: str
    """Of `Nets`."""
    make: Callable[[Setting], Ready]
    kind: str = "plain"
    """What making it ready costs: "plain", "compile" or "max-autotune"."""
    ours: bool = True
    needs: str | None = None
    """A variant that does most of the work of making this one ready, and without which it is not worth its time."""


def _within(backend: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else fd.backend(backend)


def _repeat(call: Callable[[], Tensor]) -> Callable[[int], Tensor]:
    def run(steps: int) -> Tensor:
        for _ in range(steps - 1):
            call()
        return call()

    return run


def captured(setting: Setting, call: Callable[[], Tensor]) -> Ready:
    """The call as a graph. Raises ValueError where there are none."""
    if setting.recorder is None:
        raise ValueError("CUDA graphs need a GPU")
    recorder = setting.recorder(torch.device(setting.device))
    found: list[Tensor] = []

    def work() -> None:
        found[:] = [call()]

    recorder.warm(work)
    if (line := recorder.probe(work)) is not None:
        raise ValueError(f"no graph can follow {line}, where the host waits for the device")
    graph = recorder.record(work)

    def replay() -> Tensor:
        graph.replay()
        return found[0]

    return Ready(_repeat(replay), recorder.memory, graph.reset)


def _call(setting: Setting, *, net: str, backend: str | None, options: dict[str, Any] | None, graph: bool) -> Ready:
    """One network call; options: of torch.compile, None without it."""
    f: Any = setting.nets.net(net)
    if options is not None:
        f = torch.compile(f, dynamic=False, **options)
    x, t, cond, table = setting.given(net), setting.t, setting.cond, _table(setting, net, backend)

    def call() -> Tensor:
        with _within(backend):
            if options is not None:
                torch.compiler.cudagraph_mark_step_begin()
            F: Tensor = f(x, t, cond) if table is None else f(x, None, cond, table_row=table)
            return F

    return captured(setting, call) if graph else Ready(_repeat(call))


def _without_time(backend: str | None) -> bool:
    """Whether a backend of ours leaves the time embedding to others."""
    return backend is not None and dispatch.reason("time_embed", backend) is not None


def _table(setting: Setting, net: str, backend: str | None) -> Tensor | None:
    """The time projections, made before by `auto`, for a backend that does not make them."""
    if not _without_time(backend):
        return None
    made: Any = setting.nets.net(net)
    with fd.backend("auto"):
        table: Tensor = made.time_table(
            setting.t if setting.cond is not None else setting.t[:1], made.told(setting.cond)
        )
    return table


def _sampler(setting: Setting, *, net: str, backend: str, way: Callable[[Setting], Run]) -> Ready:
    """A loop of `fd.Sampler`, which takes the direction from the unclipped output, as diffusers does."""
    fast = fd.Sampler(setting.nets.denoiser(net), setting.shape, run=way(setting))
    given: Any = {"x": setting.x, "cond": setting.cond, "eta": 0.0, "clip": 1.0, "clipped_direction": False}

    def run(steps: int) -> Tensor:
        with fd.backend(backend):
            return fast("ddim", steps=steps, **given)

    return Ready(run, lambda: fast.memory, fast.close)


def graph_of(setting: Setting, **options: Any) -> Run:
    """fd.graph, capturing with what the setting captures with."""
    if setting.recorder is None:
        raise ValueError("CUDA graphs need a GPU")
    return fd.graph(recorder=setting.recorder, **options)


def _theirs(setting: Setting, *, net: str, options: dict[str, Any] | None, graph: bool) -> Ready:
    """The textbook's DDIM loop; under the compiler the whole step is one graph."""
    f, dtype = setting.nets.net(net), setting.nets.dtype
    form = torch.contiguous_format if net.endswith("NCHW") else torch.channels_last

    def formula(x: Tensor, numbers: Tensor) -> Tensor:
        t, alpha, sigma, alpha_next, sigma_next = numbers.unbind()
        F = f(x.to(dtype, memory_format=form), t.expand(len(x)), setting.cond)
        eps = F[:, :3].to(x.dtype)
        x0 = ((x - sigma * eps) / alpha).clamp(-1, 1)
        return alpha_next * x0 + sigma_next * eps

    step: Any = formula if options is None else torch.compile(formula, dynamic=False, **options)
    if graph:
        return _replayed(setting, formula)

    def run(steps: int) -> Tensor:
        x = setting.x
        for line in levels(steps, setting.device):
            if options is None:
                x = step(x, line)
                continue
            torch.compiler.cudagraph_mark_step_begin()
            # what a graph of the compiler's returns is overwritten by its next replay
            x = step(x, line).clone()
        return x

    return Ready(run)


def _replayed(setting: Setting, step: Callable[[Tensor, Tensor], Tensor]) -> Ready:
    """The loop around a step captured by hand."""
    x, numbers = setting.x.clone(), levels(1, setting.device)[0].clone()
    graph = captured(setting, lambda: x.copy_(step(x, numbers)))

    def run(steps: int) -> Tensor:
        x.copy_(setting.x)
        for line in levels(steps, setting.device):
            numbers.copy_(line)
            graph.run(1)
        return x.clone()

    return graph._replace(run=run)


@lru_cache
def levels(steps: int, device: str) -> tuple[Tensor, ...]:
    """(t, alpha, sigma, next alpha, next sigma) of each of the steps that `fd.Sampler` takes."""
    rows, r = torch.as_tensor(fd.plan(fd.linear(), "eps", fd.ddim, steps=steps, spacing="trailing")), fd.row
    now, after = rows[:-1, [r.T, r.ALPHA, r.SIGMA]], rows[1:, [r.ALPHA, r.SIGMA]]
    return torch.cat([now, after], 1).float().to(device).unbind()


def _rivals(label: str, compiled: Sequence[str], make: Callable[..., Ready]) -> list[Variant]:
    """The rival's network: eager, captured by hand, and under the compiler in each of the modes asked for."""
    ways: dict[str, tuple[str, str, dict[str, Any]]] = {
        "eager, NCHW": ("rival NCHW", "plain", {"options": None, "graph": False}),
        "eager, channels_last": ("rival", "plain", {"options": None, "graph": False}),
        "channels_last, CUDA graph": ("rival", "plain", {"options": None, "graph": True}),
    }
    for mode in compiled:
        if mode != OURS:
            kind = "max-autotune" if "max-autotune" in mode else "compile"
            ways[mode] = ("rival", kind, {"options": MODES[mode], "graph": False})
    return [
        Variant(f"{label}, {way}", net, partial(make, net=net, **how), kind, ours=False)
        for way, (net, kind, how) in ways.items()
    ]


NETS = {"fd.UNet": "ours", "prepared": "prepared"}
"""Our networks: what they are called in the report, and in `Nets`."""


def _note(backend: str) -> str:
    return ", time from a table" if _without_time(backend) else ""


def calls(label: str, backends: Sequence[str], compiled: Sequence[str]) -> list[Variant]:
    """One network call. The first backend is measured in all ways, the others captured."""
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "CUDA graph": ("plain", {"options": None, "graph": True}),
        "eager": ("plain", {"options": None, "graph": False}),
    }
    if OURS in compiled:
        ways["torch.compile, CUDA graph"] = ("compile", {"options": {}, "graph": True})
    return [
        Variant(
            f"{name} ({backend}{_note(backend)}), {way}", net, partial(_call, net=net, backend=backend, **how), kind
        )
        for name, net in NETS.items()
        for backend in backends
        for way, (kind, how) in ways.items()
        if backend == backends[0] or way == "CUDA graph"
    ] + _rivals(label, compiled, partial(_call, backend=None))


def loops(label: str, backends: Sequence[str], compiled: Sequence[str]) -> list[Variant]:
    """A loop of steps. The first backend is measured in all ways, the others captured."""
    ways: dict[str, tuple[str, Callable[[Setting], Run]]] = {
        "fd.graph": ("plain", graph_of),
        "fd.graph(unroll=4)": ("plain", partial(graph_of, unroll=4)),
        "fd.eager": ("plain", lambda _: fd.eager),
    }
    if OURS in compiled:
        ways["fd.compiled"] = ("compile", lambda _: fd.compiled)
        ways["fd.graph(step=fd.compiled)"] = ("plain", partial(graph_of, step=fd.compiled))
    made = []
    for name, net in NETS.items():
        for backend in backends:
            who = f"{name} ({backend})"
            for way, (kind, run) in ways.items():
                if backend == backends[0] or way == "fd.graph":
                    needs = f"{who}, fd.compiled" if "step" in way else None
                    make = partial(_sampler, net=net, backend=backend, way=run)
                    made.append(Variant(f"{who}, {way}", net, make, kind, needs=needs))
    return made + _rivals(label, compiled, _theirs)


def ablation(backend: str) -> list[Variant]:
    """One captured call of the prepared network: with all tactics, and without each of them."""
    nets = ["prepared", *(f"{WITHOUT}{tactic}" for tactic in tactics())]
    return [Variant(n, n, partial(_call, net=n, backend=backend, options=None, graph=True)) for n in nets]
