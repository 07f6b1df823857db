"""The config of diffusers' `UNet2DConditionModel` that computes what a `fd.UNet` with a context computes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from fastdiff.formats.diffusers.refusal import refuse
from fastdiff.nn.unet import UNet

_SAID = {
    *("in_channels", "out_channels", "channels", "mults", "blocks", "attention", "middle", "middle_divisor"),
    *("heads", "head_channels", "context_channels", "depth", "groups", "eps", "dropout", "scale_shift", "asymmetric"),
    *("classes", "null_class", "condition", "condition_channels", "learned_variance", "time_channels", "flip", "shift"),
    "center_input",
}
"""Keywords of UNet that it has a key for; the others must have their defaults."""


def _each(v: Any, levels: int) -> list[Any]:
    return list(v) if isinstance(v, Sequence) else [v] * levels


def condition_config(net: UNet, widths: list[int], groups: int, classes: dict[str, Any]) -> dict[str, Any]:
    """All keys but sample_size; classes: num_class_embeds and class_embed_type. Raises ValueError naming a keyword.

    Features that are added are said as class_embed_type="projection", whose class_labels they are: SDXL's own key
    would make them of a text and of sizes. 1x1 convolutions are written as the matrices that they are here.
    """
    c = net.config
    for key, parameter in inspect.signature(UNet).parameters.items():
        if key not in _SAID and c[key] != parameter.default:
            raise refuse(key, c[key], repr(parameter.default))
    attends = [2**i in c["attention"] for i in range(len(widths))]
    heads = [h or 1 for h in _each(c["heads"], len(widths))]
    if c["head_channels"]:
        heads = [max(1, width // c["head_channels"]) for width in widths]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": net.in_channels,
        "out_channels": net.out_channels,
        "center_input_sample": c["center_input"],
        "flip_sin_to_cos": c["flip"],
        "freq_shift": c["shift"],
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if c["middle"] else None,
        "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": c["blocks"],
        "downsample_padding": 0 if c["asymmetric"] else 1,
        "mid_block_scale_factor": c["middle_divisor"],
        "dropout": c["dropout"],
        "act_fn": "silu",
        "norm_num_groups": groups,
        "norm_eps": c["eps"],
        "cross_attention_dim": c["context_channels"],
        "transformer_layers_per_block": _each(c["depth"], len(widths)),
        # what diffusers calls attention_head_dim is the number of heads
        "attention_head_dim": heads,
        "use_linear_projection": True,
        "resnet_time_scale_shift": "scale_shift" if c["scale_shift"] else "default",
        "time_embedding_dim": c["time_channels"],
        "projection_class_embeddings_input_dim": c["condition_channels"],
        **classes,
    }
