"""diffusers' `UNet2DModel` as our `UNet`: what its config means, and which of its tensors make each of ours.

Whatever would change the result and is not understood is a ValueError that names the key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.formats.diffusers.schedule import one_of, refuse
from fastdiff.nn.unet import UNet

_UNET: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""The keys of a UNet2DModel's config and what diffusers takes where one is absent."""


def _levels(c: Mapping[str, Any]) -> tuple[list[int], bool]:
    """The downsampling factors of the levels with attention, and whether ResBlocks do the resampling."""
    n, attention, ways = len(c["block_out_channels"]), {}, set()
    for side, other in (("down", "Downsample"), ("up", "Upsample")):
        key = f"{side}_block_types"
        plain, attn, resnet = (f"{side.title()}Block2D", f"Attn{side.title()}Block2D", f"Resnet{other}Block2D")
        types = [str(name).removeprefix("UNetRes") for name in c[key]]
        if len(types) != n or not set(types) <= {plain, attn, resnet}:
            raise refuse(key, list(c[key]), f"{n} of {plain}, {attn}, {resnet}, one a level")
        one_of(c, f"{side}sample_type", "conv", "resnet")
        # the last block of each way does not resample, so its kind says nothing
        ways |= {"resnet" if name == resnet else "conv" for name in types[:-1] if name != attn}
        ways |= {c[f"{side}sample_type"] for name in types[:-1] if name == attn}
        attention[side] = [name == attn for name in types]
    if attention["down"] != attention["up"][::-1]:
        raise refuse("up_block_types", list(c["up_block_types"]), "attention at the levels of down_block_types")
    if len(ways) > 1:
        raise refuse(
            "down_block_types", list(c["down_block_types"]), "one kind of resampling, conv or resnet, at all levels"
        )
    return [2**i for i, here in enumerate(attention["down"]) if here], ways == {"resnet"}


def _keywords(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `UNet` that a UNet2DModel's config means."""
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise refuse("_class_name", config["_class_name"], "'UNet2DModel'")
    unknown = [k for k in config if k not in _UNET and not k.startswith("_")]
    if unknown:
        raise refuse(unknown[0], config[unknown[0]], f"the keys of UNet2DModel, {', '.join(_UNET)}")
    c = {**_UNET, **config}
    one_of(c, "time_embedding_type", "positional")
    one_of(c, "act_fn", "silu", "swish")
    scale_shift = one_of(c, "resnet_time_scale_shift", "default", "scale_shift") == "scale_shift"
    middle = one_of(c, "mid_block_type", "UNetMidBlock2D", None) is not None
    kind = one_of(c, "class_embed_type", None, "timestep", "identity")
    attention, resample_blocks = _levels(c)
    widths, head = c["block_out_channels"], c["attention_head_dim"]
    with_attention = [w for i, w in enumerate(widths) if 2**i in attention] + [widths[-1]] * bool(c["add_attention"])
    if head is not None and any(w % head for w in with_attention):
        raise refuse("attention_head_dim", head, f"None or a common divisor of the widths {with_attention}")
    groups = c["norm_num_groups"]
    if not isinstance(groups, int) or groups < 1 or any(w % groups for w in widths):
        raise refuse("norm_num_groups", groups, f"a common divisor of the widths {list(widths)}")
    # diffusers leaves the middle attention's norm out where the embedding scales and shifts
    middle_groups = c["attn_norm_num_groups"] or (0 if scale_shift else None)
    doubled = c["out_channels"] == 2 * c["in_channels"]
    return {
        "in_channels": c["in_channels"],
        "out_channels": c["in_channels"] if doubled else c["out_channels"],
        "learned_variance": doubled,
        "channels": widths[0],
        "mults": [w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths],
        "blocks": c["layers_per_block"],
        "attention": attention,
        "middle": middle,
        "middle_attention": c["add_attention"],
        "middle_groups": middle_groups,
        "middle_divisor": c["mid_block_scale_factor"],
        "head_channels": head,
        "groups": groups,
        "eps": c["norm_eps"],
        "dropout": c["dropout"],
        "scale_shift": scale_shift,
        "resample_blocks": resample_blocks,
        "asymmetric": one_of(c, "downsample_padding", 0, 1) == 0,
        "classes": c["num_class_embeds"] if kind is None else None,
        "null_class": False,
        "condition": {None: "label", "timestep": "number", "identity": "vector"}[kind],
        "time_channels": c["time_embedding_dim"],
        "flip": c["flip_sin_to_cos"],
        "shift": c["freq_shift"],
        "center_input": c["center_input_sample"],
    }


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEAVES = {
    "linear1": "linear_1",
    "linear2": "linear_2",
    "time": "time_emb_proj",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "out": "to_out.0",
}


def _modules(levels: int, blocks: int) -> dict[str, str]:
    """Our module's name to diffusers', for everything that holds weights."""
    names = {"stem": "conv_in", "time": "time_embedding", "cond": "class_embedding"}
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
    return names


def _theirs(ours: str, modules: Mapping[str, str]) -> list[str]:
    """diffusers' names of the tensors that make our parameter `ours`; three for a packed qkv."""
    parts = ours.split(".")
    cut = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules)
    module, leaf = modules[".".join(parts[:cut])], parts[cut:]
    if leaf[0] == "qkv":
        return [f"{module}.{name}.{leaf[1]}" for name in ("to_q", "to_k", "to_v")]
    return [".".join([module, *(_LEAVES.get(part, part) for part in leaf)])]


def convert_unet2d(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> UNet:
    """A diffusers UNet2DModel as our `UNet`, with its weights; parameters narrower than float32 are widened to it.

    config: as in its config.json. state: its state_dict, with the old attention names (query, key, value, proj_attn) or
    the new ones. A net with num_class_embeds has these classes and no null class: diffusers does not say which label
    means none. out_channels = 2 in_channels is taken for a learned variance. Raises ValueError naming the key of the
    config that is not supported, or the weights that are missing, left over or of another shape.
    """
    keywords = _keywords(config)
    with torch.device("meta"):
        net = UNet(**keywords)
    old = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.")
    given = {old.sub(lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", name): t for name, t in state.items()}
    modules = _modules(len(keywords["mults"]), keywords["blocks"])
    ours = {name: (p.shape, _theirs(name, modules)) for name, p in net.state_dict().items()}
    wanted = {t for _, names in ours.values() for t in names}
    wrong = [f"{name} is missing" for name in sorted(wanted - given.keys())]
    wrong += [f"{name} is left over" for name in sorted(given.keys() - wanted)]
    weights = {}
    for name, (shape, names) in ours.items():
        if not all(n in given for n in names):
            continue
        part = (shape[0] // len(names), *shape[1:])
        bad = [n for n in names if tuple(given[n].shape) != part]
        wrong += [f"{n} has shape {tuple(given[n].shape)}, not {part}" for n in bad]
        if not bad:
            t = torch.cat([given[n] for n in names])
            weights[name] = t.to(torch.promote_types(t.dtype, torch.float32))
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"diffusers: the weights do not fit the config: {'; '.join(wrong[:4])}{more}; "
            "take config.json and the weights from one checkpoint"
        )
    net.load_state_dict(weights, assign=True)
    return net
