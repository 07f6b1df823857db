"""Description of norm_silu_conv."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import dispatch
from fastdiff.ops.norm_silu_conv import convolved, moments_ref
from tests.ops import oracle
from tests.ops.convolutions import KINDS
from tests.ops.describe import Args, Description, Outputs, by_row, laid, numbers
from tests.ops.describe_norm import PER_CHANNEL, _parameter
from tests.ops.pairwise import Cell

# N, C1, C2 (0: one tensor), spatial, groups
_SPECS = (
    *((0, 8, 0, (4, 4), 2), (3, 6, 0, (2, 2), 3), (2, 5, 7, (5, 6), 3), (3, 3, 0, (13, 9), 1), (5, 7, 0, (2, 3), 7)),
    *(
        (2, 17, 0, (9, 5), 1),
        (2, 9, 26, (4, 6), 5),
        (2, 4, 0, (6, 69), 2),
        (3, 2, 1, (10, 12), 1),
        (1, 132, 0, (5, 3), 4),
    ),
    *((2, 6, 0, (37, 3), 0), (3, 10, 3, (7, 8), 0), (2, 16, 16, (8, 8), 4)),
)
_CONV = {
    "spec": _SPECS,
    "kind": tuple(KINDS),
    "outputs": (1, 5, 17, 33),
    "layout": ("contiguous", "channels_last", "cropped", "padded_last", "transposed"),
    "layout2": ("contiguous", "channels_last", "sliced"),
    # NaN and Inf meet whole tiles of Winograd's: they have a test of their own
    "regime": ("plain", "offset", "tiny", "huge", "constant"),
    "affine": ("both", "none", "weight", "bias"),
    "bias": (True, False),
    "add": PER_CHANNEL,
    "scale": PER_CHANNEL,
    "shift": PER_CHANNEL,
    "act": (True, False),
    "eps": (1e-5, 1e-6, 1e-3),
    "residual": (None, "channels_last", "contiguous"),
    "append": (False, True),  # of 1x1 ones behind a norm
    "measure": (True, False),
    "known": (False, True),
    "threads": (1, 2, 3),
}


def _inputs(cell: Cell, g: torch.Generator) -> Args:
    n, c1, c2, space, groups = cell["spec"]
    # those of stride 2 are of one tensor, without a norm
    strided = "stride" in KINDS[cell["kind"]]
    c1, c2, groups = (c1 + c2, 0, 0) if strided else (c1, c2, groups)
    channels, outputs, size = c1 + c2, cell["outputs"], 1 if cell["kind"] == "1x1" else 3
    z = numbers((n, channels, *space), cell["regime"], torch.float32, g)
    # torch's norm of channels_last maps sums squares about zero: at a mean of 1e4 float64 is no answer either
    z = z - 9e3 if cell["regime"] == "offset" else z
    weight = torch.randn((outputs, channels, size, size), generator=g) / (channels * size**2) ** 0.5
    options = {k: _parameter(cell[k], n, channels, torch.float32, g) for k in ("scale", "shift")}
    affine, bias = torch.randn(2, channels, generator=g), torch.randn(outputs, generator=g)
    args = {
        **{"x": laid(z[:, :c1], cell["layout"]), "weight": weight, "bias": bias if cell["bias"] else None},
        "x2": laid(z[:, c1:], cell["layout2"]) if c2 else None,
        **{"groups": groups, "eps": cell["eps"], "act": cell["act"], **KINDS[cell["kind"]], **options},
        "norm_weight": affine[0] if cell["affine"] in ("both", "weight") else None,
        "norm_bias": affine[1] if cell["affine"] in ("both", "bias") else None,
        "add": _parameter(cell["add"], n, outputs, torch.float32, g),
    }
    if cell["residual"] is not None:
        args["residual"] = laid(torch.randn(_exact(args).shape, generator=g), cell["residual"])
    args["append"] = bool(cell["append"] and size == 1 and groups)
    return args | {k: cell[k] for k in ("measure", "known", "threads")}


@contextlib.contextmanager
def _on(threads: int | None) -> Iterator[None]:
    """PyTorch stays on its own: a pool of threads that it had made would be missing in a forked process."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads if threads and dispatch.asked() == "cpp" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_op(args: Args) -> Args:
    return {k: v for k, v in args.items() if k not in ("measure", "known", "threads")}


def _outputs(y: Tensor, moments: Tensor | None, outputs: int) -> Outputs:
    """moments: of the outputs, without what is appended; None: those that y has."""
    moments = moments_ref(y[:, :outputs]) if moments is None else moments
    return {"y": y, "mean": moments[..., 0], "deviation": moments[..., 1].sqrt()}


def _call(args: Args) -> Outputs:
    own, known = _of_op(args), {}
    with _on(args["threads"]):
        if not (args["measure"] or args["known"]):
            return _outputs(ops.norm_silu_conv(**own), None, len(own["weight"]))
        x, weight, bias = (own.pop(k) for k in ("x", "weight", "bias"))
        if args["known"] and own["groups"]:
            known = {k: None if v is None else moments_ref(v) for k, v in (("moments", x), ("moments2", own["x2"]))}
        y, moments = convolved(x, ops.pack(weight), bias, **own, **known, measure=args["measure"])
    return _outputs(y, moments if args["measure"] else None, len(weight))


def _exact(args: Args) -> Tensor:
    return oracle.norm_silu_conv(**_of_op(args))


def _oracle(args: Args) -> Outputs:
    y, outputs = _exact(args), len(args["weight"])
    mean = y[:, :outputs].mean((2, 3), keepdim=True)
    variance = (y[:, :outputs] - mean).square().mean((2, 3), keepdim=True)
    return _outputs(y, torch.cat([mean, variance], 3).squeeze(2), outputs)


def _slack(args: Args, wanted: Outputs) -> dict[str, Tensor]:
    """In millionths: Winograd sums larger numbers than come out, a few times those of all magnitudes.

    Moments are sums in float32 about one of the numbers.
    """
    rest = _of_op(args)
    x, weight = rest.pop("x"), rest.pop("weight")
    steps = {k: rest.pop(k) for k in ("stride", "asymmetric") if k in rest}
    for k in ("bias", "add", "residual", "append"):
        rest.pop(k, None)
    sums = oracle.conv(oracle.conv_input(x, **rest).abs(), weight.abs(), **steps)
    winograd = weight.shape[2] == 3 and not steps
    of_sums, of_moments = (3.0 if winograd else 0.2) * by_row(sums), 4.0 * by_row(wanted["deviation"])
    return {"y": of_sums, "mean": of_sums + of_moments, "deviation": of_sums + of_moments}


def _forms(args: Args, got: Outputs) -> list[str]:
    y = got["y"]
    right = y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
    return [] if right or not y.numel() else [f"y is {y.dtype} with strides {y.stride()}, not channels_last"]


DESCRIPTIONS = {
    "norm_silu_conv": Description(
        "norm_silu_conv", _CONV, _inputs, _call, _oracle, _forms, _slack, least=120, seed=10
    ),
}  # fmt: skip
