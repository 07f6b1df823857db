"""Descriptions of attention: of all tokens to all, and to those of another tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.attention import attended
from fastdiff.ops.norm_silu_conv import moments_ref
from tests.ops import oracle
from tests.ops.describe import Args, Description, Outputs, by_row, laid, numbers
from tests.ops.describe_conv import _on
from tests.ops.pairwise import Cell

_ATTENTION = {
    # N, tokens, channels of a head
    "shape": (
        *((2, 1, 5), (3, 5, 1), (2, 16, 32), (0, 9, 8), (3, 33, 3), (2, 49, 24), (1, 100, 40), (2, 70, 64)),
        *((2, 130, 33), (3, 20, 100)),
    ),
    "heads": (1, 2, 3),
    "layout": ("contiguous", "cropped", "padded", "transposed", "unaligned", "expanded", "shared"),
    "regime": ("plain", "tiny", "constant", "nan", "inf"),
    # of the scores: the largest are far over what exp can take
    "times": (1.0, 0.01, 60.0),
    # as the parts of one tensor, or as three tensors in that order
    "parts": (None, "qkv", "qvk"),
    "residual": (None, "contiguous", "cropped", "transposed"),
    "measure": (False, True),
    "threads": (1, 2, 3),
}

_ACROSS = {
    # N, tokens, keys, channels of a head
    "shape": (
        *((2, 1, 1, 5), (3, 5, 1, 1), (2, 1, 77, 40), (0, 9, 4, 8), (3, 33, 7, 3), (2, 7, 33, 24), (1, 100, 77, 40)),
        *((2, 70, 16, 64), (1, 9, 600, 20), (3, 20, 31, 100), (2, 65, 32, 80)),
    ),
    "heads": (1, 2, 3),
    "q": ("contiguous", "cropped", "padded", "transposed", "unaligned", "shared"),
    # k and v: two halves of one tensor, or two of their own
    "kv": ("halves", "contiguous", "cropped", "transposed", "unaligned", "expanded", "shared"),
    "regime": ("plain", "tiny", "constant", "nan", "inf"),
    "times": (1.0, 0.01, 60.0),
    "residual": (None, "contiguous", "transposed"),
    "measure": (False, True),
    "threads": (1, 2, 3),
}


def _inputs(cell: Cell, g: torch.Generator) -> Args:
    n, tokens, depth = cell["shape"]
    width = cell["heads"] * depth
    qkv = numbers((n, tokens, 3 * width), cell["regime"], torch.float32, g)
    qkv[..., :width] *= cell["times"]
    residual = torch.randn((n, tokens, width), generator=g)
    return {
        "qkv": laid(qkv, cell["layout"]),
        "residual": None if cell["residual"] is None else laid(residual, cell["residual"]),
        **{k: cell[k] for k in ("heads", "parts", "measure", "threads")},
    }


def _inputs_across(cell: Cell, g: torch.Generator) -> Args:
    n, tokens, keys, depth = cell["shape"]
    width = cell["heads"] * depth
    q = numbers((n, tokens, width), cell["regime"], torch.float32, g) * cell["times"]
    kv = numbers((n, keys, 2 * width), cell["regime"], torch.float32, g)
    halves = kv.chunk(2, 2)
    k, v = halves if cell["kv"] == "halves" else (laid(half.contiguous(), cell["kv"]) for half in halves)
    residual = torch.randn((n, tokens, width), generator=g)
    return {
        **{"q": laid(q, cell["q"]), "keys": k, "values": v},
        "residual": None if cell["residual"] is None else laid(residual, cell["residual"]),
        **{name: cell[name] for name in ("heads", "measure", "threads")},
    }


def _split(args: Args) -> tuple[Tensor, ...]:
    if "q" in args:
        return args["q"], args["keys"], args["values"]
    q, k, v = args["qkv"].chunk(3, 2)
    return (q, v, k) if args["parts"] == "qvk" else (q, k, v)


def _outputs(y: Tensor, moments: Tensor) -> Outputs:
    return {"y": y, "mean": moments[..., 0], "deviation": moments[..., 1].sqrt()}


def _call(args: Args) -> Outputs:
    heads, residual = args["heads"], args["residual"]
    with _on(args["threads"]):
        if "qkv" in args and args["parts"] is None and residual is None and not args["measure"]:
            y = ops.attention(args["qkv"], heads)
            return _outputs(y, moments_ref(y.mT))
        q, k, v = _split(args)
        y, moments = attended(q, k, v, heads, residual, measure=args["measure"])
    return _outputs(y, moments if args["measure"] else moments_ref(y.mT))


def _oracle(args: Args) -> Outputs:
    q, k, v = _split(args)
    y = oracle.attended(q, k, v, args["heads"], args["residual"])
    return _outputs(y, moments_ref(y.mT))


def _slack(args: Args, wanted: Outputs) -> dict[str, Tensor]:
    """An ulp of the largest value: what comes out is their mean, of which PyTorch's may be lucky.

    Moments are sums in float32 about one of the numbers.
    """
    value = 0.12 * by_row(_split(args)[2].double().abs())
    value = value if args["residual"] is None else value + 0.12 * by_row(args["residual"].double().abs())
    of_moments = value + 4.0 * by_row(wanted["deviation"])
    return {"y": value, "mean": of_moments, "deviation": of_moments}


def _forms(args: Args, got: Outputs) -> list[str]:
    y = got["y"]
    right = y.dtype == torch.float32 and y.is_contiguous()
    return [] if right else [f"y is {y.dtype} with strides {y.stride()}, not contiguous"]


DESCRIPTIONS = {
    "attention": Description("attention", _ATTENTION, _inputs, _call, _oracle, _forms, _slack, least=90, seed=11),
    "attention across": Description(
        "attention", _ACROSS, _inputs_across, _call, _oracle, _forms, _slack, least=60, seed=12
    ),
}
