"""What makes a `UNet` with a context a `UNet2DConditionModel`: the inverse of `condition.keywords`."""

from __future__ import annotations

from typing import Any

from fastdiff.formats.diffusers.refusal import refuse

SAID = {"context_channels", "depth", "condition_channels"}
"""Keywords of UNet that only a UNet2DConditionModel has a key for."""
UNSAID = {"resample_blocks", "conv_resample", "middle_attention", "learned_variance"}
"""And those that it has none for, a UNet2DModel has."""


def _heads(c: dict[str, Any], widths: list[int]) -> int | list[int]:
    """What diffusers calls attention_head_dim: the number of heads, level by level."""
    if c["heads"]:
        found: int | list[int] = c["heads"]
        return found
    # where there is no transformer the number says nothing
    return [max(1, w // c["head_channels"]) for w in widths] if c["head_channels"] else 1


def config(c: dict[str, Any], widths: list[int], groups: int) -> dict[str, Any]:
    """The keys in which a UNet2DConditionModel differs; c: the keywords of a UNet with a context.

    Features are a "projection" of class_labels: what SDXL's text and time ids become (`condition.text_features`) is
    given there, for a net of ours does not know what its features were made from.
    """
    if c["middle_groups"] not in (None, groups):
        raise refuse("middle_groups", c["middle_groups"], f"None, which is {groups} here")
    attends = [2**i in c["attention"] for i in range(len(widths))]
    features = {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": c["condition_channels"],
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if c["middle"] else None,
        "attention_head_dim": _heads(c, widths),
        "cross_attention_dim": c["context_channels"],
        "transformer_layers_per_block": c["depth"],
        # our proj_in and proj_out are matrices
        "use_linear_projection": True,
        **(features if c["condition"] == "features" else {}),
    }
