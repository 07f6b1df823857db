"""The sampler: one set of buffers for many calls, each from a Denoiser and a solver's numbers to images."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff import row
from fastdiff.ops import dispatch
from fastdiff.sampling.buffers import Call, allocate, fill, shape_of
from fastdiff.sampling.defaults import Choice, Solver, Spacing, choose
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.graph import auto
from fastdiff.sampling.guidance import Cond, Guidance, map_cond
from fastdiff.sampling.run import Each, Run, Steps, loop
from fastdiff.sampling.state import Program, State
from fastdiff.tables.plan import plan


def _rows(
    den: Denoiser,
    choice: Choice,
    times: Sequence[float] | None,
    clip: float | None,
    guidance: Guidance | None,
    options: dict[str, Any],
) -> np.ndarray[Any, Any]:
    """The numbers of a call, float64 on the host; the caller's options go before the Denoiser's."""
    if "w" in options:
        raise ValueError("the guidance weight is no option of a solver; pass guidance=fd.cfg(w)")
    given = {"clip": None, **choice.options, **options}
    own_clip = given.pop("clip")
    return plan(
        den.schedule,
        den.predicts,
        choice.solver,
        steps=choice.steps,
        spacing=choice.spacing,
        times=times,
        clip=own_clip if clip is None else clip,
        w=1.0 if guidance is None else guidance.weight,
        sigma_data=den.sigma_data,
        **given,
    )


def _images(cond: Cond, n: int, device: torch.device) -> Cond:
    """cond on the device; a label or a list of labels becomes a tensor, a single one stands for all n images."""
    numbers = isinstance(cond, list) and all(isinstance(c, int) for c in cond)
    if numbers or isinstance(cond, int | np.integer | np.ndarray | range):
        cond = torch.as_tensor(cond)

    def fit(c: Tensor) -> Tensor:
        c = c.to(device)
        c = c.expand(n, *c.shape[1:]) if c.ndim == 0 or (len(c) == 1 != n) else c
        if len(c) != n:
            raise ValueError(f"cond holds {len(c)} images, the shape asks for {n}; pass one condition an image")
        return c

    return map_cond(fit, cond)


@contextlib.contextmanager
def _evaluating(net: Any) -> Iterator[None]:
    """Dropout off while sampling; every module that was in training goes back to it."""
    training = [m for m in net.modules() if m.training] if isinstance(net, torch.nn.Module) else []
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
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

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the buffers, and all that was captured for them."""
        with self._lock:
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
        key = (shape, id(den.net), den.variance, dispatch.asked())
        if key not in self._held:
            while len(self._held) >= self.keep:
                self._held.popitem(last=False)[1].steps.close()
            s = allocate(shape, call.cond)
            # x in the place of F, which is not there yet: a kernel takes F in any layout and float dtype
            step_ = dispatch.choose("step_", s.x, s.x_in, s.h, s.x, s.rows, s.k, s.number, s.seed)
            self._held[key] = _Held(s, self.run.steps(Program(den.net, step_, den.variance), s))
        self._held.move_to_end(key)
        return self._held[key]

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
        guidance: Guidance | None = None,
        clip: float | None = None,
        each: Each | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Tensor:
        """One run; the arguments of `fd.sample`."""
        if guidance is not None and not isinstance(guidance, Guidance):
            raise TypeError(f"guidance={guidance!r} is a {type(guidance).__name__}; pass fd.cfg(w)")
        den = self.den
        n, *rest = self.shape if shape is None else _checked(shape)
        rows = _rows(den, choose(den, solver, steps, spacing, times), times, clip, guidance, options)
        guided = bool((rows[:-1, row.W] != 1).any())
        cond = _images(cond, n, den.device)
        if guided and guidance is not None:
            if cond is None:
                raise ValueError("guidance needs a condition; pass cond= (class labels, say), or guidance=None")
            null = _images(den.null(cond, guidance.null), n, den.device)
            cond = map_cond(lambda c, u: torch.cat([c, u.to(c)]), cond, null)
        if x is not None and tuple(x.shape) != (n, *rest):
            raise ValueError(f"x must be shaped {(n, *rest)}, got {tuple(x.shape)}")
        call = Call(rows, n, guided, cond, seed, index, x, watched=each is not None)
        draws = None if noise is None else iter(noise)
        with self._lock, _evaluating(den.net), _bar(progress, len(rows) - 1) as tick:
            s, made = self._find(call, tuple(rest))
            fill(s, den, call)
            loop(made, s, rows, images=n, each=each, noise=draws, tick=tick)
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
