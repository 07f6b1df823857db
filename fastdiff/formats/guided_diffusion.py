"""guided-diffusion's `UNetModel` (Dhariwal & Nichol 2021), and those of programs that took it over, as our `UNet`.

Found by its attributes, since everybody has a copy: what they mean is taken from its modules, and `fd.optimize`
compares a small call with the model's own before it believes that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.formats.diffusers.forward import Call, times
from fastdiff.formats.lora import NotRead
from fastdiff.formats.names import Parts
from fastdiff.nn.unet import UNet

_ATTRIBUTES = (
    "model_channels",
    "num_res_blocks",
    "attention_resolutions",
    "channel_mult",
    "conv_resample",
    "num_classes",
)
_MODULES = ("time_embed", "input_blocks", "middle_block", "output_blocks", "out")
_LEAVES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}


def is_one(model: nn.Module) -> bool:
    """Whether a module has what guided-diffusion's network has."""
    named = type(model).__qualname__ == "UNetModel" and set(_MODULES) <= model._modules.keys()
    return named and all(hasattr(model, name) for name in _ATTRIBUTES)


def _of(model: nn.Module, name: str) -> list[Any]:
    return [m for m in model.modules() if type(m).__qualname__ == name]


def _keywords(model: Any) -> dict[str, Any]:
    """The keywords of `UNet`. Raises NotRead."""
    stem, norm, last = model.input_blocks[0][0], model.out[0], model.out[2]
    blocks, attentions = _of(model, "ResBlock"), _of(model, "AttentionBlock")
    if type(stem) is not nn.Conv2d or not blocks or not isinstance(norm, nn.GroupNorm):
        raise NotRead("UNetModel is not built of 2-d convolutions, ResBlocks and GroupNorm")
    heads = {m.num_heads for m in attentions}
    per_head = {m.channels // m.num_heads for m in attentions}
    if len(heads) > 1 and len(per_head) > 1:
        raise NotRead("UNetModel's attention has neither one number of heads nor one of their channels")
    return {
        "in_channels": stem.in_channels,
        "out_channels": last.out_channels,
        "channels": model.model_channels,
        "mults": list(model.channel_mult),
        "blocks": model.num_res_blocks,
        "attention": sorted(model.attention_resolutions),
        "middle_attention": any(type(m).__qualname__ == "AttentionBlock" for m in model.middle_block),
        "heads": heads.pop() if len(heads) == 1 else None,
        "head_channels": per_head.pop() if len(heads) > 1 else None,
        "groups": norm.num_groups,
        "eps": norm.eps,
        "dropout": float(getattr(blocks[0], "dropout", 0.0)),
        "scale_shift": bool(blocks[0].use_scale_shift_norm),
        "resample_blocks": any(getattr(b, "updown", False) for b in blocks),
        "conv_resample": bool(model.conv_resample),
        "classes": model.num_classes,
        "null_class": False,
    }


def read(model: Any) -> tuple[UNet, dict[str, Parts]]:
    """(our net without memory; our parameter: the tensors of theirs that make it). Raises NotRead, ValueError."""
    with torch.device("meta"):
        net = UNet(**_keywords(model))
    modules = _modules(net)
    legacy = any(type(m.attention).__qualname__ == "QKVAttentionLegacy" for m in _of(model, "AttentionBlock"))
    heads = {f"{name}.qkv": m.heads for name, m in net.named_modules() if legacy and hasattr(m, "qkv")}
    names = {}
    for ours in net.state_dict():
        module, _, leaf = ours.rpartition(".")
        names[ours] = Parts([f"{modules[module]}.{leaf}"], heads.get(module, 0))
    return net, names


def _modules(net: UNet) -> dict[str, str]:
    """Our module's name to guided-diffusion's, for everything that holds weights."""
    names = {"stem": "input_blocks.0.0", "norm": "out.0", "out": "out.2", "cond": "label_emb"}
    names |= {"time.linear1": "time_embed.0", "time.linear2": "time_embed.2"}
    places = {f"down.{i}": f"input_blocks.{i + 1}" for i in range(len(net.down))}
    places |= {f"up.{i}": f"output_blocks.{i}" for i in range(len(net.up))}
    for ours, theirs in places.items():
        stage: Any = net.get_submodule(ours)
        if hasattr(stage, "res"):
            parts = [name for name in ("res", "attention", "resample") if getattr(stage, name) is not None]
            names |= _stage(ours, {part: f"{theirs}.{i}" for i, part in enumerate(parts)})
        else:
            names |= _block(ours, f"{theirs}.0") | {f"{ours}.conv": f"{theirs}.0.op"}
    last = 2 if net.config["middle_attention"] else 1
    names |= _stage("middle.0", {"res": "middle_block.0", "attention": "middle_block.1"})
    return names | _stage("middle.1", {"res": f"middle_block.{last}"})


def _stage(ours: str, parts: Mapping[str, str]) -> dict[str, str]:
    names = _block(f"{ours}.res", parts["res"])
    if "attention" in parts:
        names |= {f"{ours}.attention.{name}": f"{parts['attention']}.{theirs}" for name, theirs in _ATTENTION.items()}
    if "resample" in parts:
        up = parts["resample"]
        names |= _block(f"{ours}.resample", up) | {f"{ours}.resample.conv": f"{up}.conv"}
    return names


def _block(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{name}": f"{theirs}.{leaf}" for name, leaf in _LEAVES.items()}


def call(model: Any, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Call:
    """UNetModel.forward."""
    if (y is None) != (model.num_classes is None):
        raise NotRead("the call has labels where the model has no classes, or none where it has")
    return Call(x, times(timesteps, x), y)


def result(model: Any, F: Tensor, call: Call) -> Tensor:
    """What the model's own forward returns."""
    return F
