"""Rows made ready for a device, and one of them applied to a state by the fused step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff import row
from fastdiff.formats.diffusers.calls import Ask
from fastdiff.formats.diffusers.config import Reading
from fastdiff.formats.diffusers.grid import IN_ALPHA, Laid, index_in
from fastdiff.ops import step_
from fastdiff.tables.curve import Array
from fastdiff.tables.predict import predict


class Program:
    """Rows of calls `begin`, `begin` + 1, ..., and their copies on devices."""

    def __init__(self, rows: Array, begin: int) -> None:
        self.rows, self.begin = rows, begin
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows in the device and dtype of x, and the row numbers there."""
        key = (x.device, x.dtype)
        if key not in self._copies:
            rows = torch.from_numpy(self.rows).to(device=x.device, dtype=x.dtype)
            self._copies[key] = rows, torch.arange(len(rows), device=x.device)
        return self._copies[key]


class Slots:
    """The history of a loop, allocated once for states of one shape."""

    def __init__(self) -> None:
        self.h: Tensor | None = None
        self._key: tuple[Tensor, Tensor] | None = None

    def of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (3, *x.shape), the images' numbers and a seed, which nobody reads: noise is given."""
        if self.h is None or self.h.shape[1:] != x.shape or self.h.dtype != x.dtype or self.h.device != x.device:
            self.h = torch.empty(row.SLOTS, *x.shape, dtype=x.dtype, device=x.device)
            self._key = None
        if self._key is None:
            self._key = (
                torch.zeros(len(x), dtype=torch.int64, device=x.device),
                torch.zeros(1, dtype=torch.int64, device=x.device),
            )
        return self.h, *self._key


class Stepped(NamedTuple):
    """What a step made: the state, and the image that the network saw in it."""

    x: Tensor
    x0: Tensor | None


def widened(x: Tensor) -> Tensor:
    """A dense copy to step in place: float64 stays, everything else is float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(wide, copy=True, memory_format=torch.contiguous_format)


def take(
    program: Program,
    call: int,
    slots: Slots,
    x: Tensor,
    F: Tensor,
    noise: Tensor | None,
    *,
    variance: str | None,
    show: bool,
) -> Stepped:
    """Row `call` of the program on x, in place; show: x0 too, clipped as the row says."""
    rows, ks = program.on(x)
    i = call - program.begin
    line = program.rows[i]
    h, index, seed = slots.of(x)
    written = line[row.Q] == 1 and line[row.P] == 0
    x0 = None
    if show and not written:
        x0 = image(x, F, line[row.C_SKIP], line[row.C_OUT])
        x0 = x0.clamp_(-line[row.CLIP], line[row.CLIP]) if np.isfinite(line[row.CLIP]) else x0
    if noise is not None:
        noise = noise.to(x)
    elif x.device.type != "cpu":
        # a row without noise reads none; it would be drawn where the device is not asked
        noise = x
    step_(x, None, h, F, rows, ks[i : i + 1], index, seed, variance=variance, noise=noise)
    if show and written:
        x0 = h[int(line[row.SLOT])].clone()
    return Stepped(x, x0)


def image(x: Tensor, F: Tensor, c_skip: float, c_out: float) -> Tensor:
    """c_skip x + c_out F, what the network says x0 is."""
    return F[:, : x.shape[1]].to(x).mul(float(c_out)).add_(x, alpha=float(c_skip))


def thresholded(x0: Tensor, ratio: float, largest: float) -> Tensor:
    """Dynamic thresholding: x0 clipped to +-s and divided by s, s the quantile `ratio` of |x0| of each image.

    s is at least 1 and at most `largest` (Saharia 2022, section 2.3).
    """
    s = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, largest)
    s = s.reshape(-1, *(1,) * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) / s


def take_thresholded(
    program: Program,
    call: int,
    slots: Slots,
    x: Tensor,
    F: Tensor,
    noise: Tensor | None,
    variance: str | None,
    reading: Reading,
    ask: Ask,
) -> Stepped:
    """As `take`, of rows that are told an image in the place of F: what the network says, thresholded."""
    line = program.rows[call - program.begin]
    _, c_skip, c_out = predict(reading.predicts.removesuffix("+range"), line[row.ALPHA], line[row.SIGMA])
    raw = image(x, F, float(c_skip), float(c_out))
    x0 = thresholded(raw, reading.keys["dynamic_thresholding_ratio"], reading.keys["sample_max_value"])
    # DDIM goes in the direction of the network's own output unless it is asked not to
    own = not ask.options.get("clipped_direction", True)
    told = torch.cat([raw if own else x0, F[:, x.shape[1] :].to(x)], 1)
    y = take(program, call, slots, x, told, noise, variance=variance, show=False).x
    return Stepped(y + float(line[row.B0]) * (x0 - raw) if own else y, x0)


def from_variance(F: Tensor, channels: int, line: Array) -> Tensor:
    """The network's own variance g, where rows read a fraction of a range in log s2: the v with s2 = g."""
    low, high = float(line[row.V0]), float(line[row.V1])
    if low == high:
        return F
    v = 2 * (F[:, channels : 2 * channels].log() - low) / (high - low) - 1
    return torch.cat([F[:, :channels], v], 1)


def per_image(values: Array, x: Tensor) -> Tensor:
    """(N,) numbers as (N, 1, ..., 1) in the dtype and on the device of x."""
    return torch.from_numpy(np.asarray(values)).to(x).reshape(-1, *(1,) * (x.ndim - 1))


def levels_at(reading: Reading, laid: Laid, told: Array, call: int | None, timesteps: Tensor) -> tuple[Array, Array]:
    """alpha and sigma (N,) at times of the schedule, or for classes that step over sigmas at these places of the grid.

    call: the call that is meant whatever the times are, where a pipeline has said where its loop starts.
    """
    t = timesteps.detach().double().cpu().reshape(-1).numpy()
    if reading.name in IN_ALPHA:
        return reading.schedule.alpha(t), reading.schedule.sigma(t)
    calls = [index_in(told, float(value), second=True) if call is None else call for value in t]
    step = laid.step[calls]
    return laid.levels.alpha[step], laid.levels.sigma[step]
