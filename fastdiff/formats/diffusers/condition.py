"""What the config of diffusers' `UNet2DConditionModel` (Stable Diffusion's U-Net) means for our `UNet`.

Whatever would change the result and is not understood is a ValueError that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.formats.diffusers.refusal import one_of, refuse
from fastdiff.ops.time_embed import time_embed

_UNET: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
}
"""The keys of a UNet2DConditionModel's config that we follow, and what diffusers takes where one is absent."""

_SILENT = {"use_linear_projection", "upcast_attention", "addition_embed_type_num_heads"}
"""The same numbers in another shape or precision, or nothing once the fixed ones have their values."""

_FIXED: dict[str, Any] = {
    "only_cross_attention": False,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
"""Keys that only have the value given here: any other changes the result in a way that we do not follow."""


def _levels(c: Mapping[str, Any]) -> list[int]:
    """The downsampling factors of the levels with a transformer."""
    n, attention = len(c["block_out_channels"]), {}
    for side in ("down", "up"):
        plain, cross = f"{side.title()}Block2D", f"CrossAttn{side.title()}Block2D"
        types = list(c[f"{side}_block_types"])
        if len(types) != n or not set(types) <= {plain, cross}:
            raise refuse(f"{side}_block_types", types, f"{n} of {plain}, {cross}, one a level")
        attention[side] = [kind == cross for kind in types]
    if attention["down"] != attention["up"][::-1]:
        raise refuse("up_block_types", list(c["up_block_types"]), "attention at the levels of down_block_types")
    return [2**i for i, here in enumerate(attention["down"]) if here]


def _alike(c: Mapping[str, Any], key: str) -> Any:
    """The one number that a key has at all levels."""
    found = c[key]
    if isinstance(found, Sequence):
        if len(set(found)) != 1:
            raise refuse(key, list(found), "one number at all levels")
        return found[0]
    return found


def _plain(v: Any) -> Any:
    return list(v) if isinstance(v, Sequence) else v


def _condition(c: Mapping[str, Any]) -> dict[str, Any]:
    """What is added to the time embedding."""
    kind = one_of(c, "class_embed_type", None, "timestep", "identity", "projection")
    text = one_of(c, "addition_embed_type", None, "text_time") is not None
    if text and (kind or c["num_class_embeds"]):
        raise refuse("addition_embed_type", "text_time", "None beside classes")
    if text or kind == "projection":
        return {"condition": "features", "condition_channels": c["projection_class_embeddings_input_dim"]}
    names = {None: "label", "timestep": "number", "identity": "vector"}
    return {"condition": names[kind], "classes": c["num_class_embeds"] if kind is None else None, "null_class": False}


def keywords(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `UNet` that a UNet2DConditionModel's config means."""
    known = {**_UNET, **_FIXED}
    unknown = [k for k in config if k not in known and k not in _SILENT and not k.startswith("_")]
    if unknown:
        raise refuse(unknown[0], config[unknown[0]], f"the keys of UNet2DConditionModel, {', '.join(known)}")
    c = {**known, **config}
    for key, value in _FIXED.items():
        # an absent choice is written False or null
        if c[key] != value and (c[key] or value):
            raise refuse(key, c[key], repr(value))
    one_of(c, "act_fn", "silu", "swish")
    middle = one_of(c, "mid_block_type", "UNetMidBlock2DCrossAttn", None) is not None
    widths, groups = c["block_out_channels"], c["norm_num_groups"]
    if not isinstance(groups, int) or groups < 1 or any(w % groups for w in widths):
        raise refuse("norm_num_groups", groups, f"a common divisor of the widths {list(widths)}")
    return {
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "channels": widths[0],
        "mults": [w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths],
        "blocks": _alike(c, "layers_per_block"),
        "attention": _levels(c),
        "middle": middle,
        "middle_divisor": c["mid_block_scale_factor"],
        # what diffusers calls attention_head_dim is the number of heads
        "heads": _plain(c["attention_head_dim"]),
        "context_channels": _alike(c, "cross_attention_dim"),
        "depth": _plain(c["transformer_layers_per_block"]),
        "groups": groups,
        "eps": c["norm_eps"],
        "dropout": c["dropout"],
        "scale_shift": one_of(c, "resnet_time_scale_shift", "default", "scale_shift") == "scale_shift",
        "asymmetric": one_of(c, "downsample_padding", 0, 1) == 0,
        **_condition(c),
        "time_channels": c["time_embedding_dim"],
        "flip": c["flip_sin_to_cos"],
        "shift": c["freq_shift"],
        "center_input": c["center_input_sample"],
    }


def text_features(config: Mapping[str, Any], text: Tensor, time_ids: Tensor) -> Tensor:
    """What SDXL's U-Net takes as cond["features"]: [text, the sinusoids of all time_ids], (N, condition_channels).

    text (N, D), the pooled embedding; time_ids (N, 6), sizes and crops (Podell 2023, section 2.2).
    """
    dim, flip, shift = (config[key] for key in ("addition_time_embed_dim", "flip_sin_to_cos", "freq_shift"))
    ids = time_embed(time_ids.flatten(), dim, flip=flip, shift=shift)
    return torch.cat([text, ids.reshape(len(text), -1).to(text.dtype)], 1)
