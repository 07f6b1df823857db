"""Inputs for `step_` that use every column of a row, one at a time and together."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import row
from fastdiff.ops import philox

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    shape: tuple[int, ...] = (3, 2, 5, 7)
    guided: bool = False
    doubled: bool = False
    variance: str | None = None
    columns: tuple[str, ...] = ("A", "B0", "S")
    clip: float = float("inf")
    k: int = 2
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    given_noise: bool = False


def lines(case: Case, generator: torch.Generator) -> Tensor:
    """Seven rows whose named columns hold random numbers, the rest zero."""
    rows = torch.zeros(7, row.COLUMNS)

    def fill(name: str, low: float, high: float) -> None:
        rows[:, row.NAMES.index(name)] = low + (high - low) * torch.rand(7, generator=generator)

    for name in ("C_IN", "C_SKIP", "C_OUT", "ALPHA", "SIGMA", *case.columns):
        fill(name, 0.3, 1.3)
    rows[:, row.W] = 2.5 if case.guided else 1.0
    rows[:, row.SLOT] = torch.arange(7) % 3
    rows[:, row.CLIP] = case.clip
    if case.variance == "range":
        fill("V0", -3.0, -2.0)
        fill("V1", -1.0, 0.0)
    if case.variance == "moment":
        fill("V0", 0.1, 0.2)
        fill("V1", 0.3, 0.4)
        fill("V2", 0.0, 0.1)
        fill("V3", 0.8, 1.0)
    return rows


def inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `step_`; history and the next input are full of NaN where the row must not read them."""
    g = torch.Generator().manual_seed(seed)
    n, channels, *space = case.shape
    rows = lines(case, g)
    x = torch.randn(case.shape, generator=g)
    wide = channels * (2 if case.variance else 1)
    F = torch.randn((n * (2 if case.guided else 1), wide, *space), generator=g).to(case.dtype)
    x_in = torch.full((n * (2 if case.guided or case.doubled else 1), channels, *space), torch.nan, dtype=case.dtype)
    if case.channels_last:
        F, x_in = (v.to(memory_format=torch.channels_last) for v in (F, x_in))
    h = torch.full((3, *case.shape), torch.nan)
    for slot, name in enumerate(("B1", "B2", "B3")):
        if name in case.columns:
            h[slot] = torch.randn(case.shape, generator=g)
    return {
        "x": x,
        "x_in": x_in,
        "h": h,
        "F": F,
        "rows": rows,
        "k": torch.tensor([case.k]),
        "index": torch.randint(0, 2**40, (n,), generator=g),
        "seed": philox.seed_tensor(2**63 + 12345),
        "variance": case.variance,
        "noise": torch.randn(case.shape, generator=g) if case.given_noise else None,
        "bad": torch.full((n,), -1),
    }


def copied(args: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Fresh copies; with dtype, floating tensors in it (the float64 oracle reads the same numbers)."""

    def copy(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        return v.to(dtype) if dtype is not None and v.is_floating_point() else v.clone()

    return {name: copy(v) for name, v in args.items()}


def run(function: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Call step_ by position as its callers do; returns the arguments it has changed."""
    first = ("x", "x_in", "h", "F", "rows", "k", "index", "seed")
    function(*(args[name] for name in first), **{k: v for k, v in args.items() if k not in first})
    return args


CASES = {
    "plain": Case(columns=("A", "B0")),
    "noise": Case(),
    "all": Case(columns=("A", "B0", "BF", "B1", "B2", "B3", "S", "P", "Q"), clip=0.7),
    "guided": Case(guided=True, columns=("A", "B0", "BF", "S"), clip=1.0),
    "unguided half": Case(doubled=True),
    "range": Case(variance="range"),
    "range guided": Case(variance="range", guided=True),
    "moment": Case(variance="moment", clip=0.5),
    "history two": Case(columns=("A", "B0", "B2", "Q")),
    "keeps x": Case(columns=("A", "B0", "P")),
    "bf16": Case(dtype=torch.bfloat16, guided=True),
    "fp16": Case(dtype=torch.float16, columns=("A", "B0", "BF", "B1", "S", "Q")),
    "channels last": Case(channels_last=True, guided=True, columns=("A", "B0", "BF", "S", "Q")),
    "given noise": Case(given_noise=True),
    "one pixel": Case(shape=(1, 1, 1, 1)),
    "prime": Case(shape=(2, 3, 7, 11), columns=("A", "B0", "B1", "S", "P", "Q")),
    "one axis": Case(shape=(5, 2, 13)),
    "volume": Case(shape=(2, 2, 3, 5, 3)),
    "empty": Case(shape=(0, 3, 4, 4)),
    "wide": Case(shape=(4, 3, 32, 32), guided=True, columns=("A", "B0", "B1", "B2", "S", "Q"), clip=1.0),
    "first row": Case(k=0),
    "last row": Case(k=5, columns=("B0",)),
}
