"""Description of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import ops
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
    "threads": (1, 2, 3),
}


def _inputs(cell: Cell, g: torch.Generator) -> Args:
    n, tokens, depth = cell["shape"]
    width = cell["heads"] * depth
    qkv = numbers((n, tokens, 3 * width), cell["regime"], torch.float32, g)
    qkv[..., :width] *= cell["times"]
    return {"qkv": laid(qkv, cell["layout"]), "heads": cell["heads"], "threads": cell["threads"]}


def _call(args: Args) -> Outputs:
    with _on(args["threads"]):
        return {"y": ops.attention(args["qkv"], args["heads"])}


def _oracle(args: Args) -> Outputs:
    return {"y": oracle.attention(args["qkv"], args["heads"])}


def _slack(args: Args, wanted: Outputs) -> dict[str, Tensor]:
    """An ulp of the largest value: what comes out is their mean, of which PyTorch's may be lucky."""
    return {"y": 0.12 * by_row(args["qkv"].chunk(3, 2)[2].double().abs())}


def _forms(args: Args, got: Outputs) -> list[str]:
    y = got["y"]
    right = y.dtype == torch.float32 and y.is_contiguous()
    return [] if right else [f"y is {y.dtype} with strides {y.stride()}, not contiguous"]


DESCRIPTIONS = {
    "attention": Description("attention", _ATTENTION, _inputs, _call, _oracle, _forms, _slack, least=90, seed=11),
}
