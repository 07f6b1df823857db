"""What the fast convolutions do to the numbers: the worst layer's error, and how far 50 steps move a pixel."""

from __future__ import annotations

import copy
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff as fd
from benchmarks.cpu import PREPARED, Given, ours, own
from benchmarks.models import DDPM, SMALL, Model, pair
from benchmarks.nets import distance
from benchmarks.note import Note
from benchmarks.watch import Function, replaced

STEPS = 50
OP = "fastdiff.nn.convolved", "convolved"
"""The function through which a prepared network calls its convolutions, norms and sums among them."""
ATTENTION = "fastdiff.nn.attended", "attended"
"""The one through which it calls its attention."""

Net = Callable[..., Tensor]


def layers(given: Given) -> dict[str, float]:
    """|y - y64| / |y64| of every kernel of the prepared network, y64 in float64 of the same inputs."""
    from fastdiff.ops.attention import attention_ref
    from fastdiff.ops.norm_silu_conv import norm_silu_conv_ref

    found: dict[str, float] = {}

    def wide(v: Any) -> Any:
        return v.double() if isinstance(v, Tensor) else v

    def checked(convolved: Function) -> Function:
        def run(x: Tensor, packed: Any, bias: Tensor | None, **options: Any) -> Any:
            result = convolved(x, packed, bias, **options)
            # the reference takes its own moments
            known = {k: wide(v) for k, v in options.items() if k not in ("moments", "moments2", "measure")}
            weight, outputs, size = packed
            exact = norm_silu_conv_ref(wide(x), wide(weight), outputs, size, wide(bias), **known)[0]
            way = " upsampled" if options.get("upsample") else " halved" if options.get("stride", 1) == 2 else ""
            name = f"{len(found)}: {size}x{size} to {tuple(exact.shape[1:])}{way}"
            found[name] = distance(result[0], exact)
            return result

        return run

    def attending(attended: Function) -> Function:
        def run(q: Tensor, k: Tensor, v: Tensor, heads: int, residual: Tensor | None = None, **options: Any) -> Any:
            result = attended(q, k, v, heads, residual, **options)
            exact = attention_ref(wide(q), wide(k), wide(v), heads, wide(residual))[0]
            found[f"{len(found)}: attention to {tuple(exact.shape[1:])}"] = distance(result[0], exact)
            return result

        return run

    with torch.no_grad(), replaced(*OP, checked), replaced(*ATTENTION, attending):
        ours(given)[PREPARED]()()
    return found


def worst_layer(model: Model) -> dict[str, Any]:
    """The layers of a network, and which of them errs most."""
    if importlib.util.find_spec(OP[0]) is None:
        return {"layers": {}}
    return {"layers": layers(Given.of(model, pair(model, "cpu"), 1))}


def worst_lines(record: dict[str, Any]) -> list[str]:
    """In a sentence."""
    found: dict[str, float] = record["layers"]
    if not found:
        return ["No kernel of ours runs in the prepared network here.", ""]
    name = max(found, key=lambda n: found[n])
    middle = statistics.median(found.values())
    return [
        f"{len(found)} layers, each against float64 on the same inputs: the worst is {name} with a relative error of",
        f"{found[name]:.1e}, the median {middle:.1e}.",
        "",
    ]


def _wide(net: nn.Module) -> Net:
    """The network in float64 with inputs and results in fp32."""
    double = copy.deepcopy(net).double()

    def run(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        F: Tensor = double(x.double(), t, cond)
        return F.float()

    return run


def pixels(like: fd.Denoiser, shape: tuple[int, ...], cond: Tensor | None = None) -> dict[str, float]:
    """The largest difference of a pixel, of 255, after 50 DDIM steps, from the same loop around the net in float64."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    net: Any = like.net

    def sample(F: Net) -> Tensor:
        den = like.with_net(F)
        return fd.sample(den, shape, "ddim", steps=STEPS, x=x, cond=cond, clip=1.0, run=fd.eager)

    wanted = sample(_wide(net))
    return {name: 127.5 * float((sample(make()) - wanted).abs().max()) for name, make in own(net).items()}


def digits() -> dict[str, float]:
    """Of the trained model."""
    return pixels(fd.load("digits"), (16, 1, 8, 8), torch.arange(16) % 10)


def quiet(model: Model) -> dict[str, float]:
    """Of random weights with hardly any output: a loop around louder ones is chaotic, whoever computes it."""
    net = pair(model, "cpu", quiet=True).ours
    return pixels(fd.Denoiser(net, fd.linear(), "eps"), (1, 3, model.size, model.size))


def pixel_lines(record: dict[str, Any]) -> list[str]:
    """In a sentence."""
    said = ", ".join(f"{name} {moved:.2g}" for name, moved in record.items())
    return [f"Largest difference of a pixel, of 255, from the same loop around the network in float64: {said}.", ""]


def notes(quick: bool) -> Iterator[Note]:
    """All there is to say."""
    model = SMALL if quick else DDPM
    yield Note(f"Effect: layers of {model.name}", partial(worst_layer, model), worst_lines)
    yield Note(f"Effect: {STEPS} DDIM steps, digits", digits, pixel_lines)
    if not quick:
        yield Note(f"Effect: {STEPS} DDIM steps, {model.name}, quiet weights", partial(quiet, model), pixel_lines)
