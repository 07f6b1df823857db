"""Puts our own convolutions into a twin of a U-Net, see `convolved.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fastdiff.nn.attended import ConvolvedAttention, OneHead, folded_bias, folded_weight
from fastdiff.nn.convolved import Centered, Convolved, ConvolvedResBlock, Last, Passed, Resampled
from fastdiff.nn.follow import Packer
from fastdiff.nn.group_norm import GroupNorm
from fastdiff.nn.layers import Attention, Down, Nearest, Pool, ResBlock, Up
from fastdiff.nn.transformed import ConvolvedTransformer, Projected, ProjectedBlock
from fastdiff.nn.transformer import Transformer
from fastdiff.nn.unet import UNet
from fastdiff.ops import dispatch
from fastdiff.ops.norm_linear import linear_panels
from fastdiff.ops.norm_silu_conv import panels


def takes(packer: Packer, net: UNet) -> bool:
    """Whether there are convolutions of ours for the net: of images, in float32, on a CPU with compiled kernels."""
    images = net.dims == 2 and packer.dtype is torch.float32 and packer.device.type == "cpu"
    return images and packer.channels_last and dispatch.reason("norm_silu_conv", "cpp") is None


def has(twin: UNet) -> bool:
    """Whether `twin` has them."""
    return isinstance(twin.out, Last)


def convolutions(twin: UNet, packer: Packer) -> None:
    """Swap every module of `twin` that convolves."""
    # a ResBlock pools and repeats by itself
    for parent in [m for m in twin.modules() if not isinstance(m, (ResBlock, Up))]:
        for name, child in list(parent.named_children()):
            made = _made(child, packer)
            if made is not None:
                setattr(parent, name, made)
    net: Any = twin
    net.out, net.norm = Last(_conv(net.out, packer, net.norm)), Passed()
    stem = _conv(net.stem, packer)
    net.stem, net.center_input = Centered(stem) if net.center_input else stem, False


def _made(child: nn.Module, packer: Packer) -> nn.Module | None:
    """What stands for a module, None for one that stays."""
    make = _MAKERS.get(type(child))
    return None if make is None else make(child, packer)


def _conv(layer: Any, packer: Packer, norm: GroupNorm | None = None, **options: Any) -> Convolved:
    """Of a convolution, or of a Linear, which is one of window 1."""
    p, bias = layer._parameters["weight"], layer._parameters["bias"]
    if isinstance(layer, nn.Linear):
        outputs, size = layer.out_features, 1
        weight = packer.derive(lambda w: panels(w[..., None, None]), p)
    else:
        outputs, size = layer.out_channels, layer.kernel_size[0]
        weight = packer.derive(panels, p)
    return Convolved(weight, bias, outputs, size, norm, **options)


def _attention(attention: Attention, packer: Packer) -> nn.Module:
    # with more heads the folded projections are larger than those that they save
    if attention.heads == 1 and attention.norm is not None:
        return _one_head(attention, packer)
    return ConvolvedAttention(attention, _conv(attention.qkv, packer, attention.norm), _conv(attention.out, packer))


def _one_head(attention: Any, packer: Packer) -> OneHead:
    qkv, out = attention.qkv._parameters, attention.out._parameters
    weight = packer.derive(lambda *p: panels(folded_weight(*p)[..., None, None]), qkv["weight"], out["weight"])
    bias = packer.derive(folded_bias, qkv["weight"], qkv["bias"], out["weight"], out["bias"])
    return OneHead(attention, Convolved(weight, bias, 2 * attention.out.out_features, 1, attention.norm, append=True))


def _res_block(block: ResBlock, packer: Packer) -> ConvolvedResBlock:
    pools = isinstance(block.resample, Pool)
    conv1 = _conv(block.conv1, packer, None if pools else block.norm1, upsample=isinstance(block.resample, Nearest))
    conv2 = _conv(block.conv2, packer, block.norm2)
    shortcut = None if block.shortcut is None else _conv(block.shortcut, packer)
    empty: Any = block
    for name in ("conv1", "norm2", "conv2", "shortcut", *(() if pools else ("norm1",))):
        setattr(empty, name, None)
    return ConvolvedResBlock(block, conv1, conv2, shortcut)


def _linear(layer: Any, packer: Packer, norm: nn.LayerNorm | None = None, *, gate: bool = False) -> Projected:
    p, bias = layer._parameters["weight"], layer._parameters["bias"]
    weight = packer.derive(partial(linear_panels, gate=gate), p)
    return Projected(weight, bias, layer.out_features // (2 if gate else 1), norm, gate=gate)


def _transformer_block(block: Any, packer: Packer) -> ProjectedBlock:
    own, cross, feed = block.self_attention, block.cross, block.feed
    return ProjectedBlock(
        own.heads,
        qkv=_linear(own.qkv, packer, own.norm),
        self_out=_linear(own.out, packer),
        q=_linear(cross.q, packer, cross.norm),
        kv=_linear(cross.kv, packer),
        cross_out=_linear(cross.out, packer),
        gate=_linear(feed.gate, packer, feed.norm, gate=True),
        feed_out=_linear(feed.out, packer),
    )


def _transformer(child: Any, packer: Packer) -> ConvolvedTransformer:
    blocks = [_transformer_block(block, packer) for block in child.blocks]
    return ConvolvedTransformer(_conv(child.inp, packer, child.norm), blocks, _conv(child.out, packer))


_MAKERS: dict[type[nn.Module], Callable[[Any, Packer], nn.Module]] = {
    ResBlock: _res_block,
    Attention: _attention,
    Transformer: _transformer,
    Up: lambda up, packer: _conv(up.conv, packer, upsample=True),
    Down: lambda down, packer: _conv(down.conv, packer, stride=2, asymmetric=down.pad is not None),
    Pool: lambda pool, _: Resampled(pool),
    Nearest: lambda nearest, _: Resampled(nearest),
}
