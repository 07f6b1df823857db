"""A network on a CPU: ours and every rival made ready in turn, each checked against float64 before it is timed."""

from __future__ import annotations

import copy
import functools
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastdiff as fd
from benchmarks import engines
from benchmarks.ceilings import peaks
from benchmarks.models import Model, Pair, condition, count, shape
from benchmarks.nets import CHECKED, distance
from benchmarks.rows import said
from fastdiff.nn import prepare
from fastdiff.nn.arguments import Cond
from fastdiff.sampling.guidance import map_cond

PLAIN, PREPARED, EXACT = "ours", "ours, prepared", "ours, prepared exactly"
OPTIMIZED = "fd.optimize"

COUNTED = 1e-4
"""Relative error up to which a variant counts as the same computation in fp32."""

WRONG = 1e-2
"""Relative error from which a variant is no implementation of the network at all."""

NARROW = 5e-2
"""The same for bf16."""

CACHE = "TORCHINDUCTOR_CACHE_DIR"

OWN = {PLAIN: 1e-5, PREPARED: 2e-5, EXACT: 1e-5, OPTIMIZED: 1e-5}
"""What ours may err."""

Run = Callable[[], Tensor]
Make = Callable[[], Run]


class Limits(NamedTuple):
    """What this machine can do, FLOP/s."""

    matmul: float
    """Of torch.mm, 512 x 512 x 512."""
    direct: float
    """Of the better of that and torch's 3x3 convolution, 128 to 128 channels, 32x32, batch 4."""


class Network(NamedTuple):
    """What the report says of a network beside the times of its variants."""

    images: int
    flop: float
    """Of a call, counted as direct convolutions."""
    threads: int
    limits: Limits
    error: dict[str, float]
    """Each variant's |F - F64| / |F64| of the first images, F64 in float64."""
    ready: dict[str, float]
    """Seconds from the network to the first output: packing, compiling, export, conversion, loading, one call."""
    weights: dict[str, int]
    """Bytes of ours: of the network, and of what is packed."""
    uncounted: tuple[str, ...]
    """Variants that are no rivals, since they compute with less than fp32."""
    settings: dict[str, str]
    """Of each engine."""


class Given(NamedTuple):
    """One network pair and its inputs."""

    model: Model
    pair: Pair
    x: Tensor
    t: Tensor
    cond: Cond

    @classmethod
    def of(cls, model: Model, pair: Pair, batch: int) -> Given:
        """A batch of noise at t = 500."""
        x = torch.randn(shape(model, batch), generator=torch.Generator().manual_seed(0))
        return cls(model, pair, x, torch.full((batch,), 500), condition(model, batch))

    def bound(self, net: nn.Module, *, last: bool = False, dtype: torch.dtype = torch.float32) -> Run:
        """net on these inputs, channels_last or in another dtype."""
        form = torch.channels_last if last else torch.contiguous_format
        return partial(net, self.x.to(dtype, memory_format=form), self.t, self.cond)


def limits() -> Limits:
    """Measured with torch's threads as they are."""
    product, convolution = peaks()
    return Limits(product, max(product, convolution))


@contextmanager
def cold() -> Iterator[None]:
    """Within the block the compiler finds nothing that an earlier run has left on the disk."""
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as empty:
        os.environ[CACHE] = empty
        try:
            yield
        finally:
            if before is None:
                del os.environ[CACHE]
            else:
                os.environ[CACHE] = before


@functools.cache
def awake() -> None:
    """The compiler is loaded, and knows this machine: the first network is not to pay for that."""
    torch.compile(torch.neg, dynamic=False)(torch.ones(64))


@contextmanager
def threads_of(threads: int | None) -> Iterator[None]:
    """torch's number of threads within the block; None: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_amx() -> bool:
    """Whether products in bf16 are faster than in fp32 here."""
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def own(net: fd.UNet) -> dict[str, Callable[[], nn.Module]]:
    """Our network, and what `prepare` makes of it."""
    return {PLAIN: lambda: net, PREPARED: lambda: prepare(net), EXACT: lambda: prepare(net, exact=True)}


def ours(given: Given) -> dict[str, Make]:
    """All of ours on these inputs."""

    def make(name: str, net: Callable[[], nn.Module]) -> Run:
        return given.bound(net(), last=name != PLAIN)

    return {name: partial(make, name, net) for name, net in own(given.pair.ours).items()}


def torch_rivals(given: Given, modes: tuple[str, ...]) -> dict[str, Make]:
    """The same weights in PyTorch: eager in both layouts, compiled with channels_last; modes: "default", "freezing"."""
    theirs, label = given.pair.theirs, given.pair.label
    last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)

    def compiled(net: nn.Module, mode: str, dtype: torch.dtype) -> Run:
        options = {"freezing": True} if mode == "freezing" else None
        return given.bound(torch.compile(net, dynamic=False, options=options), last=True, dtype=dtype)  # type: ignore[call-overload]

    made: dict[str, Make] = {
        f"{label} eager": lambda: given.bound(theirs),
        f"{label} eager, channels_last": lambda: given.bound(last, last=True),
    }
    for mode in modes:
        name = f"{label} torch.compile" + (", freezing" if mode == "freezing" else "")
        made[name] = partial(compiled, last, mode, torch.float32)
    if has_amx():
        narrow = copy.deepcopy(last).to(torch.bfloat16)
        made[f"{label} eager, bf16"] = lambda: given.bound(narrow, last=True, dtype=torch.bfloat16)
        if modes:
            made[f"{label} torch.compile, freezing, bf16"] = partial(compiled, narrow, "freezing", torch.bfloat16)
    return made


class Made:
    """Variants that are ready and right, what was found on the way, and why others are not there."""

    def __init__(self, given: Given) -> None:
        self.given, self.few = given, min(len(given.x), CHECKED)
        self.variants: dict[str, Run] = {}
        self.error: dict[str, float] = {}
        self.ready: dict[str, float] = {}
        self.settings: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        x, t = given.x.double()[: self.few], given.t[: self.few]
        cond = map_cond(lambda v: v[: self.few], given.cond)
        self.wanted: Tensor = copy.deepcopy(given.pair.theirs).double()(x, t, cond)

    def add(self, name: str, make: Make) -> None:
        """Make one ready and check it; whatever goes wrong is this variant's and not the report's."""
        begin = time.perf_counter()
        try:
            with cold():
                run = make()
                first = run()
                ready = time.perf_counter() - begin
        except Exception as error:
            self.skipped[name] = said(error)
            return
        self._check(name, run, first, ready)

    def add_engine(self, name: str, export: engines.Export, threads: int) -> None:
        """The same for another engine."""
        if not engines.fits(name, len(self.given.x), threads):
            return
        fast = [n for n in self.variants if n.startswith(f"{engines.INSTEAD.get(name, name)} ")]
        if name in engines.INSTEAD and not any(self.error[n] > COUNTED for n in fast):
            return
        try:
            engine = engines.build(name, export, threads)
        except engines.NotThere as error:
            self.skipped[name] = str(error)
            return
        run = partial(engine.run, *export.inputs)
        self.settings[engine.name] = engine.settings
        self._check(engine.name, run, run(), engine.ready)

    def _check(self, name: str, run: Run, got: Tensor, ready: float) -> None:
        error = distance(got[: self.few].float(), self.wanted)
        allowed = NARROW if name.endswith("bf16") else WRONG
        # not <=: NaN is wrong too
        if not error <= allowed:
            self.skipped[name] = f"wrong: error {error:.1e} against float64"
            return
        self.variants[name], self.error[name], self.ready[name] = run, error, ready

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Rivals that are not within COUNTED of float64."""
        return tuple(name for name, error in self.error.items() if name not in OWN and error > COUNTED)

    def check(self) -> float:
        """The largest error of ours. AssertionError where one is not there or errs too much."""
        missing = {name: why for name, why in self.skipped.items() if name in OWN}
        assert not missing, missing
        mine = {name: error for name, error in self.error.items() if name in OWN}
        assert all(error <= OWN[name] for name, error in mine.items()), mine
        return max(mine.values())


def held(net: nn.Module) -> int:
    """Bytes of the memory that parameters and buffers lie in, shared ones once."""
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*net.parameters(), *net.buffers())}
    return sum(stores.values())


def made(given: Given, modes: tuple[str, ...], others: tuple[str, ...]) -> tuple[Made, Network]:
    """All variants of a row; others: engines, of `engines.ENGINES`."""
    gc.collect()
    threads = torch.get_num_threads()
    found = Made(given)
    if modes:
        awake()
    for name, make in {**ours(given), **torch_rivals(given, modes)}.items():
        found.add(name, make)
    if others:
        export = engines.Export(given.pair.theirs, given.x, given.t, given.cond)
        for name in others:
            found.add_engine(name, export, threads)
        export.close()
    if given.pair.missing is not None:
        found.skipped["diffusers"] = f"{given.pair.missing}; {given.pair.label} of the same weights stands for it"
    weights = {"network": held(given.pair.ours)}
    packed: Any = found.variants.get(PREPARED)
    if packed is not None:
        weights["packed"] = held(packed.func)
    return found, facts(found, threads, weights)


def facts(found: Made, threads: int, weights: dict[str, int]) -> Network:
    """What the report says of a row's network."""
    images = len(found.given.x)
    flop = count(found.given.model)[1] * images
    return Network(images, flop, threads, limits(), found.error, found.ready, weights, found.uncounted, found.settings)
