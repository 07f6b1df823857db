"""What the config of diffusers' `UNet2DModel` means for our `UNet`.

Whatever would change the result and is not understood is a ValueError that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdiff.formats.diffusers.refusal import one_of, refuse

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


def keywords(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `UNet` that a UNet2DModel's config means."""
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
