"""Description of norm_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import pack_linear
from fastdiff.ops.norm_linear import projected
from tests.ops import oracle
from tests.ops.describe import Args, Description, Outputs, by_row, laid, numbers
from tests.ops.describe_conv import _on
from tests.ops.pairwise import Cell

_LINEAR = {
    # N, tokens, channels, outputs
    "shape": (
        *((2, 1, 1, 1), (3, 5, 7, 33), (0, 4, 8, 8), (2, 77, 64, 40), (1, 130, 100, 70), (3, 16, 512, 20)),
        *((2, 1, 65, 32), (1, 150, 17, 5), (5, 1, 130, 48), (1, 260, 2049, 340)),
    ),
    "gate": (False, True),
    "norm": (None, "plain", "weight", "bias", "both"),
    "layout": ("contiguous", "cropped", "padded", "transposed", "unaligned", "expanded", "shared", "every second"),
    "regime": ("plain", "offset", "tiny", "huge", "constant", "nan", "inf"),
    "bias": (True, False),
    "residual": (None, "contiguous", "cropped", "transposed"),
    "eps": (1e-5, 1e-6, 1e-3),
    "packed": (False, True),
    "threads": (1, 2, 3),
}


def _inputs(cell: Cell, g: torch.Generator) -> Args:
    n, tokens, channels, outputs = cell["shape"]
    rows = outputs * (2 if cell["gate"] else 1)
    x = numbers((n, tokens, channels), cell["regime"], torch.float32, g)
    weight, bias = torch.randn((rows, channels), generator=g) / channels**0.5, torch.randn(rows, generator=g)
    affine, residual = torch.randn(2, channels, generator=g), torch.randn((n, tokens, outputs), generator=g)
    return {
        **{"x": laid(x, cell["layout"]), "weight": weight, "bias": bias if cell["bias"] else None},
        "norm": cell["norm"] is not None,
        "norm_weight": affine[0] if cell["norm"] in ("weight", "both") else None,
        "norm_bias": affine[1] if cell["norm"] in ("bias", "both") else None,
        "residual": None if cell["residual"] is None else laid(residual, cell["residual"]),
        **{k: cell[k] for k in ("eps", "gate", "packed", "threads")},
    }


def _of_op(args: Args) -> Args:
    return {k: v for k, v in args.items() if k not in ("packed", "threads")}


def _call(args: Args) -> Outputs:
    own = _of_op(args)
    with _on(args["threads"]):
        if not args["packed"]:
            return {"y": ops.norm_linear(**own)}
        x, weight, bias = (own.pop(k) for k in ("x", "weight", "bias"))
        return {"y": projected(x, pack_linear(weight, gate=own.pop("gate")), bias, **own)}


def _oracle(args: Args) -> Outputs:
    return {"y": oracle.norm_linear(**_of_op(args))}


def _slack(args: Args, wanted: Outputs) -> dict[str, Tensor]:
    """In millionths: an ulp or two of the sums of all magnitudes, of which PyTorch's may be lucky."""
    own = _of_op(args) | {"residual": None}
    h = oracle.layer_norm(own["x"], *(own[k] for k in ("norm", "norm_weight", "norm_bias", "eps")))
    sums = h.abs() @ own["weight"].double().abs().mT
    if not own["gate"]:
        return {"y": 0.2 * by_row(sums)}
    y = oracle.norm_linear(**own | {"gate": False})
    (a, g), (of_a, of_g) = y.abs().chunk(2, 2), sums.chunk(2, 2)
    return {"y": 0.2 * by_row(of_a * g + a * of_g + a * g)}


def _forms(args: Args, got: Outputs) -> list[str]:
    y = got["y"]
    right = y.dtype == torch.float32 and y.is_contiguous()
    return [] if right else [f"y is {y.dtype} with strides {y.stride()}, not contiguous"]


DESCRIPTIONS = {
    "norm_linear": Description("norm_linear", _LINEAR, _inputs, _call, _oracle, _forms, _slack, least=100, seed=13),
}
