"""Which of diffusers' tensors make each of our parameters, for both of its U-Nets."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fastdiff.nn.transformer import Transformer
from fastdiff.nn.unet import UNet

_OLD = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEAVES = {
    "linear1": "linear_1",
    "linear2": "linear_2",
    "time": "time_emb_proj",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "out": "to_out.0",
}
_PARTS = {"qkv": ("to_q", "to_k", "to_v"), "kv": ("to_k", "to_v")}
_TRANSFORMER = {"norm": "norm", "inp": "proj_in", "out": "proj_out"}
_BLOCK = {
    "self_attention.norm": "norm1",
    "self_attention": "attn1",
    "cross.norm": "norm2",
    "cross": "attn2",
    "cross.q": "attn2.to_q",
    "feed.norm": "norm3",
    "feed.gate": "ff.net.0.proj",
    "feed.out": "ff.net.2",
}


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with today's names where it has attention's old ones (query, key, value, proj_attn)."""
    return {_OLD.sub(lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", name): t for name, t in state.items()}


def modules(net: UNet, cond: str = "class_embedding") -> dict[str, str]:
    """Our module's name to diffusers', for everything that holds weights; cond: where `net.cond` is theirs."""
    levels, blocks = len(net.config["mults"]), net.config["blocks"]
    names = {"stem": "conv_in", "time": "time_embedding", "cond": cond}
    names |= {"norm": "conv_norm_out", "out": "conv_out", "middle.0.attention": "mid_block.attentions.0"}
    names |= {f"middle.{j}.res": f"mid_block.resnets.{j}" for j in range(2)}
    for i in range(levels):
        for j in range(blocks):
            k = i * (blocks + 1) + j
            names[f"down.{k}.res"] = f"down_blocks.{i}.resnets.{j}"
            names[f"down.{k}.attention"] = f"down_blocks.{i}.attentions.{j}"
        names[f"down.{i * (blocks + 1) + blocks}"] = f"down_blocks.{i}.downsamplers.0"
        for j in range(blocks + 1):
            k = i * (blocks + 1) + j
            names[f"up.{k}.res"] = f"up_blocks.{i}.resnets.{j}"
            names[f"up.{k}.attention"] = f"up_blocks.{i}.attentions.{j}"
            names[f"up.{k}.resample"] = f"up_blocks.{i}.upsamplers.0"
    for ours, module in net.named_modules():
        if isinstance(module, Transformer):
            top = names[ours]
            names |= {f"{ours}.{name}": f"{top}.{theirs}" for name, theirs in _TRANSFORMER.items()}
            for j in range(len(module.blocks)):
                block = f"{ours}.blocks.{j}.", f"{top}.transformer_blocks.{j}."
                names |= {block[0] + name: block[1] + theirs for name, theirs in _BLOCK.items()}
    return names


def theirs(ours: str, modules: Mapping[str, str]) -> list[str]:
    """diffusers' names of the tensors that make our parameter `ours`, one below the other; three for a packed qkv."""
    parts = ours.split(".")
    cut = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules)
    module, leaf = modules[".".join(parts[:cut])], parts[cut:]
    if leaf[0] in _PARTS:
        return [f"{module}.{name}.{leaf[1]}" for name in _PARTS[leaf[0]]]
    return [".".join([module, *(_LEAVES.get(part, part) for part in leaf)])]
