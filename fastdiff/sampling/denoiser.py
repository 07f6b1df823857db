"""A network with what one must know to read its output: the schedule and what it predicts.

x0 = c_skip x + c_out F,   F = net(c_in x, told(t), cond),   eps = (x - alpha x0) / sigma,   score = -eps / sigma
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.nn.prepare import Tactics, prepare
from fastdiff.sampling.forward import host_times, per_image, told_times
from fastdiff.sampling.guidance import Cond
from fastdiff.tables.predict import PREDICTS, predict
from fastdiff.tables.schedule import Schedule

Net = Callable[..., Tensor]
"""net(x, t, cond) -> F: x (N, C, *spatial), t (N,), F (N, C or 2C, *spatial)."""

_RANGE = "+range"


class Denoiser:
    """`net`, any callable net(x, t, cond), read through `schedule` and `predicts`.

    predicts: "eps", "x0", "v", "flow", "edm", "score" or "mean"; "eps+range" where the network's second half of
    channels is Nichol & Dhariwal's v of a learned variance. defaults: what `fd.sample` uses where its caller says
    nothing (solver, steps, spacing, clip, ...). null: the condition that means "none", a tensor or a function of cond,
    where the network has no `null` of its own. meta: facts about the data, "shape" and "classes" among them. device:
    where a network without parameters computes. Raises ValueError.
    """

    def __init__(
        self,
        net: Net,
        schedule: Schedule,
        predicts: str = "eps",
        *,
        sigma_data: float = 0.5,
        defaults: Mapping[str, Any] | None = None,
        null: Cond = None,
        meta: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if predicts.removesuffix(_RANGE) not in PREDICTS:
            raise ValueError(
                f"predicts={predicts!r} is unknown; accepted: {', '.join(PREDICTS)}, each also with {_RANGE}"
            )
        if not callable(net):
            raise TypeError(f"net must be a callable net(x, t, cond), got {type(net).__name__}")
        self.net, self.schedule, self.predicts, self.sigma_data = net, schedule, predicts, sigma_data
        self.defaults, self.meta = dict(defaults or {}), dict(meta or {})
        self.own_null, self._device = null, device

    def __repr__(self) -> str:
        return f"Denoiser({type(self.net).__name__}, {self.schedule.name}, predicts={self.predicts!r})"

    @property
    def variance(self) -> str | None:
        """The kind of variance that the network also gives: None or "range"."""
        return "range" if self.predicts.endswith(_RANGE) else None

    def with_net(self, net: Net) -> Denoiser:
        """The same reading of another network: averaged weights, a compiled or wrapped one."""
        return Denoiser(
            net,
            self.schedule,
            self.predicts,
            sigma_data=self.sigma_data,
            defaults=self.defaults,
            null=self.own_null,
            meta=self.meta,
            device=self._device,
        )

    def prepare(
        self,
        *,
        dtype: torch.dtype | None = None,
        tactics: Tactics | None = None,
        exact: bool = False,
        follow: bool = True,
    ) -> Denoiser:
        """The same reading of the network packed for inference, in `dtype` (None: its own), see `fastdiff.nn.prepare`.

        exact: without Winograd's convolutions, which CPUs get otherwise in float32: only rounding differs then.
        follow=False: it does not follow the network, and holds nothing of it. Raises TypeError for a network that is no
        fastdiff.UNet: `fd.patch(net)` fuses the norms of any module.
        """
        net: Any = self.net
        return self.with_net(prepare(net, dtype=dtype, tactics=tactics, exact=exact, follow=follow))

    def _like(self) -> Tensor | None:
        parameters = self.net.parameters() if isinstance(self.net, torch.nn.Module) else ()
        return next((p for p in parameters if p.is_floating_point()), None)

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are; for a plain function what it was said to be, else the CPU."""
        like = self._like()
        return torch.device(self._device or "cpu") if like is None else like.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the network's parameters, which its input is given in; None for a plain function."""
        like = self._like()
        return None if like is None else like.dtype

    @property
    def channels_last(self) -> bool:
        """Whether the network's convolutions hold their weights in channels_last, and so want their input."""
        parameters = self.net.parameters() if isinstance(self.net, torch.nn.Module) else ()
        weight = next((p for p in parameters if p.ndim == 4 and min(p.shape[1:]) > 1), None)
        return weight is not None and weight.stride(1) == 1

    def null(self, cond: Cond, given: Cond = None) -> Cond:
        """The condition that means "none", shaped like cond: `given`, else the Denoiser's, else the network's own."""
        for null in (given, self.own_null, getattr(self.net, "null", None)):
            if null is not None:
                return null(cond) if callable(null) else null
        raise ValueError(
            "guidance: this network names no null condition; pass fd.cfg(w, null=...) or fd.Denoiser(..., null=...)"
        )

    def _columns(self, x: Tensor, t: Tensor | float) -> tuple[np.ndarray[Any, Any], ...]:
        """(t, alpha, sigma) in float64 on the host, one line an image."""
        times = host_times(t, len(x))
        return times, self.schedule.alpha(times), self.schedule.sigma(times)

    def x0(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """E[x0 given x_t = x] as the network sees it, (N, C, *spatial); t (N,) or a number, in the schedule's units."""
        times, alpha, sigma = self._columns(x, t)
        kind = self.predicts.removesuffix(_RANGE)
        if kind == "mean" and self.schedule.T is None:
            raise ValueError("x0 of a network that predicts the mean needs a discrete schedule, whose t - 1 is a step")
        previous = (self.schedule.alpha(times - 1), self.schedule.sigma(times - 1)) if kind == "mean" else None
        numbers = predict(kind, alpha, sigma, sigma_data=self.sigma_data, previous=previous)
        c_in, c_skip, c_out = (per_image(c, x) for c in numbers)
        told = told_times(self.schedule, self.schedule.told(times)).to(x.device)
        F = self.net((c_in * x).to(self.dtype or x.dtype), told, cond)
        return c_skip * x + c_out * F[:, : x.shape[1]].to(x.dtype)

    def eps(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The noise that the network sees in x, (x - alpha x0) / sigma."""
        _, alpha, sigma = self._columns(x, t)
        return (x - per_image(alpha, x) * self.x0(x, t, cond)) / per_image(sigma, x)

    def score(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The gradient of log p_t at x, -eps / sigma (Vincent 2011; Song 2021)."""
        _, _, sigma = self._columns(x, t)
        return -self.eps(x, t, cond) / per_image(sigma, x)
