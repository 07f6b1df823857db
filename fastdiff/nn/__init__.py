"""The modules: `GroupNorm`, a drop-in for torch's and apex's, `UNet` and its parts, `prepare` for inference."""

from fastdiff.nn.group_norm import GroupNorm
from fastdiff.nn.layers import Attention, ResBlock, Sinusoid
from fastdiff.nn.prepare import PreparedUNet, Tactics, prepare
from fastdiff.nn.transformer import Transformer
from fastdiff.nn.unet import UNet

__all__ = [
    "Attention",
    "GroupNorm",
    "PreparedUNet",
    "ResBlock",
    "Sinusoid",
    "Tactics",
    "Transformer",
    "UNet",
    "prepare",
]
