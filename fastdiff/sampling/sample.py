"""Sampling in one call: from a Denoiser and a solver's numbers to images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fastdiff.sampling.auto import auto
from fastdiff.sampling.defaults import Solver, Spacing
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.guidance import Cond, Energy, Guidance
from fastdiff.sampling.reuse import DeepCache
from fastdiff.sampling.run import Each, Run
from fastdiff.sampling.sampler import Sampler


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
    guidance: Guidance | Energy | Sequence[Guidance | Energy] | None = None,
    clip: float | None = None,
    reuse: DeepCache | None = None,
    run: Run = auto,
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
    first. guidance: `fd.cfg(w)`, `fd.energy(f)`, `fd.classifier(net)`, or several of them. clip: bound on |x0|, inf for
    none. reuse: `fd.deep_cache(every)`, lossy. each(i, x, x0): called after each grid step, may return a new x. run:
    `fd.auto`, `fd.eager`, `fd.compiled`, `fd.graph`, see docs/engine.md; who samples more than once keeps a
    `fd.Sampler`, and what it compiled or captured.

    Raises ValueError for arguments that do not fit, FloatingPointError naming image, row and t where an image stops
    being finite. Sources: with the solver; the form of the row: docs/math.md.
    """
    with Sampler(den, shape, run) as fast:
        return fast(
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
            reuse=reuse,
            each=each,
            progress=progress,
            **options,
        )
