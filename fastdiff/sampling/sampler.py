"""The sampler: one set of buffers for many calls, each from a Denoiser and a solver's numbers to images."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import row
from fastdiff.nn.prepare import PreparedUNet
from fastdiff.ops import dispatch
from fastdiff.sampling.auto import auto
from fastdiff.sampling.buffers import allocate, fill, shape_of
from fastdiff.sampling.call import Call, conditions, numbers
from fastdiff.sampling.defaults import Solver, Spacing, choose
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.guidance import Cond, Energy, Guidance, gathered, networks
from fastdiff.sampling.reuse import DeepCache
from fastdiff.sampling.run import Each, Run, Steps, loop
from fastdiff.sampling.state import Program, State


@contextlib.contextmanager
def _evaluating(nets: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Dropout off while sampling; every module that was in training goes back to it.

    Not in torch.inference_mode, even where the caller is: a tensor made there cannot be written to elsewhere.
    """
    training = [m for net in nets for m in net.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Held(NamedTuple):
    """A set of buffers and the steps on it."""

    state: State
    steps: Steps


class Sampler:
    """Samples `shape` = (N, C, *spatial) from `den` again and again in one set of buffers, one call at a time.

    `fast = fd.Sampler(den, shape, run=fd.graph); a = fast(fd.heun, steps=18, seed=1)`: solver, steps, weight, seed and
    condition change from call to call, and cost neither a compilation nor a capture. The call takes what `fd.sample`
    takes, and `shape` for another batch or size. Where a new shape does cost one (compiled, graph), other batches than
    N are padded to the next of 1, 2, 3, 4, 6, 8, 12, 16 ... or N. keep: sets of buffers that are kept, with what was
    compiled or captured for them; the one not used for longest goes first. dtype: of the state, float32, or float64 to
    check a loop (the reference backend then runs the step). The result is a copy: no caller ever holds a buffer.

    `close()`, or leaving a `with` block, frees everything; the next call begins anew.
    """

    def __init__(
        self,
        den: Denoiser,
        shape: Sequence[int],
        run: Run = auto,
        *,
        dtype: torch.dtype = torch.float32,
        keep: int = 4,
    ) -> None:
        if not isinstance(run, Run):
            raise TypeError(f"run={run!r} is a {type(run).__name__}; pass fd.auto, fd.eager, fd.compiled or fd.graph")
        if keep < 1:
            raise ValueError(f"keep={keep} leaves no buffers to run in; pass 1 or more")
        self.den, self.run, self.shape, self.dtype, self.keep = den, run, _checked(shape), dtype, keep
        self._lock = threading.Lock()
        self._held: OrderedDict[Any, _Held] = OrderedDict()
        self._done: torch.cuda.Event | None = None
        self._owner: int | None = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the buffers, and all that was captured for them."""
        with self._alone():
            if self._done is not None:
                self._done.synchronize()
            while self._held:
                self._held.popitem()[1].steps.close()

    @property
    def memory(self) -> int:
        """Bytes that captured graphs hold beside the buffers."""
        return sum(held.steps.memory for held in self._held.values())

    def _find(self, call: Call, rest: tuple[int, ...]) -> _Held:
        """The buffers and steps for a call: kept ones, or new ones."""
        den, own = self.den, self.shape[0]
        images = call.images
        if images != own and self.run.static(den.device):
            images = min(size for size in (own, bucket(images)) if size >= images)
        shape = shape_of(den, call, images, rest, self.dtype)
        stages = 0 if call.reuse is None else call.reuse.stages
        key = (shape, id(den.net), den.variance, call.energies, stages, dispatch.asked())
        if key not in self._held:
            while len(self._held) >= self.keep:
                self._held.popitem(last=False)[1].steps.close()
            s = allocate(shape, call)
            # x in the place of F, which is not there yet: a kernel takes F in any layout and float dtype
            step_ = dispatch.choose("step_", s.x, s.x_in, s.h, s.x, s.rows, s.k, s.number, s.seed)
            program = Program(den.net, step_, den.variance, call.energies, stages)
            self._held[key] = _Held(s, self.run.steps(program, s))
        self._held.move_to_end(key)
        return self._held[key]

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """A call on another stream than the last one's finds the buffers as that one leaves them."""
        device = self.den.device
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done = stream.record_event()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time; one from inside another, from `each` say, would wait for itself."""
        if self._owner == threading.get_ident():
            raise RuntimeError("a Sampler was called from within its own call; use a second one there")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def _verdict(self, s: State, call: Call) -> None:
        """The one read after the loop: which image went wrong where."""
        bad = s.bad[: call.images].cpu()
        if bool((bad >= 0).any()):
            i = int((bad >= 0).nonzero()[0])
            k = int(bad[i])
            raise FloatingPointError(
                f"image {int(s.number[i])} is not finite after row {k} (t = {call.rows[k, row.T]:g}), "
                f"{int((bad >= 0).sum())} of {len(bad)} images are not finite at the end; look for NaN in the weights "
                f"and the condition, or give the network a wider dtype than {self.den.dtype or s.x.dtype}"
            )

    def __call__(
        self,
        solver: Solver | None = None,
        *,
        shape: Sequence[int] | None = None,
        steps: int | None = None,
        spacing: Spacing | None = None,
        times: Sequence[float] | None = None,
        x: Tensor | None = None,
        noise: Iterable[Tensor] | None = None,
        seed: int = 0,
        index: Tensor | Sequence[int] | None = None,
        cond: Cond = None,
        guidance: Guidance | Energy | Sequence[Guidance | Energy] | None = None,
        clip: float | None = None,
        reuse: DeepCache | None = None,
        each: Each | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Tensor:
        """One run; the arguments of `fd.sample`."""
        den, guided = self.den, gathered(guidance)
        n, *rest = self.shape if shape is None else _checked(shape)
        if x is not None and tuple(x.shape) != (n, *rest):
            raise ValueError(f"x must be shaped {(n, *rest)}, got {tuple(x.shape)}")
        rows = numbers(den, choose(den, solver, steps, spacing, times), times, clip, guided.cfg, options)
        parts = conditions(den, rows, n, cond, guided)
        call = Call(rows, n, seed, index, x, each is not None, reuse, *parts)
        draws = None if noise is None else iter(noise)
        nets = networks(den.net, call.energies)
        with self._alone(), self._in_order(), _evaluating(nets), _bar(progress, len(rows) - 1) as tick:
            for packed in (m for net in nets for m in net.modules() if isinstance(m, PreparedUNet)):
                packed.refresh()  # a replay would not ask
            s, made = self._find(call, tuple(rest))
            fill(s, den, call)
            loop(made, s, call, each=each, noise=draws, tick=tick)
            self._verdict(s, call)
            return s.x[:n].clone()


def _checked(shape: Sequence[int]) -> tuple[int, ...]:
    """A batch's shape. Raises ValueError for what is none."""
    if len(shape) < 2 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"shape={tuple(shape)} is no image batch; pass (N, C, *spatial), each at least 1")
    return tuple(shape)


def bucket(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16 ...: less than a third of a batch is padding."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


@contextlib.contextmanager
def _bar(progress: bool, rows: int) -> Iterator[Callable[[], object] | None]:
    if not progress:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=rows, desc="sampling", unit="row") as bar:
        yield bar.update
