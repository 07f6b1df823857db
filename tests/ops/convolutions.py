"""Cases of norm_silu_conv, their arguments, and how far a result may be from float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops.norm_silu_conv import convolved, norm_silu_conv_ref, pack, result_shape
from tests.ops import oracle

LAST, PLAIN = torch.channels_last, torch.contiguous_format
NUMBERS = ("norm_weight", "norm_bias", "scale", "shift", "add", "bias", "residual")
STEPS = {"upsample": False, "stride": 1, "asymmetric": False}
KINDS: dict[str, dict[str, Any]] = {
    "1x1": {},
    "3x3": {},
    "up": {"upsample": True},
    "half": {"stride": 2},
    "asymmetric": {"stride": 2, "asymmetric": True},
}


class Case(NamedTuple):
    kind: str = "3x3"
    shape: tuple[int, ...] = (2, 12, 9, 7)  # of x and x2 together
    outputs: int = 8
    groups: int = 0
    split: int = 0  # channels of x, the others are x2's; 0 is no x2
    given: tuple[str, ...] = ("bias",)  # of NUMBERS
    per_image: bool = False  # scale, shift and add by image
    act: bool = True
    mean: float = 0.0
    last: bool = True

    @property
    def winograd(self) -> bool:
        return self.kind in ("3x3", "up") and self.outputs > 7  # fewer are multiplied by all taps at once


def arguments(case: Case, seed: int = 0) -> dict[str, Any]:
    """Arguments of `norm_silu_conv` by name, in float32; weights of results about as large as h."""
    g = torch.Generator().manual_seed(seed)
    n, channels = case.shape[:2]
    size, form = 1 if case.kind == "1x1" else 3, LAST if case.last else PLAIN
    z = torch.randn(case.shape, generator=g) + case.mean
    first = case.split or channels
    parts = [p.clone(memory_format=form) for p in (z[:, :first], z[:, first:])]
    weight = torch.randn(case.outputs, channels, size, size, generator=g) / (channels * size**2) ** 0.5
    args = {"x": parts[0], "weight": weight, "bias": None, "x2": parts[1] if case.split else None}
    args |= {"groups": case.groups, "act": case.act, **KINDS[case.kind]}
    for name in case.given:
        count = case.outputs if name in ("bias", "add") else channels
        by_image = case.per_image and name in ("scale", "shift", "add")
        args[name] = torch.randn((n, count) if by_image else (count,), generator=g)
    if "residual" in case.given:
        shape = result_shape(args["x"], case.outputs, size, **{k: args.get(k, default) for k, default in STEPS.items()})
        args["residual"] = torch.randn(shape, generator=g).contiguous(memory_format=form)
    return args


def run(args: dict[str, Any], *, measure: bool = False, **more: Any) -> tuple[Tensor, Tensor]:
    """Result and moments on the backend in force."""
    rest = {k: v for k, v in (args | more).items() if k not in ("x", "weight", "bias")}
    return convolved(args["x"], pack(args["weight"]), args["bias"], **rest, measure=measure)


def exact(args: dict[str, Any]) -> Tensor:
    return oracle.norm_silu_conv(**args)


def plain(args: dict[str, Any]) -> Tensor:
    """What PyTorch makes of it in the dtype of the arguments."""
    packed = pack(args["weight"])
    rest = {k: v for k, v in args.items() if k not in ("x", "weight", "bias")}
    return norm_silu_conv_ref(args["x"], *packed, args["bias"], **rest)[0]


def far(y: Tensor, wanted: Tensor) -> float:
    """The largest |y - wanted| / |wanted| of an image."""
    if not wanted.numel():
        return 0.0
    return float(((y.double() - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max())


def complaint(case: Case, args: dict[str, Any], y: Tensor) -> str | None:
    """What is wrong with a result.

    Winograd: an error over 1e-5 of the result's norm. Others: over twice PyTorch's own largest and an ulp; behind a
    norm two ulps, for its moments are sums of their own.
    """
    wanted = exact(args)
    if y.shape != wanted.shape or (y.numel() and not y.is_contiguous(memory_format=LAST)):
        return f"y is {tuple(y.shape)} with strides {y.stride()}, not {tuple(wanted.shape)}, channels_last"
    if not y.numel():
        return None
    error = far(y, wanted)
    if case.winograd:
        return None if error <= 1e-5 else f"error {error:.1e}"
    if not error <= 1e-6:
        return f"error {error:.1e}"
    ours, theirs = (float((v.double() - wanted).abs().max()) for v in (y, plain(args)))
    bound = 2 * theirs + (2 if case.groups else 1) * 2**-23 * float(wanted.abs().max())
    return None if ours <= bound else f"error {ours:.1e}, PyTorch's {theirs:.1e}, bound {bound:.1e}"
