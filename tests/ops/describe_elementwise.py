"""Descriptions of q_sample, its gradients, normal and step_."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import row
from fastdiff.ops import normal, philox, q_sample, step_
from tests.ops import oracle
from tests.ops.cases import Case, lines
from tests.ops.describe import FLOATS, LAYOUTS, REGIMES, Args, Description, Outputs, by_row, laid, numbers
from tests.ops.pairwise import Cell

SHAPES = (
    *((0, 3, 4, 4), (2, 3, 0, 4), (1, 1, 1, 1), (3, 2, 5, 7), (2, 3, 37, 29), (1, 4, 16, 16), (2, 1, 1031)),
    *((5, 7, 11, 13), (2, 2, 3, 5, 3), (9, 3, 32, 33), (1, 16, 9, 11), (1, 67, 5, 5)),
)
INDICES = {"low": 0, "high": 2**33 + 5, "last": 2**63 - 50}
EVERYTHING = ("A", "B0", "BF", "B1", "B2", "B3", "S", "P", "Q")


def _form(name: str, got: Tensor, dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> list[str]:
    """What is wrong with a result that should be contiguous, or have these strides."""
    stride = torch.empty(got.shape, device="meta").stride() if stride is None else stride
    right = got.dtype == dtype and got.stride() == stride
    return [] if right else [f"{name} is {got.dtype} with strides {got.stride()}, not {dtype} with {stride}"]


def _index(name: str, n: int) -> Tensor:
    return torch.arange(n).flip(0) * 3 + INDICES[name]


# q_sample ------------------------------------------------------------------------------------------------------------

_Q_SAMPLE = {
    "shape": SHAPES,
    "dtype": (*FLOATS, torch.uint8),
    "layout": LAYOUTS,
    "regime": REGIMES,
    "noise": ("drawn", "same dtype", torch.float32, torch.float16),
    "noise_layout": ("contiguous", "channels_last", "cropped", "shared"),
    "where": (None, "image", "channel", "pixel", "full"),
    "outputs": ((), ("eps",), ("v",), ("eps", "v")),
    "out": (False, True),
    "index": tuple(INDICES),
    "step": (0, 7, 2**24 - 1),
    "stream": (2, 1, 255),
    "table": ("dense", "transposed", "last line"),
}


def _mask(kind: str | None, shape: tuple[int, ...], g: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    n, channels, *space = shape
    sizes = {
        "image": (n, 1, *(1 for _ in space)),
        "channel": (1, channels, *(1 for _ in space)),
        "pixel": (1, 1, *space),
        "full": (n, channels, *space),
    }
    return torch.rand(sizes[kind], generator=g) < 0.5


def _q_sample_inputs(cell: Cell, g: torch.Generator) -> Args:
    shape, dtype = cell["shape"], cell["dtype"]
    if dtype == torch.uint8:
        x0 = torch.randint(0, 256, shape, generator=g).to(torch.uint8)
    else:
        x0 = numbers(shape, cell["regime"], dtype, g)
    angle = torch.linspace(0.05, 1.5, 10, dtype=torch.float64)
    table = torch.stack([angle.cos(), angle.sin()], 1).float()
    args: Args = {
        "x0": laid(x0, cell["layout"]),
        "t": torch.randint(0, 10, shape[:1], generator=g),
        "table": table.T.contiguous().T if cell["table"] == "transposed" else table,
        "where": _mask(cell["where"], shape, g),
        **dict.fromkeys(cell["outputs"], True),
    }
    if cell["table"] == "last line":
        args["t"] = torch.full_like(args["t"], 9)
    if cell["noise"] == "drawn":
        args |= {"seed": philox.seed_tensor(2**64 - 7), "index": _index(cell["index"], shape[0])}
        args |= {"step": cell["step"], "stream": cell["stream"]}
    else:
        own = torch.float32 if dtype == torch.uint8 else dtype
        kind = own if cell["noise"] == "same dtype" else cell["noise"]
        regime = "tiny" if cell["regime"] == "tiny" else "plain"
        args["noise"] = laid(numbers(shape, regime, kind, g), cell["noise_layout"])
    if cell.get("out"):
        args["out"] = torch.full(shape, torch.nan, dtype=torch.float32 if dtype == torch.uint8 else dtype)
    return args


def _q_sample(args: Args) -> Outputs:
    got = q_sample(**args)
    names = ["x_t", *(name for name in ("eps", "v") if args.get(name))]
    result = dict(zip(names, [got] if isinstance(got, Tensor) else got, strict=True))
    if args.get("out") is not None:
        assert result["x_t"] is args["out"] or result["x_t"].data_ptr() == args["out"].data_ptr()
        result["x_t"] = args["out"]
    return result


def _q_sample_oracle(args: Args) -> Outputs:
    found = oracle.q_sample(**{k: v for k, v in args.items() if k not in ("eps", "v", "out")})
    return {name: v for name, v in found.items() if name == "x_t" or args.get(name)}


def _q_sample_forms(args: Args, got: Outputs) -> list[str]:
    dtype = args["x0"].dtype if args["x0"].is_floating_point() else torch.float32
    return [line for name, v in got.items() for line in _form(name, v, dtype)]


def _q_sample_slack(args: Args, wanted: Outputs) -> dict[str, float]:
    return {} if "noise" in args else dict.fromkeys(wanted, 1.0)


def _q_sample_gradients(function, args: Args) -> Outputs:  # type: ignore[no-untyped-def]
    """Gradients of sum(cotangent output) with respect to image and noise."""
    rest = {k: v for k, v in args.items() if k != "cotangents"}
    leaves = {k: args[k].detach().requires_grad_() for k in ("x0", "noise") if args.get(k) is not None}
    got = {k: v for k, v in function(rest | leaves).items() if v.requires_grad}
    cotangents = [args["cotangents"][name].to(v.dtype) for name, v in got.items()]
    found = torch.autograd.grad(list(got.values()), list(leaves.values()), cotangents)
    return dict(zip(leaves, found, strict=True))


def _q_sample_backward_inputs(cell: Cell, g: torch.Generator) -> Args:
    args = _q_sample_inputs(cell, g)
    names = ("x_t", *cell["outputs"])
    shape, dtype = cell["shape"], cell["dtype"]
    args["cotangents"] = {k: laid(torch.randn(shape, generator=g).to(dtype), cell["cotangent"]) for k in names}
    return args


def _gradient_dtypes(args: Args, got: Outputs) -> list[str]:
    return [f"d{k} is {v.dtype}, not {args[k].dtype}" for k, v in got.items() if v.dtype != args[k].dtype]


def _wide_leaves(args: Args) -> Args:
    """Float images and noise in float64, for the oracle to be differentiated by."""
    return args | {k: args[k].double() for k in ("x0", "noise") if args.get(k) is not None}


# normal --------------------------------------------------------------------------------------------------------------

_NORMAL = {
    "shape": SHAPES,
    "index": tuple(INDICES),
    "step": (0, 7, 2**24 - 1),
    "stream": (0, 1, 2, 3, 128, 255),
    "seed": (0, 5, -1, 2**63 + 12345),
}


def _normal_inputs(cell: Cell, _: torch.Generator) -> Args:
    n, *shape = cell["shape"]
    return {
        **{"seed": philox.seed_tensor(cell["seed"]), "index": _index(cell["index"], n)},
        **{"step": cell["step"], "stream": cell["stream"], "shape": tuple(shape)},
    }


# step_ ---------------------------------------------------------------------------------------------------------------

_STEP = {
    "shape": SHAPES,
    "columns": (
        *(("A", "B0"), ("A", "B0", "S"), ("B0",), ("A", "BF", "S"), ("A", "B0", "B1", "Q"), ("S",), ("B1", "B2", "B3")),
        *(("A", "B0", "B2", "S", "P"), EVERYTHING),
    ),
    "zero": ((), ("C_SKIP",), ("C_OUT",)),
    "clip": (float("inf"), 0.7),
    "variance": (None, "range", "moment"),
    "noise": ("drawn", "given"),
    "halves": ("one", "guided", "weight one", "doubled", "no x_in"),
    "F_dtype": FLOATS,
    "F_layout": LAYOUTS,
    "x_in_dtype": FLOATS,
    "x_in_layout": ("contiguous", "channels_last", "padded", "padded_last", "unaligned"),
    "regime": REGIMES,
    "index": tuple(INDICES),
    "k": (0, 2, 5),
    "bad": ("fresh", "known", None),
}


def _next_input(cell: Cell, images: int) -> Tensor | None:
    """Room for the network's next input, full of NaN; padded channels lie behind those of the image."""
    if cell["halves"] == "no x_in":
        return None
    _, channels, *space = cell["shape"]
    room = laid(torch.full((images, channels, *space), torch.nan, dtype=cell["x_in_dtype"]), cell["x_in_layout"])
    if cell["x_in_layout"].startswith("padded"):
        # the caller's tensor has all channels, and the step writes the first ones
        extra = 3 if cell["x_in_layout"] == "padded" else 5
        room = room.as_strided((images, channels + extra, *space), room.stride())
    return room


def _step_inputs(cell: Cell, g: torch.Generator) -> Args:
    n, channels, *space = shape = cell["shape"]
    guided = cell["halves"] in ("guided", "weight one")
    case = Case(shape, guided=cell["halves"] == "guided", variance=cell["variance"], columns=cell["columns"],
                clip=cell["clip"])  # fmt: skip
    rows = lines(case, g)
    for name in cell["zero"]:
        rows[:, row.NAMES.index(name)] = 0
    halves = 2 if guided else 1
    F = numbers((n * halves, channels, *space), cell["regime"], cell["F_dtype"], g)
    if cell["variance"]:
        F = torch.cat([F, torch.randn(F.shape, generator=g).to(F.dtype)], 1)
    h = torch.full((3, *shape), torch.nan)
    for slot in range(3):
        if f"B{slot + 1}" in cell["columns"]:
            h[slot] = torch.randn(shape, generator=g)
    bad = {None: None, "fresh": torch.full((n,), -1), "known": torch.arange(n) % 3 - 1}
    return {
        "x": numbers(shape, "plain" if cell["regime"] in ("nan", "inf") else cell["regime"], torch.float32, g),
        "x_in": _next_input(cell, n * (2 if guided or cell["halves"] == "doubled" else 1)),
        **{"h": h, "F": laid(F, cell["F_layout"]), "rows": rows, "k": torch.tensor([cell["k"]])},
        **{"index": _index(cell["index"], n), "seed": philox.seed_tensor(-3), "variance": cell["variance"]},
        "noise": torch.randn(shape, generator=g) if cell["noise"] == "given" else None,
        "bad": bad[cell["bad"]],
    }


def _copied(v: Tensor) -> Tensor:
    """A copy in the same layout, padding and offset included."""
    if v.dtype in (*FLOATS, torch.float64) and v.numel():
        whole = v.as_strided((v.untyped_storage().nbytes() // v.element_size(),), (1,), 0).clone()
        return whole.as_strided(v.shape, v.stride(), v.storage_offset())
    return v.clone()


_WRITTEN = ("x", "x_in", "h", "bad")


def _step(args: Args) -> Outputs:
    args = args | {name: _copied(args[name]) for name in _WRITTEN if args[name] is not None}
    first = ("x", "x_in", "h", "F", "rows", "k", "index", "seed")
    step_(*(args[name] for name in first), **{k: v for k, v in args.items() if k not in first})
    return {name: args[name] for name in _WRITTEN if args[name] is not None}


def _step_forms(args: Args, got: Outputs) -> list[str]:
    return [line for k, v in got.items() for line in _form(k, v, args[k].dtype, args[k].stride())]


def _step_slack(args: Args, wanted: Outputs) -> dict[str, Tensor]:
    """The deviation S sqrt(s2) of a step's noise, which enters linearly."""
    if args["noise"] is not None or args["rows"][int(args["k"]), row.S] == 0:
        return {}
    ones, zeros = (oracle.step(args | {"noise": torch.full_like(args["x"], v)}) for v in (1.0, 0.0))
    return {name: by_row((ones[name] - zeros[name]).abs()) for name in ("x", "x_in") if name in wanted}


DESCRIPTIONS = {
    "q_sample": Description(
        "q_sample", _Q_SAMPLE, _q_sample_inputs, _q_sample, _q_sample_oracle, _q_sample_forms, _q_sample_slack,
        least=120, seed=1),
    "q_sample backward": Description(
        "q_sample",
        {**{k: v for k, v in _Q_SAMPLE.items() if k != "out"}, "dtype": FLOATS, "cotangent": LAYOUTS},
        _q_sample_backward_inputs,
        lambda args: _q_sample_gradients(_q_sample, args),
        lambda args: _q_sample_gradients(_q_sample_oracle, _wide_leaves(args)),
        _gradient_dtypes, factor=3.0, least=60, seed=2),
    "normal": Description(
        "normal", _NORMAL, _normal_inputs,
        lambda args: {"z": normal(**args)},
        lambda args: {"z": oracle.normal(**args)},
        lambda args, got: _form("z", got["z"], torch.float32),
        lambda args, wanted: {"z": 1.0}, least=40, seed=3),
    "step_": Description(
        "step_", _STEP, _step_inputs, _step, oracle.step, _step_forms, _step_slack, least=160, seed=4),
}  # fmt: skip
