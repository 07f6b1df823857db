"""Sampling: from a Denoiser and a solver's numbers to images."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import row
from fastdiff.ops import dispatch, philox
from fastdiff.sampling.defaults import Choice, Solver, Spacing, choose
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.forward import told_times
from fastdiff.sampling.guidance import Cond, Guidance, map_cond
from fastdiff.sampling.run import Each, Runner, auto
from fastdiff.sampling.state import Program, State, enter, prior
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


class Sampler:
    """Samples `shape` = (N, C, *spatial) from `den` again and again in one set of buffers, one call at a time.

    `fast = fd.Sampler(den, shape); a = fast(fd.heun, steps=18, seed=1)`: solver, steps, weight, seed and condition
    change from call to call. The call takes what `fd.sample` takes. dtype: of the state, float32, or float64 to check a
    loop (the reference backend then runs the step). The result is a copy: no caller ever holds a buffer.
    """

    def __init__(
        self, den: Denoiser, shape: Sequence[int], run: Runner = auto, *, dtype: torch.dtype = torch.float32
    ) -> None:
        if len(shape) < 2 or any(not isinstance(size, int) or size < 1 for size in shape):
            raise ValueError(f"shape={tuple(shape)} is no image batch; pass (N, C, *spatial), each at least 1")
        self.den, self.run, self.shape = den, run, tuple(shape)
        self._lock = threading.Lock()
        device, n = den.device, shape[0]
        self._x = torch.zeros(self.shape, dtype=dtype, device=device)
        self._h = torch.zeros((row.SLOTS, *self.shape), dtype=dtype, device=device)
        self._k, self._seed = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self._index, self._bad = (torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2))
        self._x_in = self._input(n)

    def _input(self, images: int) -> Tensor:
        """A network input for so many images; the larger one stays, the smaller one is a part of it."""
        return torch.zeros((images, *self.shape[1:]), dtype=self.den.dtype or self._x.dtype, device=self._x.device)

    def _load(self, rows: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """The rows, cast once, and column T as the network is told it, in buffers of one of a few capacities."""
        capacity = next((c for c in row.CAPACITIES if c >= len(rows)), len(rows))
        padded = torch.zeros(capacity, row.COLUMNS, dtype=self._x.dtype)
        padded[: len(rows)] = torch.as_tensor(rows).to(padded)
        times = told_times(self.den.schedule, np.pad(rows[:, row.T], (0, capacity - len(rows))))
        return padded.to(self._x.device), times.to(self._x.device)

    def _start(
        self,
        rows: np.ndarray[Any, Any],
        cond: Cond,
        guided: bool,
        x: Tensor | None,
        seed: int,
        index: Tensor | Sequence[int] | None,
    ) -> State:
        n, device = self.shape[0], self._x.device
        if guided and len(self._x_in) == n:
            self._x_in = self._input(2 * n)
        number = torch.arange(n) if index is None else torch.as_tensor(index)
        if number.shape != (n,) or number.is_floating_point() or bool((number < 0).any()):
            raise ValueError(f"index must be {n} whole numbers >= 0, one an image, got {index}")
        self._index.copy_(number)
        self._seed.copy_(philox.seed_tensor(seed))
        self._k.zero_()
        self._bad.fill_(-1)
        x_in = self._x_in[: 2 * n if guided else n]
        s = State(self._x, x_in, self._h, *self._load(rows), self._k, self._seed, self._index, cond, self._bad)
        if x is None:
            scale = self.den.schedule.prior
            prior(s, float(rows[0, row.SIGMA]) if scale is None else scale)
        elif tuple(x.shape) != self.shape:
            raise ValueError(f"x must be shaped {self.shape}, got {tuple(x.shape)}")
        else:
            s.x.copy_(x.to(device))
        enter(s, float(rows[0, row.C_IN]))
        return s

    def _verdict(self, s: State, rows: np.ndarray[Any, Any]) -> None:
        """The one read after the loop: which image went wrong where."""
        bad = s.bad.cpu()
        if bool((bad >= 0).any()):
            i = int((bad >= 0).nonzero()[0])
            k = int(bad[i])
            raise FloatingPointError(
                f"image {int(s.number[i])} is not finite after row {k} (t = {rows[k, row.T]:g}), "
                f"{int((bad >= 0).sum())} of {len(bad)} images are not finite at the end; look for NaN in the weights "
                f"and the condition, or give the network a wider dtype than {self.den.dtype or s.x.dtype}"
            )

    def __call__(
        self,
        solver: Solver | None = None,
        *,
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
        rows = _rows(self.den, choose(self.den, solver, steps, spacing, times), times, clip, guidance, options)
        guided = bool((rows[:-1, row.W] != 1).any())
        cond = _images(cond, self.shape[0], self._x.device)
        if guided and guidance is not None:
            if cond is None:
                raise ValueError("guidance needs a condition; pass cond= (class labels, say), or guidance=None")
            null = _images(self.den.null(cond, guidance.null), self.shape[0], self._x.device)
            cond = map_cond(lambda c, u: torch.cat([c, u.to(c)]), cond, null)
        with self._lock, _evaluating(self.den.net), _bar(progress, len(rows) - 1) as tick:
            s = self._start(rows, cond, guided, x, seed, index)
            # x in the place of F, which is not there yet: a kernel takes F in any layout and float dtype
            step_ = dispatch.choose("step_", s.x, s.x_in, s.h, s.x, s.rows, s.k, s.number, s.seed)
            draws = None if noise is None else iter(noise)
            self.run(Program(self.den.net, step_, self.den.variance), s, rows, each=each, noise=draws, tick=tick)
            self._verdict(s, rows)
            return s.x.clone()


@contextlib.contextmanager
def _bar(progress: bool, rows: int) -> Iterator[Callable[[], object] | None]:
    if not progress:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=rows, desc="sampling", unit="row") as bar:
        yield bar.update


def sample(
    den: Denoiser,
    shape: Sequence[int],
    solver: Solver | None = None,
    *,
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
    run: Runner = auto,
    each: Each | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Images x (N, C, *spatial), float32, from `den` by `solver`: one network call and one affine update a row.

    solver: a function of `fd.SOLVERS` or its name, or your own `solver(levels, **options) -> Table`; options go to it
    (eta, churn, variance, ...) and to `fd.plan` (final, t_end, denoise, quantize). steps: grid intervals; network calls
    are `len(fd.plan(...)) - 1`. spacing: a name or a function (schedule, steps) -> times; times: the levels themselves.
    None means the Denoiser's default, else ddim, 50 steps. x: the state at the first level, else drawn from the prior.
    noise: an iterator of z, one for each row that draws, instead of Philox. seed, index: the run's seed and the images'
    numbers, 0..N-1 unless given: an image's noise depends on these two alone. cond: a tensor, tuple or dict, image axis
    first. guidance: `fd.cfg(w)`. clip: bound on |x0|, inf for none. each(i, x, x0): called after each grid step, may
    return a new x.

    Raises ValueError for arguments that do not fit, FloatingPointError naming image, row and t where an image stops
    being finite. Sources: with the solver; the form of the row: docs/math.md.
    """
    return Sampler(den, shape, run)(
        solver,
        steps=steps,
        spacing=spacing,
        times=times,
        x=x,
        noise=noise,
        seed=seed,
        index=index,
        cond=cond,
        guidance=guidance,
        clip=clip,
        each=each,
        progress=progress,
        **options,
    )
