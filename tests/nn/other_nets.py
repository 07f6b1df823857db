"""Modules as other people write them, for `fd.patch`. No asserts in the methods: pytest would rewrite them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nonlinearity(x):
    # swish
    return x * torch.sigmoid(x)


class Swish(nn.Module):
    """With a docstring."""

    def forward(self, x):
        """And another."""
        return torch.sigmoid(x) * x


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x * torch.sigmoid(x)


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Odd(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) + 1


class Quiet(nn.GroupNorm):
    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight)
        nn.init.uniform_(self.bias)


class Pair(nn.Module):
    """h = norm(x); h = act(h), for any two; conv behind it. `spell` picks how."""

    def __init__(self, norm: nn.Module | None = None, act: Any = None) -> None:
        super().__init__()
        self.norm = norm or nn.GroupNorm(4, 8)
        self.act = act or nn.SiLU()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.act(h)
        return self.conv(h)


class Functions(nn.Module):
    """F.silu, swish by hand, inplace, and a norm whose result is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.GroupNorm(2, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.silu(self.a(x))
        x = x + nonlinearity(self.b(x))
        x = x + F.silu(self.c(x), inplace=True)
        h = self.d(x)
        return F.silu(h) + h


class ResBlock(nn.Module):
    """As in guided-diffusion: two Sequentials; with scale_shift the second one is taken apart."""

    def __init__(
        self, scale_shift: bool, *, updown: bool = False, norm: Callable[..., nn.Module] = nn.GroupNorm
    ) -> None:
        super().__init__()
        self.scale_shift, self.updown = scale_shift, updown
        self.in_layers = nn.Sequential(norm(4, 8), nn.SiLU(), nn.Conv2d(8, 16, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(6, 32 if scale_shift else 16))
        self.out_layers = nn.Sequential(norm(4, 16), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(16, 8, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self._forward, x, emb, use_reentrant=True)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            in_rest, in_conv = self.in_layers[:-1], self.in_layers[-1]
            h = in_conv(F.avg_pool2d(in_rest(x), 1))
        else:
            h = self.in_layers(x)
        e = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = e.chunk(2, 1)
            h = out_norm(h) * (1 + scale) + shift
            h = out_rest(h)
        else:
            h = self.out_layers(h + e)
        return x + h


class Blocks(nn.Sequential):
    """Two blocks behind a Linear that makes the embedding, as one model of one argument."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        emb = x.mean((2, 3))[:, :6]
        for block in self:
            x = block(x, emb)
        return x


def twice(f: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(f)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        return f(self, f(self, x))

    return wrapper


class Decorated(Pair):
    @twice
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.conv(self.act(self.norm(x)))


class Last(nn.Module):
    """The norm's result is the model's, and one that is changed in place between norm and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = 1 * x
        h = self.one(x)
        x += 1
        h = F.silu(h)
        return self.two(h), x


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(net: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) / (p[0].numel() if p.ndim > 1 else 4) ** 0.5 + (p.ndim == 1))
    return net


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).detach().norm() / b.detach().double().norm())


def norm32(groups: int, channels: int) -> nn.Module:
    return GroupNorm32(groups, channels)


# the model, calls of the op and how many of them with the SiLU
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "statements": (Pair, 1, 1),
    "inplace": (lambda: Pair(act=nn.SiLU(inplace=True)), 1, 1),
    "Swish": (lambda: Pair(act=Swish()), 1, 1),
    "swish": (lambda: Pair(act=nonlinearity), 1, 1),
    "F.silu": (lambda: Pair(act=nn.functional.silu), 1, 1),
    "not quite": (lambda: Pair(act=Doubled()), 1, 0),
    "relu": (lambda: Pair(act=nn.ReLU()), 1, 0),
    "sequential": (lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(1, 8), nn.SiLU()), 2, 2),
    "sequential end": (lambda: nn.Sequential(nn.SiLU(), nn.GroupNorm(2, 8)), 1, 0),
    "functions": (Functions, 4, 3),
    "adm": (lambda: Blocks(ResBlock(False), ResBlock(False)), 4, 4),
    "adm scale-shift": (lambda: Blocks(ResBlock(True)), 2, 1),
    "adm updown": (lambda: Blocks(ResBlock(True, updown=True)), 2, 1),
    "adm GroupNorm32": (lambda: Blocks(ResBlock(False, norm=norm32)), 2, 2),
    "decorated": (Decorated, 2, 2),
    "subclass": (lambda: Pair(Quiet(2, 8)), 1, 1),
    "no affine": (lambda: Pair(nn.GroupNorm(2, 8, affine=False)), 1, 1),
    "none": (lambda: nn.Conv2d(8, 8, 1), 0, 0),
}
