"""One row: its variants made ready as far as the time goes, each checked, then timed in turn."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import probes
from benchmarks.budget import RESERVE, Budget, Row
from benchmarks.ceilings import Speed, ceilings
from benchmarks.nets import Nets, Setting, distance, exact
from benchmarks.timing import interleaved, ratio
from benchmarks.variants import Ready, Variant, ablation, calls, loops

OUT_OF_TIME = "left out: time"


class Section(NamedTuple):
    """What a row of a section does."""

    name: str
    steps: int
    """Network calls of what is timed; seconds are divided by it."""
    variants: Callable[..., list[Variant]]
    quiet: bool
    """Whether the network hardly answers, so that a loop around it is not chaotic."""
    what: str


SECTIONS = {
    "unet": Section("unet", 1, calls, False, "A step is one call of the network, at one time for all images."),
    "sampler": Section(
        "sampler",
        10,
        loops,
        True,
        "A step is a tenth of a loop of 10 DDIM steps, what comes before the first included; the state is fp32.",
    ),
}


class Made(NamedTuple):
    """A variant that is ready, with what was found on the way."""

    variant: Variant
    ready: Ready
    facts: dict[str, Any]


class DeviceLost(RuntimeError):
    """The device does not answer: a kernel has failed on it, and all work after that fails too."""


def reference(section: Section, setting: Setting) -> tuple[Tensor, float]:
    """The rival's result for the first images in a wider dtype, and its error in its own."""
    (rival,) = [v for v in section.variants("", [], ()) if v.name == ", eager, channels_last"]
    got, wanted = (setting.few(nets) for nets in (setting.nets, setting.nets.wider()))
    with exact():
        wide = rival.make(wanted).run(section.steps)
    return wide, distance(rival.make(got).run(section.steps), wide)


def make(variant: Variant, setting: Setting, section: Section, wanted: Tensor, allowed: float) -> Made:
    """Make a variant ready and check it. Raises what goes wrong."""
    device, nets = setting.device, setting.nets
    weights = nets.weights(variant.net)
    probes.settle(device)
    before, begin = probes.held(device), time.perf_counter()
    ready = variant.make(setting)
    got = ready.run(section.steps)[: len(wanted)].clone()
    error = distance(got, wanted)
    facts: dict[str, Any] = {"prepare_seconds": time.perf_counter() - begin, "error": error}
    # not <=: NaN is wrong too
    if not error <= allowed:
        ready.close()
        raise AssertionError(f"wrong: error {error:.1e} against the reference, allowed {allowed:.1e}")
    probes.settle(device)
    own = max(0, probes.held(device) - before)
    call = partial(ready.run, section.steps)
    extra = probes.peak(device, call)
    begin = time.perf_counter()
    probes.peak(device, call)
    facts |= {"call_seconds": time.perf_counter() - begin, "graph_bytes": ready.memory(), "call_bytes": extra}
    return Made(variant, ready, facts | {"bytes": weights + own + extra})


def prepare(
    variants: Sequence[Variant], setting: Setting, section: Section, budget: Budget, reserve: float, later: float
) -> tuple[list[Made], dict[str, str]]:
    """The variants that fit into the time and are right; and why the others are not there.

    reserve: seconds of what comes behind this. later: more of them, which only what is compiled must leave.
    """
    weight = setting.nets.model.weight
    wanted, error = reference(section, setting)
    allowed = 2 * error + 1e-6
    made: list[Made] = []
    absent: dict[str, str] = {}
    for variant in variants:
        if variant.needs in absent:
            absent[variant.name] = absent[variant.needs]
            continue
        behind = reserve if variant.kind == "plain" else reserve + later
        if not budget.fits(variant.kind, weight, behind):
            absent[variant.name] = OUT_OF_TIME
            continue
        try:
            with budget.spending(variant.kind, weight), within(budget.left - behind):
                made.append(make(variant, setting, section, wanted, allowed))
        # whatever it is, it is this variant's and not the report's
        except Exception as failed:
            absent[variant.name] = said(failed)
            alive(setting.device, absent[variant.name])
            probes.settle(setting.device, every=True)
    return made, absent


def said(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside the block after so many seconds: no compilation may cost the report its other rows."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    # signals go to the main thread alone
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    # again after a while: where something swallows it
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds), 10.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def alive(device: str, why: str) -> None:
    """Raises DeviceLost where the device does not answer any more."""
    if not device.startswith("cuda"):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(why) from error


def timed(made: Sequence[Made], section: Section, device: str, seconds: float, left: float) -> dict[str, list[float]]:
    """Seconds a step, each round's, all variants in turn for about `seconds`.

    Three rounds at least, where `left` allows them, else one.
    """
    once = sum(m.facts["call_seconds"] for m in made)
    rounds = min(50, int(seconds / once))
    if rounds < 3:
        # one more goes by in finding out how long a call takes
        rounds = 3 if 4 * once <= left else 1
    variants = {m.variant.name: partial(m.ready.run, section.steps) for m in made}
    taken = interleaved(variants, rounds=rounds, device=device, warm=0)
    return {name: [s / section.steps for s in each] for name, each in taken.items()}


def figures(
    made: Made, taken: dict[str, list[float]], best: str | None, setting: Setting, flop: float
) -> dict[str, Any]:
    """What the report says of a variant; best: what it is compared with."""
    seconds = taken[made.variant.name]
    median = statistics.median(seconds)
    return {
        "ours": made.variant.ours,
        "median": median,
        "image_steps": setting.batch / median,
        "flops": flop * setting.batch / median,
        "faster": None if best is None else ratio(taken, best, made.variant.name),
        **made.facts,
        "seconds": seconds,
    }


def rank(variant: Variant) -> int:
    """What is made ready first: what takes no time, then the compiler's settings that are usually the fastest."""
    if variant.kind == "plain" and variant.needs is None:
        return 0
    modes = ("reduce-overhead", "max-autotune")
    return next((1 + i for i, mode in enumerate(modes) if variant.name.endswith(mode)), 3 if variant.ours else 4)


def _variants(section: Section, row: Row, nets: Nets, backends: Sequence[str]) -> list[Variant]:
    if row.ablation:
        return ablation(backends[0])
    return sorted(section.variants(nets.pair.label, backends, row.compiled), key=rank)


def details(
    made: list[Made], section: Section, setting: Setting, backend: str, timing: float, budget: Budget
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Kernels a step of each variant; of a loop the share outside the network, of each of our networks.

    What would take too long is left out.
    """
    device, kernels, outside = setting.device, {}, {}
    for m in made:
        net, once = m.variant.net, m.facts["call_seconds"]
        if section.quiet and m.variant.ours and net not in outside:
            rounds = max(3, min(15, int(timing / (2 * once))))
            probe = partial(probes.outside, setting, net, backend, steps=section.steps, rounds=rounds)
            # and about as much for the capture
            found = _tried(device, probe, 2 * (rounds + 1) * once + timing, budget)
            outside[net] = found._asdict() if isinstance(found, probes.Outside) else found
    for m in made:
        seconds = probes.STEPS / section.steps * m.facts["call_seconds"]
        kernels[m.variant.name] = _tried(device, partial(probes.kernels, device, m.ready), 2 * seconds, budget)
    return kernels, outside


def _tried(device: str, probe: Callable[[], Any], seconds: float, budget: Budget) -> Any:
    """What a probe finds in about so many seconds, or why it finds nothing: it costs nothing but itself."""
    if seconds + RESERVE > budget.left:
        return OUT_OF_TIME
    try:
        return probe()
    except Exception as failed:
        alive(device, said(failed))
        return said(failed)


def baseline(row: Row, made: Sequence[Made], taken: dict[str, list[float]]) -> str | None:
    """The fastest rival; among tactics, all of them."""
    names = [m.variant.name for m in made if (m.variant.net == "prepared" if row.ablation else not m.variant.ours)]
    return min(names, key=lambda name: statistics.median(taken[name]), default=None)


def measure(
    section: Section,
    row: Row,
    nets: Nets,
    *,
    speed: Speed,
    backends: Sequence[str],
    budget: Budget,
    timing: float,
    later: float,
) -> dict[str, Any]:
    """The record of a row. Raises DeviceLost."""
    device, (parameters, flop) = nets.device, nets.counted
    setting = Setting(nets, row.batch)
    record: dict[str, Any] = {
        "title": row.title, "model": row.model.name, "batch": row.batch, "steps": section.steps,
        "dtype": str(nets.dtype).removeprefix("torch."), "parameters": parameters, "flop": flop,
        "ceilings": ceilings(row.model, flop, speed),
    }  # fmt: skip
    variants = _variants(section, row, nets, backends)
    reserve = 2 * timing if row.detail else timing
    with torch.no_grad():
        made, absent = prepare(variants, setting, section, budget, reserve, later)
        if nets.pair.missing is not None and not row.ablation:
            absent["diffusers"] = f"{nets.pair.missing}; {nets.pair.label} of the same weights stands for it"
        with budget.spending("timing", row.model.weight):
            taken = timed(made, section, device, timing, budget.left) if made else {}
        record["against"] = best = baseline(row, made, taken)
        record["variants"] = {m.variant.name: figures(m, taken, best, setting, flop) for m in made}
        if row.detail and taken:
            with budget.spending("details", row.model.weight):
                record["kernels"], record["outside"] = details(made, section, setting, backends[0], timing, budget)
    for m in made:
        m.ready.close()
    record["absent"] = absent
    return record
