"""The steps of a sampler as it runs here, against those of the reference on the network as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff import row
from fastdiff.nn.unet import UNet
from fastdiff.ops import dispatch
from fastdiff.sampling.auto import auto
from fastdiff.sampling.call import numbers
from fastdiff.sampling.defaults import Solver, Spacing, choose
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.guidance import Cond, Energy, Guidance, gathered
from fastdiff.sampling.report import Error, Line, Report, error
from fastdiff.sampling.run import Run, eager
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.verify_module import pair_of

Picture = tuple[Tensor, Tensor]
"""(x, x0) after a step."""


def verify_sampler(
    den: Denoiser,
    shape: Sequence[int] | None = None,
    *,
    steps: int = 4,
    solver: Solver | None = None,
    spacing: Spacing | None = None,
    cond: Cond = None,
    guidance: Guidance | Energy | Sequence[Guidance | Energy] | None = None,
    clip: float | None = None,
    exact: bool = False,
    run: Run = auto,
    **given: Any,
) -> Report:
    """See `fastdiff.verify`; given: seed, index, x and the solver's options."""
    if shape is None and "shape" not in den.meta:
        raise ValueError("verify: den.meta does not say the shape of an image; pass shape=(N, C, H, W)")
    size = (2, *den.meta["shape"]) if shape is None else tuple(shape)
    pair = pair_of(den.net, exact)
    if cond is None and isinstance(pair.plain, UNet) and pair.plain.classes is not None:
        cond = torch.arange(size[0]) % pair.plain.classes
    choice = choose(den, solver, steps, spacing)
    options = {k: v for k, v in given.items() if k not in ("seed", "index", "x")}
    rows = numbers(den, choice, None, clip, gathered(guidance).cfg, options)
    given |= {"solver": solver, "steps": steps, "spacing": spacing, "cond": cond, "guidance": guidance, "clip": clip}
    how = f"{choice.name}, {steps} steps of {size}, {pair.how}, run={run!r}, against the reference"
    with dispatch.backend("reference"):
        with _watched(pair.plain) as outputs:
            want = _steps(den.with_net(pair.plain), size, eager, given)
        free, each = want, want
        if _narrow(den):
            how += " in float32"
            wide = den.with_net(copy.deepcopy(pair.plain).float())
            with _exact_products():
                free, each = _steps(wide, size, eager, given), _steps(wide, size, eager, given, at=want)
    fast = den.with_net(pair.fast)
    lines = _lines(rows, _steps(fast, size, run, given, at=want, finite=False), want, each, outputs, pair.bound)
    *_, shares = _shares(rows, want, outputs, carried=True)
    images = _steps(fast, size, run, given, finite=False)[-1]
    return Report(how, (*lines, Line("all steps", _errors(images, want[-1], free[-1], shares, pair.bound)[:1])))


def _lines(
    rows: np.ndarray[Any, Any],
    fast: Sequence[Picture],
    want: Sequence[Picture],
    wide: Sequence[Picture],
    outputs: Sequence[Tensor],
    bound: float,
) -> Iterator[Line]:
    """One a step, all of which started where the plain network's did."""
    t = rows[:-1][rows[:-1, row.END] == 1, row.T]
    for i, shares in enumerate(_shares(rows, want, outputs, carried=False)):
        yield Line(f"step {i}, t = {t[i]:g}", _errors(fast[i], want[i], wide[i], shares, bound))


def _errors(
    seen: Picture, want: Picture, wide: Picture, shares: tuple[float, float], bound: float
) -> tuple[Error, Error]:
    """Of x and x0; twice the errors of the plain network against the wide one are allowed besides."""
    x, x0 = (
        error(name, a, w, bound * share + 2 * error(name, p, w).relative)
        for name, a, p, w, share in zip(("x", "x0"), seen, want, wide, shares, strict=True)
    )
    return x, x0


def _narrow(den: Denoiser) -> bool:
    """Whether the network's own arithmetic is far from float32's: 16 bits, or TF32's products on a GPU."""
    products = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return den.dtype in (torch.float16, torch.bfloat16) or (den.device.type == "cuda" and any(products))


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Float32 is float32 on GPUs too."""
    places: tuple[Any, Any] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    were = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, was in zip(places, were, strict=True):
            place.allow_tf32 = was


def _steps(
    den: Denoiser,
    shape: Sequence[int],
    run: Run,
    given: dict[str, Any],
    *,
    at: Sequence[Picture] | None = None,
    finite: bool = True,
) -> list[Picture]:
    """What a run shows after each step. at: where each next step starts, else where the last one ended.

    finite: whether it may raise FloatingPointError; what is not finite in the fused path alone is a finding.
    """
    seen: list[Picture] = []

    def look(i: int, x: Tensor, x0: Tensor) -> Tensor | None:
        seen.append((x, x0))
        return None if at is None else at[i][0]

    allowed = contextlib.nullcontext() if finite else contextlib.suppress(FloatingPointError)
    with allowed, Sampler(den, shape, run) as sampler:
        sampler(each=look, **given)
    return seen


@contextlib.contextmanager
def _watched(net: Any) -> Iterator[list[Tensor]]:
    """What a module gives, call by call, as long as the block lasts; nothing of a plain function."""
    seen: list[Tensor] = []
    if not isinstance(net, nn.Module):
        yield seen
        return
    hook = net.register_forward_hook(lambda _, __, F: seen.append(F.detach()))
    try:
        yield seen
    finally:
        hook.remove()


def _shares(
    rows: np.ndarray[Any, Any], pictures: Sequence[Picture], outputs: Sequence[Tensor], *, carried: bool
) -> Iterator[tuple[float, float]]:
    """For x and x0 of each step: what an error of 1 in every F comes to, relative to them, and at least 1.

        e0 = |C_OUT| f + |C_SKIP| e,   e' = |B0 C_OUT + BF| f + |A + B0 C_SKIP| e + |B1| e1 + |B2| e2 + |B3| e3

    f is the root mean square of F, times |W| + |1 - W|; 1 where F was not seen. carried: e goes on from step to step,
    else each step starts at an x without error. From nearly pure noise eps-prediction
    has e' of about alpha_{k+1}/alpha_k: a small error of eps is a large one of x0.
    """
    e, slots, i = 0.0, np.zeros(row.SLOTS), 0
    for k, r in enumerate(rows[:-1]):
        x, x0 = pictures[i]
        f = _size(outputs[k][:, : x.shape[1]]) if len(outputs) == len(rows) - 1 else 1.0
        f *= abs(r[row.W]) + abs(1 - r[row.W])
        e0 = abs(r[row.C_OUT]) * f + abs(r[row.C_SKIP]) * e
        history = float(np.abs(r[[row.B1, row.B2, row.B3]]) @ slots)
        if r[row.P] or r[row.Q]:
            slots[int(r[row.SLOT])] = abs(r[row.P]) * e + abs(r[row.Q]) * e0
        e = abs(r[row.B0] * r[row.C_OUT] + r[row.BF]) * f + abs(r[row.A] + r[row.B0] * r[row.C_SKIP]) * e + history
        if r[row.END] == 1:
            yield max(1.0, e / max(_size(x), 1e-30)), max(1.0, e0 / max(_size(x0), 1e-30))
            e, i = e if carried else 0.0, i + 1


def _size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
