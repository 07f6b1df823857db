"""The modules: `GroupNorm`, a drop-in for torch's and apex's, `UNet`, and what a U-Net is made of."""

from fastdiff.nn.group_norm import GroupNorm
from fastdiff.nn.layers import Attention, ResBlock, Sinusoid
from fastdiff.nn.unet import UNet

__all__ = ["Attention", "GroupNorm", "ResBlock", "Sinusoid", "UNet"]
