"""A call of diffusers' U-Nets as one of ours."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.formats.diffusers.condition import text_features
from fastdiff.formats.lora import NotRead
from fastdiff.nn.arguments import Cond


class Call(NamedTuple):
    """x, t, cond and residuals as a `fastdiff.UNet` takes them; wrapped: the result is wanted as an object."""

    x: Tensor
    t: Tensor
    cond: Cond
    residuals: Sequence[Tensor] | None = None
    wrapped: bool = True
    scale: float = 1.0
    """Of all LoRA, beside their own."""


def unet2d(
    model: Any, sample: Tensor, timestep: Any, class_labels: Tensor | None = None, return_dict: bool = True
) -> Call:
    """UNet2DModel.forward."""
    return Call(sample, times(timestep, sample), class_labels, None, return_dict)


def condition(
    model: Any,
    sample: Tensor,
    timestep: Any,
    encoder_hidden_states: Tensor,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cross_attention_kwargs: Mapping[str, Any] | None = None,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
    down_block_additional_residuals: Sequence[Tensor] | None = None,
    mid_block_additional_residual: Tensor | None = None,
    down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
    return_dict: bool = True,
) -> Call:
    """UNet2DConditionModel.forward. Raises NotRead for arguments that we do not take."""
    more = dict(cross_attention_kwargs or {})
    scale = float(more.pop("scale", 1.0))
    refused = {
        "timestep_cond": timestep_cond,
        "attention_mask": attention_mask,
        "cross_attention_kwargs": more or None,
        "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
        "encoder_attention_mask": encoder_attention_mask,
    }
    skips, middle = down_block_additional_residuals, mid_block_additional_residual
    if (skips is None) != (middle is None):
        refused["down_block_additional_residuals without the middle's"] = skips if middle is None else middle
    for name, value in refused.items():
        if value is not None:
            raise NotRead(f"the call has {name}")
    residuals = None if skips is None or middle is None else [*skips, middle]
    cond = _condition(model.config, encoder_hidden_states, class_labels, added_cond_kwargs)
    return Call(sample, times(timestep, sample), cond, residuals, return_dict, scale)


def _condition(
    config: Mapping[str, Any], context: Tensor, labels: Tensor | None, more: Mapping[str, Tensor] | None
) -> Cond:
    if config["addition_embed_type"] == "text_time":
        more = more or {}
        if not {"text_embeds", "time_ids"} <= more.keys():
            raise NotRead("added_cond_kwargs lacks text_embeds or time_ids")
        return {"context": context, "features": text_features(config, more["text_embeds"], more["time_ids"])}
    if config["class_embed_type"] is None and config["num_class_embeds"] is None:
        return context
    if labels is None:
        raise NotRead("class_labels are missing")
    kinds = {None: "label", "timestep": "number", "identity": "vector", "projection": "features"}
    return {"context": context, kinds[config["class_embed_type"]]: labels}


def times(timestep: Any, x: Tensor) -> Tensor:
    """t (N,) on x's device, never narrower than float32."""
    t = torch.as_tensor(timestep, device=x.device)
    # their sinusoid is float32
    t = t.float() if t.is_floating_point() else t
    return t.reshape(-1).expand(len(x))


def result(model: Any, F: Tensor, call: Call) -> Any:
    """What the model's own forward returns."""
    if not call.wrapped:
        return (F,)
    kind = type(model)
    made = vars(sys.modules[kind.__module__])[f"{kind.__name__.removesuffix('Model')}Output"]
    return made(sample=F)
