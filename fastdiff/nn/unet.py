"""The U-Net of diffusion models: one module that is DDPM's, improved and guided diffusion's, or diffusers' UNet2DModel.

    emb = silu(mlp(sinusoid(t)) + class(cond))
    h   = stem(x);  down: blocks x ResBlock (+ attention) a level, then a halving; every result is kept as a skip
    middle: ResBlock, attention, ResBlock;  up: (blocks + 1) x ResBlock on [h, skip] (+ attention) a level, a doubling
    F   = out(silu(norm(h)))

Sources: Ho, Jain & Abbeel 2020, appendix B; Nichol & Dhariwal 2021; Dhariwal & Nichol 2021, section 3 (ADM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.nn.arguments import Cond, batched, check, level, split
from fastdiff.nn.group_norm import GroupNorm
from fastdiff.nn.layers import (
    Attention,
    Deep,
    Down,
    Nearest,
    Pool,
    Projection,
    ResBlock,
    Sinusoid,
    Stage,
    TableRow,
    Up,
    added,
    as_map,
    conv,
    zero,
)
from fastdiff.nn.transformer import Transformer


class UNet(nn.Module):
    """F = net(x, t, cond): predicts eps, x0, v ... from a noisy x (N, in_channels, *spatial) at time t.

    channels       width of the first level where its multiplier is 1; the embedding has 4 times as many (time_channels)
    mults          width of each level as a multiple of channels; every level but the last halves the image
    blocks         ResBlocks a level on the way down; one more on the way up
    attention      downsampling factors (1, 2, 4 ...) of the levels with attention; any image size
    middle         ResBlock, attention, ResBlock at the coarsest level; middle_attention=False leaves attention out;
                   middle_groups: groups of its norm, 0 is no norm, None as `groups`; middle_divisor divides its outputs
    heads          attention heads, one number or one a level, or head_channels: channels a head; neither is one head
    context_channels   attention is a Transformer (`transformer.py`) that also sees a context, cond or cond["context"],
                   (N, M, context_channels); depth: its blocks, one number or one a level (Stable Diffusion's U-Nets)
    groups         of every norm; None is the greatest divisor of 32 that divides every width (32 for most nets)
    eps, dropout   of the norms; after the second norm of every ResBlock
    scale_shift    the embedding scales and shifts behind the norm (ADM); else it is added before (DDPM)
    resample_blocks   halve and double inside ResBlocks (ADM); else by a convolution, or a mean and a repetition with
                   conv_resample=False. asymmetric: the halving pads behind only (DDPM's)
    classes        labels 0 .. classes - 1; label `classes` is the null class (null_class=False: there is none)
    condition      "label"; "number": cond (N,) real, embedded like t; "vector": cond (N, time_channels) is added;
                   "features": cond (N, condition_channels), its projection is added. With a context: cond[condition]
    learned_variance  the output has 2 out_channels, the second half for the variance (Nichol & Dhariwal 2021)
    dims           spatial axes: 1, 2 or 3
    time_scale     t is multiplied by it: 1 for integer steps, 1000 for times in 0..1
    max_period, flip, shift   of the sinusoid, see `fastdiff/ops/time_embed.py`; DDPM's is flip=False, shift=1
    center_input   the network sees 2 x - 1

    `UNet(**net.config)` rebuilds the net. Raises ValueError for numbers that do not fit together.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 128,
        mults: Sequence[float] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (2,),
        middle: bool = True,
        middle_attention: bool = True,
        middle_groups: int | None = None,
        middle_divisor: float = 1.0,
        heads: int | Sequence[int] | None = None,
        head_channels: int | None = None,
        groups: int | None = None,
        eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample_blocks: bool = False,
        conv_resample: bool = True,
        asymmetric: bool = False,
        classes: int | None = None,
        null_class: bool = True,
        condition: str = "label",
        condition_channels: int | None = None,
        context_channels: int | None = None,
        depth: int | Sequence[int] = 1,
        learned_variance: bool = False,
        dims: int = 2,
        time_channels: int | None = None,
        time_scale: float = 1.0,
        max_period: float = 10000.0,
        flip: bool = True,
        shift: float = 0.0,
        center_input: bool = False,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check(**given)
        super().__init__()
        self.config: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        self.in_channels, self.dims, self.center_input = in_channels, dims, center_input
        self.out_channels = (out_channels or in_channels) * (2 if learned_variance else 1)
        self.classes, self.null_class, self.condition = classes, null_class, condition
        self.context_channels = context_channels
        self.factor = 2 ** (len(mults) - 1)
        widths = [round(channels * m) for m in mults]
        groups = groups or math.gcd(32, *widths)
        time_channels = time_channels or 4 * channels
        sinusoid = partial(
            Sinusoid, channels, time_channels, time_scale=time_scale, max_period=max_period, flip=flip, shift=shift
        )
        self.time = sinusoid()
        self.cond: nn.Module | None = None
        if condition == "number":
            self.cond = sinusoid()
        elif classes is not None:
            self.cond = nn.Embedding(classes + null_class, time_channels)
        elif condition_channels is not None:
            self.cond = Projection(condition_channels, time_channels)
        block = partial(
            ResBlock,
            dims=dims,
            time_channels=time_channels,
            groups=groups,
            eps=eps,
            dropout=dropout,
            scale_shift=scale_shift,
        )

        def attend(i: int, **other: Any) -> nn.Module:
            given = {"groups": groups, "heads": level(heads, i), "head_channels": head_channels}
            if context_channels is not None:
                return Transformer(widths[i], **given, context_channels=context_channels, depth=level(depth, i))
            return Attention(widths[i], **given | {"eps": eps} | other)

        def resample(width: int, way: str) -> nn.Module:
            if resample_blocks:
                return block(width, width, resample=way)
            if not conv_resample:
                return Pool(dims) if way == "down" else Nearest()
            return Down(width, dims=dims, asymmetric=asymmetric) if way == "down" else Up(width, dims=dims)

        attends = [partial(attend, i) if 2**i in attention else None for i in range(len(mults))]
        self.stem = conv(dims, in_channels, widths[0], 3)
        self.down, skips = _down(widths, blocks, attends, block, resample)
        self.middle = nn.ModuleList()
        if middle:
            wide, block_middle = widths[-1], partial(block, divisor=middle_divisor)
            middle_groups = groups if middle_groups is None else middle_groups
            last = partial(attend, len(mults) - 1, groups=middle_groups, divisor=middle_divisor)
            at = last() if middle_attention else None
            self.middle = nn.ModuleList([Stage(block_middle(wide, wide), at), Stage(block_middle(wide, wide))])
        self.up = _up(widths, blocks, attends, block, resample, skips)
        self.columns = 0
        for res in self.res_blocks():
            res.columns = (self.columns, self.columns + res.time.out_features)
            self.columns = res.columns[1]
        self.norm = GroupNorm(groups, widths[0], eps, act="silu")
        self.out = zero(conv(dims, widths[0], self.out_channels, 3))

    def forward(
        self,
        x: Tensor,
        t: Tensor | float | None,
        cond: Cond = None,
        *,
        table_row: Tensor | None = None,
        deep: Deep | None = None,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """F (N, out, *spatial) in the parameters' dtype.

        x (N, in_channels, *spatial), sizes divisible by `net.factor`; t (N,), or one number for all; cond (N,), or one
        for all; None is the null class where there are classes. table_row: lines of `time_table`, one for all images or
        one an image, in place of t and cond, of which only a context is then looked at. deep: the part that runs less
        often, not for gradients. residuals: one tensor a skip, the stem's first, and one for the middle's result, which
        are added there (ControlNet, Zhang 2023). Raises ValueError for other shapes.
        """
        emb = self.embed(t, cond, x) if table_row is None else self._line(table_row, x)
        context = self.context(cond, x)
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"UNet: x has shape {tuple(x.shape)}; this net takes (N, {self.in_channels}, "
                f"{', '.join('DHW'[-self.dims :])})"
            )
        if any(s % self.factor for s in x.shape[2:]):
            raise ValueError(
                f"UNet: x has spatial size {tuple(x.shape[2:])}; this net halves it {len(self.config['mults']) - 1} "
                f"times, so every size must be a multiple of {self.factor}; pad or crop x"
            )
        if residuals is not None and (deep is not None or len(residuals) != len(self.down) + 2):
            raise ValueError(
                f"UNet: {len(residuals)} residuals; accepted: {len(self.down) + 2}, one a skip and the middle's, "
                "and no deep part beside them"
            )
        x = x.to(self.time.linear1.weight.dtype)
        h = self.stem(2 * x - 1 if self.center_input else x)
        F: Tensor = self.out(self.norm(self._body(h, emb, context, deep, residuals)))
        return F

    def _body(
        self,
        h: Tensor,
        emb: Tensor | TableRow,
        context: Tensor | None,
        deep: Deep | None,
        residuals: Sequence[Tensor] | None,
    ) -> Tensor:
        """Down, middle and up; where the deep part is not to run, only what lies above it."""
        skips = [h]
        for down in self.down if deep is None or deep.fresh else self.down[: deep.stages - 1]:
            h = down(h, emb, None, context) if isinstance(down, Stage) else down(h, emb)
            skips.append(h)
        if residuals is not None:
            skips = [added(skip, r) for skip, r in zip(skips, residuals[:-1], strict=True)]
        up = list(self.up)
        above = len(up) if deep is None else deep.stages
        if deep is not None and not deep.fresh:
            h = deep.kept
        else:
            for stage in self.middle:
                h = stage(h, emb, None, context)
            if residuals is not None:
                h = added(h, residuals[-1])
            for stage in up[: len(up) - above]:
                h = stage(h, emb, skips.pop(), context)
            if deep is not None:
                deep.kept.copy_(as_map(h).x)
        for stage in up[-above:]:
            h = stage(h, emb, skips.pop(), context)
        return h

    def context(self, cond: Cond, x: Tensor) -> Tensor | None:
        """What the transformers see, in the parameters' dtype."""
        if self.context_channels is None:
            return None
        _, context = split(cond, self.condition)
        if context is None or context.ndim != 3 or context.shape[::2] != (x.shape[0], self.context_channels):
            got = None if context is None else tuple(context.shape)
            raise ValueError(
                f"UNet: the context has shape {got}; this net takes cond, or cond['context'], of shape "
                f"({x.shape[0]}, M, {self.context_channels})"
            )
        return context.to(self.time.linear1.weight.dtype)

    def deep_shape(self, shape: Sequence[int], stages: int) -> tuple[int, ...]:
        """Of `Deep.kept`, for an x of this shape. Raises ValueError for stages that the way up does not have."""
        if not 1 <= stages <= len(self.up):
            raise ValueError(f"UNet: stages={stages} of the way up; accepted: 1 to {len(self.up)}")
        mults, each = self.config["mults"], self.config["blocks"] + 1
        width = round(self.config["channels"] * mults[min(stages // each, len(mults) - 1)])
        return (shape[0], width, *(size >> ((stages - 1) // each) for size in shape[2:]))

    def res_blocks(self) -> list[ResBlock]:
        """Every ResBlock, in the order in which forward runs them."""
        return [m for part in (self.down, self.middle, self.up) for m in part.modules() if isinstance(m, ResBlock)]

    def time_table(self, t: Tensor, cond: Cond = None) -> Tensor:
        """(K, columns): what all ResBlocks make of K times t and conditions, as one matrix product before the loop.

        t (K,); cond (K,), or one for all, as in forward. `net(x, None, table_row=table.index_select(0, k))` is then
        `net(x, t[k], cond[k])` to rounding, where k is a tensor of one number or of one an image.
        """
        times = [block.time for block in self.res_blocks()]
        weight, bias = torch.cat([m.weight for m in times]), torch.cat([m.bias for m in times])
        return functional.linear(self.embed(t, cond, t), weight, bias)

    def _line(self, row: Tensor, x: Tensor) -> TableRow:
        if row.shape not in ((1, self.columns), (x.shape[0], self.columns)):
            raise ValueError(
                f"UNet: table_row has shape {tuple(row.shape)}; accepted: lines of net.time_table, "
                f"(1, {self.columns}) or ({x.shape[0]}, {self.columns})"
            )
        return TableRow(row[0] if row.shape[0] == 1 else row)

    def told(self, cond: Cond) -> Cond:
        """What `embed` looks at of a condition, in a form that it takes."""
        if self.context_channels is None:
            return cond
        own, _ = split(cond, self.condition)
        return None if own is None else {self.condition: own}

    def embed(self, t: Tensor | float | None, cond: Cond, x: Tensor) -> Tensor:
        """What every ResBlock is told: silu(mlp(sinusoid(t)) + class(cond)), (N, time_channels), N and device x's."""
        if self.context_channels is not None:
            cond, _ = split(cond, self.condition)
        if isinstance(cond, Mapping):
            raise ValueError("UNet: cond is a dict; this net has no context, pass a tensor")
        if t is None:
            raise ValueError("UNet: t is None; pass a time, or table_row=")
        n = x.shape[0]
        emb: Tensor = self.time(batched("t", torch.as_tensor(t, device=x.device), n))
        if self.condition in ("vector", "features"):
            width = self.config["condition_channels"] if self.condition == "features" else emb.shape[1]
            if cond is None or cond.shape != (n, width):
                got = None if cond is None else tuple(cond.shape)
                raise ValueError(f"UNet: cond has shape {got}; this net adds {self.condition} of shape {(n, width)}")
            return functional.silu(emb + (cond.to(emb.dtype) if self.cond is None else self.cond(cond)))
        if self.cond is None:
            if cond is not None:
                raise ValueError("UNet: cond was given to a net without classes; pass cond=None")
            return functional.silu(emb)
        if cond is None:
            cond = self.null(torch.zeros(n, dtype=torch.int64, device=x.device))
        if self.condition == "label" and cond.is_floating_point():
            raise ValueError(f"UNet: cond has dtype {cond.dtype}; labels are integers, pass cond.long()")
        return functional.silu(emb + self.cond(batched("cond", cond, n)))

    def null(self, cond: Tensor) -> Tensor:
        """The null class in cond's shape, as a call without cond is told. Raises ValueError where there is none."""
        if self.context_channels is not None:
            raise ValueError(
                "UNet: the null condition of a net with a context is the context of no text, which it does not know; "
                "pass fd.cfg(w, null=...)"
            )
        if self.classes is None or not self.null_class:
            raise ValueError(
                "UNet: this net has no null class (classes=None or null_class=False); pass cond, and for guidance "
                "the label that training used for no class"
            )
        return torch.full_like(cond, self.classes)


def _down(
    widths: list[int],
    blocks: int,
    attends: Sequence[Callable[..., nn.Module] | None],
    block: Callable[..., ResBlock],
    resample: Callable[[int, str], nn.Module],
) -> tuple[nn.ModuleList, list[int]]:
    """The way down, and the width of every skip that it leaves, the stem's first."""
    layers, skips = nn.ModuleList(), [widths[0]]
    for i, (width, attend) in enumerate(zip(widths, attends, strict=True)):
        for _ in range(blocks):
            layers.append(Stage(block(skips[-1], width), attend and attend()))
            skips.append(width)
        if i < len(widths) - 1:
            layers.append(resample(width, "down"))
            skips.append(width)
    return layers, skips


def _up(
    widths: list[int],
    blocks: int,
    attends: Sequence[Callable[..., nn.Module] | None],
    block: Callable[..., ResBlock],
    resample: Callable[[int, str], nn.Module],
    skips: list[int],
) -> nn.ModuleList:
    """The way up: one stage a skip, numbered like guided-diffusion's output blocks."""
    layers, inputs = nn.ModuleList(), widths[-1]
    for i, width in reversed(list(enumerate(widths))):
        attend = attends[i]
        for j in range(blocks + 1):
            up = resample(width, "up") if i > 0 and j == blocks else None
            layers.append(Stage(block(inputs + skips.pop(), width), attend and attend(), up))
            inputs = width
    assert not skips
    return layers
