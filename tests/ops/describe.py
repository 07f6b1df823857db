"""What a description of an op is made of: layouts, regimes of numbers, and the judgement of one cell.

A description names factors; a cell is one value of each. From a cell come the inputs, the oracle's answer in float64,
plain PyTorch's error against it, and so the bound on a kernel's error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import dispatch
from tests.ops.pairwise import Cell

Args = dict[str, Any]
Outputs = dict[str, Tensor]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (
    *("contiguous", "channels_last", "transposed", "sliced", "cropped", "expanded", "shared", "unaligned"),
    *("padded", "padded_last", "every second"),
)
REGIMES = ("plain", "offset", "tiny", "huge", "constant", "nan", "inf")


class Description(NamedTuple):
    """One op. `call` runs the public op, under whatever backend is set; names of outputs are those of the oracle."""

    op: str
    factors: Mapping[str, Sequence[Any]]
    inputs: Callable[[Cell, torch.Generator], Args]
    call: Callable[[Args], Outputs]
    oracle: Callable[[Args], Outputs]
    forms: Callable[[Args, Outputs], list[str]]  # what is wrong with dtypes and strides of the outputs
    # by which normals enter the outputs: their coefficients
    slack: Callable[[Args, Outputs], Mapping[str, Tensor | float]] = lambda args, wanted: {}
    factor: float = 2.0  # the bound in errors of PyTorch's own
    least: int = 0
    seed: int = 0


def named(cell: Cell) -> str:
    """A cell in one line."""
    return " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in cell.items())


def _within(x: Tensor, before: Sequence[int], behind: Sequence[int]) -> Tensor:
    """x inside a larger tensor full of NaN (or 99), `before` and `behind` it along each axis."""
    space = [a + b + c for a, b, c in zip(before, x.shape, behind, strict=True)]
    larger = torch.full(space, torch.nan if x.is_floating_point() else 99, dtype=torch.float64).to(x.dtype)
    view = larger[tuple(slice(a, a + b) for a, b in zip(before, x.shape, strict=True))]
    return view.copy_(x)


def _last(x: Tensor) -> Tensor:
    """The same numbers with the channels lying innermost."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def laid(x: Tensor, layout: str) -> Tensor:
    """x in another memory layout; its values are kept, but for "expanded" and "shared", which repeat some."""
    axes = x.ndim
    if layout == "channels_last":
        return _last(x)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return _within(x, [0, 1] + [0] * (axes - 2), [0, 2] + [0] * (axes - 2))
    if layout == "cropped":
        return _within(x, [1] * axes, [1] * axes)
    if layout == "expanded":
        return x[..., :1].expand(x.shape)
    if layout == "shared":
        return x[:1].expand(x.shape)
    if layout == "unaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if layout == "padded":
        return _within(x, [0] * axes, [0, 3] + [0] * (axes - 2))
    if layout == "padded_last":
        return _within(x.movedim(1, -1).contiguous(), [0] * axes, [0] * (axes - 1) + [5]).movedim(-1, 1)
    if layout == "every second":
        return x.repeat_interleave(2, 1)[:, ::2]
    assert layout == "contiguous", layout
    return x.contiguous()


def numbers(shape: Sequence[int], regime: str, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Numbers of one regime in `dtype`; NaN and Inf sit in the last image alone."""
    x = torch.randn(shape, generator=g)
    narrow = dtype == torch.float16
    if regime == "offset":
        # bf16 has 8 bits: a mean 100 times the deviation already leaves a handful of values
        x = x + (1e4 if dtype == torch.float32 else 30.0)
    if regime == "tiny":
        x = x * (1e-4 if narrow else 1e-20)
    if regime == "huge":
        x = x * (1e4 if narrow else 1e15)
    if regime == "constant":
        x = torch.full_like(x, 1.7)
    if regime in ("nan", "inf") and x.numel():
        x[-1].view(-1)[len(x[-1].view(-1)) // 2] = float(regime)
    return x.to(dtype)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def made(what: Description, cell: Cell, draw: int = 0) -> Args:
    """The inputs of a cell; other draws differ in their random numbers only."""
    return what.inputs(cell, torch.Generator().manual_seed(1000 * what.seed + draw))


def moved(v: Any, device: str) -> Any:
    """A tensor on another device with its strides and offset, and the tensors of a dict."""
    if isinstance(v, dict):
        return {name: moved(w, device) for name, w in v.items()}
    if not isinstance(v, Tensor):
        return v
    if not v.numel():
        return v.to(device)
    whole = v.as_strided((v.untyped_storage().nbytes() // v.element_size(),), (1,), 0).to(device)
    return whole.as_strided(v.shape, v.stride(), v.storage_offset())


def ran(what: Description, args: Args, backend: str, device: str = "cpu") -> Outputs:
    """The op on one backend, into poisoned memory."""
    with dispatch.backend(backend), poisoned():
        return what.call(args if device == "cpu" else moved(args, device))


def by_row(x: Tensor) -> Tensor:
    """The largest of each image: (N,) of (N, ...), NaN and Inf left out."""
    return x.nan_to_num(0, 0, 0).reshape(len(x), -1).amax(1) if x.numel() else x.new_zeros(len(x))


def errors(got: Outputs, wanted: Outputs) -> Outputs:
    """The largest difference of each image, output by output."""
    return {name: by_row((got[name].double() - w).abs()) for name, w in wanted.items() if w.is_floating_point()}


def _plain_errors(what: Description, cell: Cell, draws: int) -> Outputs:
    """The largest errors of plain PyTorch, image by image, over several draws: one alone may be lucky."""
    found: Outputs = {}
    for draw in range(1, 1 + draws):
        args = made(what, cell, draw)
        for name, e in errors(ran(what, cast(args, torch.float32), "reference"), what.oracle(args)).items():
            found[name] = torch.maximum(found.get(name, e), e)
    return found


def magnitude(args: Args) -> float:
    """The largest finite number among the arguments."""
    tensors = [v for v in args.values() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]
    return max((v.double().nan_to_num(0, 0, 0).abs().max().item() for v in tensors), default=0.0)


class Known(NamedTuple):
    """What a cell's judgement needs that no kernel changes."""

    args: Args
    wanted: Outputs
    plain: Outputs  # errors of PyTorch's own


def known(what: Description, cell: Cell) -> Known:
    args = made(what, cell)
    wanted = what.oracle(args)
    return Known(args, wanted, errors(ran(what, cast(args, torch.float32), "reference"), wanted))


def cast(args: Args, dtype: torch.dtype) -> Args:
    """The same numbers in a wider dtype. In fp32, arithmetic is what kernels do inside; they round once behind it."""

    def wider(v: Any) -> Any:
        if isinstance(v, dict):
            return {name: wider(w) for name, w in v.items()}
        return v.to(torch.promote_types(v.dtype, dtype)) if isinstance(v, Tensor) and v.is_floating_point() else v

    found: Args = {name: wider(v) for name, v in args.items()}
    if args.get("out") is not None and args["x0"].dtype == torch.uint8:
        found["out"] = args["out"]
    if args.get("dtype") is not None:
        found["dtype"] = dtype
    return found


def _beyond(what: Description, at: Known, plain: Outputs, got: Outputs, ulps: float, normals: float) -> list[str]:
    """The outputs whose error is over `factor` times PyTorch's own in fp32 (or its last place) and half an ulp."""
    found, slack = [], what.slack(at.args, at.wanted)
    # numbers that cancel leave nothing of an answer, and of float64 its last place
    cancelled = 2**-50 * magnitude(at.args)
    for name, error in errors(got, at.wanted).items():
        info, w = torch.finfo(got[name].dtype), at.wanted[name]
        # numbers too large for the dtype are Inf on both sides: they do not set the size
        size = by_row(w.masked_fill(~w.to(got[name].dtype).isfinite(), 0).abs())
        arithmetic = torch.maximum(plain[name], torch.finfo(torch.float32).eps / 2 * size)
        rounding = ulps / 2 * torch.clamp(info.eps * size, min=info.tiny * info.eps)
        bound = what.factor * arithmetic + rounding + normals * slack.get(name, 0.0) + cancelled
        if (error > bound).any():
            worst = int((error / bound).argmax())
            found.append(f"{name}[{worst}]: error {error[worst]:.3e} over {bound[worst]:.3e}")
    return found


def _wrong(name: str, got: Tensor, wanted: Tensor) -> str | None:
    """A shape, a whole number, a NaN or Inf that is not the oracle's."""
    if got.shape != wanted.shape:
        return f"{name} is {tuple(got.shape)}, not {tuple(wanted.shape)}"
    if not wanted.is_floating_point():
        return None if torch.equal(got, wanted) else f"{name} is {got.tolist()}, not {wanted.tolist()}"
    same = torch.equal(got.isfinite(), wanted.to(got.dtype).isfinite())
    return None if same else f"{name}: NaN or Inf in other places"


def complaints(
    what: Description,
    cell: Cell,
    backend: str,
    at: Known | None = None,
    *,
    device: str = "cpu",
    ulps: float = 1.0,
    normals: float = 1e-6,
) -> list[str]:
    """What is wrong with a backend's answer to a cell: dtypes, strides, NaN out of place, errors over the bound.

    ulps: of the last rounding, 2 for Triton's interpreter, which truncates bf16; normals: what those may differ by.
    """
    at = at or known(what, cell)
    got = ran(what, at.args, backend, device)
    wrong_forms = what.forms(at.args, got) if backend != "reference" else []
    got = {name: v.cpu() for name, v in got.items()}
    if list(got) != list(at.wanted):
        return [f"outputs are {list(got)}, not {list(at.wanted)}"]
    found = [line for name, w in at.wanted.items() if (line := _wrong(name, got[name], w))]
    found = found or wrong_forms
    if found or not _beyond(what, at, at.plain, got, ulps, normals):
        return found
    # PyTorch may have been lucky in this draw: its largest error over several ones is the bound
    more = _plain_errors(what, cell, draws=12)
    pooled = {name: torch.maximum(e, more[name]) for name, e in at.plain.items()}
    return _beyond(what, at, pooled, got, ulps, normals)
