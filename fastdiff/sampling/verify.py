"""`fd.verify`: the fused path against the reference, on the user's own network.

Of a Denoiser the whole sampler is compared, step by step; of any other module, one call.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.report import Report
from fastdiff.sampling.verify_module import verify_module
from fastdiff.sampling.verify_sampler import verify_sampler


def verify(model: Denoiser | nn.Module, *inputs: Any, **given: Any) -> Report:
    """Compare the fused path with the reference on a network of your own; `print` the report, ask it `.ok`.

        fd.verify(den)                                   # or (den, shape, steps=4, cond=..., guidance=..., ...)
        fd.verify(model, x, t, class_labels=labels)      # any module, called with these

    A Denoiser: `fd.sample` as `fd.auto` runs it, the network prepared where it is a fastdiff.UNet, against the
    reference backend on the network as it was, same seed and noise. There is a line for each step, with the errors of x
    and x0 where both start it at the reference's x, and one for the images of all steps. Their bound is 1e-5, or 2e-5
    with Winograd's convolutions, times what the rows make of an error of the network's output where that is above 1
    (eps-prediction from nearly pure noise, too few steps); of a network in 16 bits, twice the reference's own error
    against the network in float32 besides. shape: (N, C, *spatial), else two images of
    den.meta["shape"]; cond: classes in turn unless given; exact: as in `den.prepare`; run, solver, spacing, seed,
    index, x, guidance, clip and a solver's options as in `fd.sample`.

    A module, in evaluation mode: what the inputs give with `fd.patch` (undone after), a fastdiff.UNet prepared, a
    module that has its `original` as it is; against the module as it was, and both against it in float64 where it can
    be cast: the fused path's error must not exceed twice PyTorch's own, or 2e-5 where that is more and convolutions
    may be Winograd's. A module that draws random numbers is none to compare. Raises TypeError for anything else,
    ValueError where a shape is missing.
    """
    if isinstance(model, Denoiser):
        return verify_sampler(model, *inputs, **given)
    if isinstance(model, nn.Module):
        return verify_module(model, inputs, given)
    raise TypeError(f"verify: model is a {type(model).__name__}; pass a fd.Denoiser, or a torch.nn.Module with inputs")
