"""What the variants of a row share: the networks as each of them wants its weights, and one batch of inputs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff as fd
from benchmarks.models import Model, Pair, condition, count, pair, predicts, shape
from fastdiff.sampling.capture import Cuda, Recorder
from fastdiff.sampling.guidance import map_cond

CHECKED = 4
"""Images of a batch that are compared with the reference."""

WITHOUT = "prepared without "

DEVICE = fd.nn.Tactics(winograd=False)
"""Those of a GPU; a CPU that stands for one in tests takes no way of its own."""


class Nets:
    """Ours and the rival's network of one model: in fp32, and in `dtype` under the names below.

    "ours", "rival"           channels_last
    "rival NCHW"
    "prepared"                ours by `den.prepare`, with all tactics; "prepared without <tactic>"
    """

    def __init__(self, model: Model, device: str, pair: Pair, dtype: torch.dtype) -> None:
        self.model, self.device, self.pair, self.dtype = model, device, pair, dtype
        self._made: dict[str, nn.Module] = {}

    @cached_property
    def counted(self) -> tuple[int, int]:
        """Parameters of the model, and FLOP an image."""
        return count(self.model)

    def wider(self) -> Nets:
        """The same in the dtype that this one is judged by: fp32 for 16 bits, fp64 for fp32."""
        dtype = torch.float32 if self.dtype.itemsize < 4 else torch.float64
        return Nets(self.model, self.device, self.pair, dtype)

    def net(self, name: str) -> nn.Module:
        """The network of this name, made when it is first asked for."""
        if name not in self._made:
            self._made[name] = self._prepared(name) if name.startswith("prepared") else self._cast(name)
        return self._made[name]

    def _cast(self, name: str) -> nn.Module:
        given = self.pair.ours if name == "ours" else self.pair.theirs
        form = torch.contiguous_format if name.endswith("NCHW") else torch.channels_last
        return copy.deepcopy(given).to(self.dtype).to(memory_format=form)

    def _prepared(self, name: str) -> nn.Module:
        tactics = DEVICE
        if name.startswith(WITHOUT):
            tactics = tactics._replace(**{name.removeprefix(WITHOUT): False})
        den = fd.Denoiser(self.pair.ours, fd.linear(), predicts(self.model))
        net: Any = den.prepare(dtype=self.dtype, tactics=tactics).net
        assert isinstance(net, nn.Module)
        return net

    def denoiser(self, name: str) -> fd.Denoiser:
        """The network of this name as `fd.Sampler` takes it."""
        return fd.Denoiser(self.net(name), fd.linear(), predicts(self.model))

    def weights(self, name: str) -> int:
        """Bytes of its parameters and buffers."""
        net = self.net(name)
        return sum(t.nbytes for t in (*net.parameters(), *net.buffers()))


def nets_of(model: Model, device: str, *, quiet: bool) -> Nets:
    """Both networks of a model, in bf16 on a GPU and fp32 elsewhere. AssertionError where they do not agree in fp32."""
    made = pair(model, device, quiet=quiet)
    nets = Nets(model, device, made, torch.bfloat16 if device.startswith("cuda") else torch.float32)
    first = Setting(nets, CHECKED)
    with torch.no_grad(), exact(), fd.backend("reference"):
        apart = distance(made.ours(first.x, first.t, first.cond), made.theirs(first.x, first.t, first.cond))
    assert apart <= 1e-5, f"{model.name}: ours and {made.label} differ by {apart:.1e}"
    return nets


def tactics() -> tuple[str, ...]:
    """What `den.prepare` does unless told otherwise, each of which can be left out; what is lossy is not among it."""
    return tuple(name for name, on in DEVICE._asdict().items() if on)


def recorder_of(device: str) -> Callable[[torch.device], Recorder] | None:
    """What captures graphs there, None where nothing does."""
    return Cuda if device.startswith("cuda") else None


class Setting:
    """One batch for the networks of a model: x in fp32, one time, labels where there are classes.

    recorder: what captures graphs; None where nothing does.
    """

    def __init__(self, nets: Nets, batch: int) -> None:
        self.nets, self.batch, self.device = nets, batch, nets.device
        self.shape = shape(nets.model, batch)
        self.x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(nets.device)
        self.t = torch.full((batch,), 500, device=nets.device)
        self.cond = map_cond(lambda v: v.to(nets.device), condition(nets.model, batch))
        self.recorder = recorder_of(nets.device)

    def few(self, nets: Nets) -> Setting:
        """The first images, for other networks of the model."""
        made = copy.copy(self)
        made.nets, made.batch = nets, min(self.batch, CHECKED)
        made.x, made.t = self.x[:CHECKED], self.t[:CHECKED]
        made.cond = map_cond(lambda v: v[:CHECKED], self.cond)
        made.shape = tuple(made.x.shape)
        return made

    def given(self, name: str) -> Tensor:
        """x as the network of this name takes it."""
        form = torch.contiguous_format if name.endswith("NCHW") else torch.channels_last
        return self.x.to(self.nets.dtype, memory_format=form)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Within the block convolutions and matrix products of fp32 are those of fp32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())
