"""Descriptions of group_norm_silu, inject and time_embed, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import ops
from tests.ops import oracle
from tests.ops.describe import FLOATS, LAYOUTS, REGIMES, Args, Description, Outputs, laid, numbers
from tests.ops.pairwise import Cell

# N, C1, C2 (0: one tensor), spatial, groups
ALONE = (3, 1, 0, (1, 1), 1)
NORMED = (
    *((0, 8, 0, (4, 4), 2), (2, 8, 0, (0, 4), 2), ALONE, (1, 4, 0, (1, 1), 2), (2, 12, 0, (5, 7), 3)),
    *((3, 8, 0, (11,), 4), (2, 6, 0, (3, 4, 2), 2), (2, 20, 0, (37, 29), 2), (1, 7, 0, (13, 13), 7)),
    *((2, 5, 7, (4, 6), 3), (2, 24, 8, (8, 8), 8), (1, 64, 0, (32, 33), 8), (1, 30, 30, (9, 5), 2)),
    *((1, 3, 0, (1031,), 1), (2, 40, 0, (16, 16), 1), (5, 48, 0, (2, 3), 4), (1, 11, 13, (17, 4), 2)),
    (1, 2, 0, (129, 131), 1),
)
PER_CHANNEL = (None, "channel", "image", "half")
"""A parameter: not there, (C,), (N, C), or (N, C) as a slice of (N, 2C), which is how embeddings come."""


def _parameter(kind: str | None, n: int, channels: int, dtype: torch.dtype, g: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    if kind == "channel":
        return torch.randn(channels, generator=g).to(dtype)
    both = torch.randn(n, 2 * channels, generator=g).to(dtype)
    return both[:, channels:] if kind == "half" else both[:, :channels].contiguous()


def _options(cell: Cell, n: int, channels: int, g: torch.Generator) -> Args:
    dtype = torch.float32 if cell["parameters"] == "fp32" else cell["dtype"]
    return {k: _parameter(cell[k], n, channels, dtype, g) for k in ("add", "scale", "shift")}


_NORM = {
    "spec": NORMED,
    "dtype": FLOATS,
    "layout": LAYOUTS,
    "layout2": ("contiguous", "channels_last", "cropped", "padded_last"),
    "regime": REGIMES,
    "affine": ("both", "none", "weight", "bias", "slices"),
    "parameters": ("fp32", "as x"),
    "add": PER_CHANNEL,
    "scale": PER_CHANNEL,
    "shift": PER_CHANNEL,
    "act": (True, False),
    "eps": (1e-5, 1e-6, 1e-3),
}


def _norm_inputs(cell: Cell, g: torch.Generator) -> Args:
    n, c1, c2, space, groups = cell["spec"]
    channels, dtype = c1 + c2, torch.float32 if cell["parameters"] == "fp32" else cell["dtype"]
    z = numbers((n, channels, *space), cell["regime"], cell["dtype"], g)
    affine = torch.randn(2, 3 * channels, generator=g).to(dtype)
    weight, bias = (v[::3] if cell["affine"] == "slices" else v[:channels] for v in affine)
    return {
        **{"x": laid(z[:, :c1], cell["layout"]), "groups": groups},
        "weight": weight if cell["affine"] in ("both", "weight", "slices") else None,
        "bias": bias if cell["affine"] in ("both", "bias", "slices") else None,
        "x2": laid(z[:, c1:], cell["layout2"]) if c2 else None,
        **_options(cell, n, channels, g),
        **{"act": cell["act"], "eps": cell["eps"]},
    }


RESIDUALS = (None, "same", "x itself", "other layout", "cropped", *FLOATS)
"""None; x itself; laid as x is, in x's dtype or a named one; in x's dtype, otherwise laid."""


def _residual(kind: str | torch.dtype | None, x: Tensor, cell: Cell, g: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    if kind == "x itself":
        return x
    v = numbers(x.shape, cell["regime"], kind if isinstance(kind, torch.dtype) else x.dtype, g)
    layout = "contiguous" if _keeps_last(x) else "channels_last"
    return laid(v, {"other layout": layout, "cropped": "cropped"}.get(str(kind), cell["layout"]))


_INJECT = {
    "shape": (
        *((0, 3, 4, 4), (2, 3, 0, 4), (1, 1, 1, 1), (3, 2, 5, 7), (2, 3, 37, 29), (1, 4, 16, 16), (2, 5, 1031)),
        *((5, 7, 11, 13), (2, 2, 3, 5, 3), (2, 67, 3, 3), (1, 2, 129, 131)),
    ),
    **{k: _NORM[k] for k in ("dtype", "layout", "regime", "parameters", "add", "scale", "shift", "act")},
    "residual": RESIDUALS,
}


def _inject_inputs(cell: Cell, g: torch.Generator) -> Args:
    x = laid(numbers(cell["shape"], cell["regime"], cell["dtype"], g), cell["layout"])
    residual = _residual(cell["residual"], x, cell, g)
    return {"x": x, **_options(cell, *cell["shape"][:2], g), "residual": residual, "act": cell["act"]}


def _keeps_last(x: Tensor) -> bool:
    """Dense channels_last and not also contiguous: such an x gives such a result."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous()


def _norm_forms(args: Args, got: Outputs) -> list[str]:
    x, y = args["x"], got["y"]
    plain = torch.empty(y.shape, device="meta")
    wanted = plain.movedim(1, -1).contiguous().movedim(-1, 1) if _keeps_last(x) else plain
    right = y.dtype == x.dtype and (y.stride() == wanted.stride() or not y.numel())
    return [] if right else [f"y is {y.dtype} with strides {y.stride()}, not {x.dtype} with {wanted.stride()}"]


def _gradients(function: Callable[..., Tensor], args: Args, wide: bool) -> Outputs:
    """Gradients of sum(cotangent y) with respect to every tensor that the cell differentiates by."""
    rest = {k: v for k, v in args.items() if k not in ("cotangent", "wanted")}
    leaves = {k: args[k].detach() for k in args["wanted"] if args[k] is not None}
    leaves = {k: (v.double() if wide else v).requires_grad_() for k, v in leaves.items()}
    y = function(**(rest | leaves))
    found = torch.autograd.grad(y, list(leaves.values()), args["cotangent"].to(y.dtype))
    # a parameter's gradient is one array: its largest number sets the size of the rounding, as in an image
    return {k: v[None] if v.ndim == 1 else v for k, v in zip(leaves, found, strict=True)}


def _backward(inputs: Callable[[Cell, torch.Generator], Args]) -> Callable[[Cell, torch.Generator], Args]:
    def made(cell: Cell, g: torch.Generator) -> Args:
        args = inputs(cell, g)
        channels = args["x"].shape[1] + (0 if args.get("x2") is None else args["x2"].shape[1])
        dy = torch.randn((len(args["x"]), channels, *args["x"].shape[2:]), generator=g).to(cell["dtype"])
        names = {
            "all": ("x", "x2", "residual", "weight", "bias", "add", "scale", "shift"),
            "images": ("x", "x2", "residual"),
            "parameters": ("weight", "bias", "add", "scale", "shift"),
        }[cell["by"]]
        tensors = [k for k in names if args.get(k) is not None] or ["x"]
        return args | {"cotangent": laid(dy, cell["cotangent"]), "wanted": tensors}

    return made


def _gradient_dtypes(args: Args, got: Outputs) -> list[str]:
    return [f"d{k} is {v.dtype}, not {args[k].dtype}" for k, v in got.items() if v.dtype != args[k].dtype]


_BACKWARD = {"cotangent": LAYOUTS, "by": ("all", "images", "parameters")}
# over one number nothing is left of a gradient but the rounding of numbers that cancel; it has a test of its own
_SEVERAL = tuple(spec for spec in NORMED if spec != ALONE)


_TIMES = ("steps", "fractions", "huge", "negative", "none", "one", "expanded", "sliced", "nan")
_TIME_EMBED = {
    "t": _TIMES,
    "t_dtype": (torch.int64, torch.float32, torch.int32, torch.bfloat16),
    "dim": (4, 5, 7, 64, 129, 320, 1026, 2061),
    "max_period": (10000.0, 100.0),
    "flip": (False, True),
    "shift": (0.0, 1.0, 0.5),
    "scale": (1.0, 1000.0, 0.25),
    "dtype": (None, *FLOATS),
}


def _time_embed_inputs(cell: Cell, g: torch.Generator) -> Args:
    kind, dtype = cell["t"], cell["t_dtype"]
    count = {"none": 0, "one": 1}.get(kind, 11)
    t = torch.randint(0, 1000, (count,), generator=g).double()
    if kind == "fractions" and dtype.is_floating_point:
        t = torch.rand(count, generator=g).double()
    if kind == "huge":
        t = 1e4 * t
    if kind == "negative":
        t = -t
    t = t.to(dtype)
    if kind == "nan" and dtype.is_floating_point:
        t[-1] = torch.nan
    if kind == "expanded":
        t = t[:1].expand(count)
    if kind == "sliced":
        t = torch.stack([t, t], 1)[:, 1]
    return {"t": t, **{k: cell[k] for k in ("dim", "max_period", "flip", "shift", "scale", "dtype")}}


def _time_embed_forms(args: Args, got: Outputs) -> list[str]:
    e, dtype = got["e"], args["dtype"] or torch.float32
    right = e.dtype == dtype and e.is_contiguous()
    return [] if right else [f"e is {e.dtype} with strides {e.stride()}, not dense {dtype}"]


DESCRIPTIONS = {
    "group_norm_silu": Description(
        "group_norm_silu", _NORM, _norm_inputs,
        lambda args: {"y": ops.group_norm_silu(**args)},
        lambda args: {"y": oracle.group_norm_silu(**args)},
        _norm_forms, least=190, seed=5),
    "group_norm_silu backward": Description(
        "group_norm_silu", {**_NORM, **_BACKWARD, "spec": _SEVERAL}, _backward(_norm_inputs),
        lambda args: _gradients(ops.group_norm_silu, args, wide=False),
        lambda args: _gradients(oracle.group_norm_silu, args, wide=True),
        _gradient_dtypes, factor=3.0, least=190, seed=6),
    "inject": Description(
        "inject", _INJECT, _inject_inputs,
        lambda args: {"y": ops.inject(**args)},
        lambda args: {"y": oracle.inject(**args)},
        _norm_forms, least=100, seed=7),
    "inject backward": Description(
        "inject", {**_INJECT, **_BACKWARD}, _backward(_inject_inputs),
        lambda args: _gradients(ops.inject, args, wide=False),
        lambda args: _gradients(oracle.inject, args, wide=True),
        _gradient_dtypes, factor=3.0, least=100, seed=8),
    "time_embed": Description(
        "time_embed", _TIME_EMBED, _time_embed_inputs,
        lambda args: {"e": ops.time_embed(**args)},
        lambda args: {"e": oracle.time_embed(**args)},
        _time_embed_forms, least=60, seed=9),
}  # fmt: skip
