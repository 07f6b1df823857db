"""A batch of images from noise, whole: our loop around the prepared network, and diffusers' around everybody else's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff as fd
from benchmarks import engines
from benchmarks.cpu import Given, torch_rivals
from benchmarks.models import DDPM, Model, Pair, pair, shape
from benchmarks.note import Note
from benchmarks.rows import said
from benchmarks.timing import interleaved, ratio

OURS = "ours, prepared"
STEPS, IMAGES, ROUNDS = 50, 16, 3

Net = Callable[..., Tensor]
Loop = Callable[[int], Tensor]
"""Images after so many steps."""


def rivals(made: Pair, given: Given, others: tuple[str, ...], modes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Networks as `net(x, t, cond)`, or why one is not there."""

    def of(net: nn.Module, form: torch.memory_format) -> Net:
        return lambda x, t, cond=None: net(x.contiguous(memory_format=form), t.contiguous(), cond)

    for name, make in torch_rivals(given, modes).items():
        if name.endswith("eager"):
            continue
        yield name, of(make().func, torch.channels_last)  # type: ignore[attr-defined]
    export = engines.Export(made.theirs, given.x, given.t, given.cond)
    for name in others:
        try:
            engine = engines.build(name, export, torch.get_num_threads())
            yield engine.name, of(engine.run, torch.contiguous_format)  # type: ignore[arg-type]
        except engines.NotThere as error:
            yield name, str(error)
    export.close()


class Inside:
    """Seconds that a module's calls take."""

    def __init__(self, net: nn.Module) -> None:
        self.seconds, self._begin = 0.0, 0.0
        self._hooks = net.register_forward_pre_hook(self._before), net.register_forward_hook(self._after)

    def _before(self, *_: object) -> None:
        self._begin = time.perf_counter()

    def _after(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begin

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def outside(net: nn.Module, loop: Callable[[], object]) -> float:
    """The share of the loop's time that is not the network's."""
    inside, begin = Inside(net), time.perf_counter()
    loop()
    whole = time.perf_counter() - begin
    inside.remove()
    return 1 - inside.seconds / whole


def measure(
    model: Model = DDPM,
    *,
    images: int = IMAGES,
    steps: int = STEPS,
    rounds: int = ROUNDS,
    others: tuple[str, ...] = ("ONNX Runtime", "OpenVINO", "MNN", engines.PARALLEL),
    modes: tuple[str, ...] = ("freezing",),
) -> dict[str, Any]:
    """Seconds of every loop in turn, all from the same noise and checked to end with the same images."""
    from benchmarks.bench_sampler import their_loop

    torch.compiler.reset()
    with torch.no_grad():
        made = pair(model, "cpu", quiet=True)
        given = Given.of(model, made, images)
        den = fd.Denoiser(made.ours, fd.linear(), "eps").prepare()
        fast = fd.Sampler(den, shape(model, images))

        def ours(steps: int) -> Tensor:
            return fast("ddim", steps=steps, x=given.x, clip=1.0, clipped_direction=False)

        loops: dict[str, Loop] = {OURS: ours}
        skipped: dict[str, str] = {}
        # a few steps compile, warm up and prove it
        wanted = ours(2)
        for name, net in rivals(made, given, others, modes):
            if isinstance(net, str):
                skipped[name] = net
                continue
            try:
                loop = partial(_their, their_loop, den.with_net(net), given.x)
                apart = float((loop(2) - wanted).abs().max())
            except Exception as error:
                skipped[name] = said(error)
                continue
            if apart <= 1e-3:
                loops[name] = loop
            else:
                skipped[name] = f"wrong: images differ by {apart:.1e}"
        net_: Any = den.net
        share = outside(net_, partial(ours, steps))
        whole = {name: partial(loop, steps) for name, loop in loops.items()}
        taken = interleaved(whole, rounds=rounds, floor=0, warm=0, pause=0.1)
    return {
        "images": images,
        "steps": steps,
        "median": {name: statistics.median(seconds) for name, seconds in taken.items()},
        "ratio": {name: ratio(taken, name, OURS) for name in taken if name != OURS},
        "outside": share,
        "skipped": skipped,
        "seconds": taken,
    }


def _their(their_loop: Any, den: fd.Denoiser, x: Tensor, steps: int) -> Tensor:
    images: Tensor = their_loop(den, x, None, 0.0, steps)()
    return images


def lines(record: dict[str, Any]) -> list[str]:
    """As Markdown."""
    out = ["| loop | s | ms an image and step | ours is faster by |", "|---|---|---|---|"]
    work = record["images"] * record["steps"]
    for name, seconds in sorted(record["median"].items(), key=lambda item: item[1]):
        faster = "" if name == OURS else f"{record['ratio'][name]:.2f}x"
        out.append(f"| {name} | {seconds:.2f} | {1e3 * seconds / work:.1f} | {faster} |")
    out += [f"| {name} | not there: {why} | | |" for name, why in record["skipped"].items()]
    best = f"Against the fastest: {min(record['ratio'].values()):.2f}x. " if record["ratio"] else ""
    rounds = len(record["seconds"][OURS])
    about = f"Outside the network {100 * record['outside']:.2f} % of our loop; rivals: diffusers' DDIMScheduler loop."
    return [*out, "", f"{best}{about} {rounds} rounds.", ""]


def notes(quick: bool) -> Iterator[Note]:
    """The one loop that there is time for."""
    if not quick:
        yield Note(f"DDIM-{STEPS} end to end, {DDPM.name}, {IMAGES} images", measure, lines)
