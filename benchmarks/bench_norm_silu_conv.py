"""norm_silu_conv: the layers of DDPM's CIFAR-10 network by themselves, against eager and frozen PyTorch, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.case import Case
from fastdiff.ops import norm_silu_conv, pack
from fastdiff.ops.norm_silu_conv import convolved, norm_silu_conv_ref
from fastdiff.ops.tape import Tape, recording_on

LAST = torch.channels_last
GROUPS = 32
ERROR = 1e-5
"""Relative to the result's norm, against float64."""


class Layer(NamedTuple):
    """A convolution, what is in front of it and what behind."""

    name: str
    inputs: int
    outputs: int
    side: int
    size: int = 3
    norm: bool = False
    residual: bool = False
    upsample: bool = False
    stride: int = 1


LAYERS = (
    Layer("first", 3, 128, 32),
    Layer("norm, SiLU, 3x3, residual", 128, 128, 32, norm=True, residual=True),
    Layer("norm, SiLU, 3x3", 256, 256, 16, norm=True),
    Layer("norm, 1x1", 256, 768, 16, size=1, norm=True),
    Layer("nearest x2, 3x3", 256, 256, 16, upsample=True),
    Layer("stride 2", 128, 128, 32, stride=2),
    Layer("stride 2", 256, 256, 16, stride=2),
    Layer("norm, SiLU, last", 128, 3, 32, norm=True),
)
BATCHES = 1, 4


class Plain(nn.Module):
    """A layer of torch's modules."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, layer.inputs) if layer.norm else nn.Identity()
        self.act = nn.SiLU() if layer.norm and layer.size == 3 else nn.Identity()
        self.up = nn.Upsample(scale_factor=2) if layer.upsample else nn.Identity()
        self.conv = nn.Conv2d(layer.inputs, layer.outputs, layer.size, layer.stride, layer.size // 2)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """x and residual channels_last."""
        y: Tensor = self.conv(self.up(self.act(self.norm(x))))
        return y if residual is None else y + residual


def played(x: Tensor, residual: Tensor | None, run: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """run(x, residual) from a tape, as a prepared network has it."""
    tape = Tape()

    def held(v: Tensor) -> Tensor:
        n, channels, height, width = v.shape
        return tape.empty((n, height, width, channels), v.dtype).permute(0, 3, 1, 2).copy_(v)

    kept = [None if v is None else held(v) for v in (x, residual)]
    with recording_on(tape):
        result = run(*kept)

    def again() -> Tensor:
        tape.play()
        return result

    return again


def case(layer: Layer, batch: int, *, compiled: bool) -> Case:
    """One layer."""
    torch.manual_seed(0)
    plain = Plain(layer).eval().to(memory_format=LAST)
    x = torch.randn(batch, layer.inputs, layer.side, layer.side).contiguous(memory_format=LAST)
    residual = torch.randn_like(plain(x, None)).contiguous(memory_format=LAST) if layer.residual else None
    norm: Any = plain.norm
    given: dict[str, Any] = {"upsample": layer.upsample, "stride": layer.stride, "act": layer.size == 3}
    if layer.norm:
        given |= {"groups": GROUPS, "norm_weight": norm.weight, "norm_bias": norm.bias}
    packed, bias = pack(plain.conv.weight), plain.conv.bias
    ours = partial(norm_silu_conv, x, packed, bias, residual=residual, **given)
    taped = played(x, residual, lambda x, residual: convolved(x, packed, bias, residual=residual, **given)[0])
    variants: dict[str, Any] = {
        "ours (cpp)": ours, "ours, on a tape": taped, "eager, channels_last": lambda: plain(x, residual)
    }  # fmt: skip
    if compiled:
        whole = torch.compile(plain, dynamic=False, options={"freezing": True})  # type: ignore[call-overload]
        variants["compiled, freezing"] = lambda: whole(x, residual)

    def check() -> float:
        wide = [None if v is None else v.double() for v in (x, packed.weight, bias, residual)]
        norms = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
        exact = norm_silu_conv_ref(wide[0], wide[1], *packed[1:], wide[2], residual=wide[3], **norms)[0]  # type: ignore[arg-type]
        error = max(float((run().double() - exact).norm() / exact.norm()) for run in (ours, taped))
        assert error <= ERROR, error
        return error

    title = f"norm_silu_conv {layer.name}, {layer.inputs} to {layer.outputs}, {layer.side}x{layer.side}, batch {batch}"
    return Case(title, "ours (cpp)", variants, check, also=("ours, on a tape",))


def cases(device: str, backend: str, quick: bool) -> Iterator[Case]:
    """All lines of the report."""
    if backend != "cpp":
        return
    for layer in LAYERS[1:2] if quick else LAYERS:
        for batch in BATCHES[:1] if quick else BATCHES:
            yield case(layer, batch, compiled=not quick)
