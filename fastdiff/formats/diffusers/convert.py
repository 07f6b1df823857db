"""diffusers' `UNet2DModel` and `UNet2DConditionModel` as our `UNet`, from a config and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.formats.diffusers import condition, unet2d
from fastdiff.formats.diffusers.names import modules, renamed, theirs
from fastdiff.formats.diffusers.refusal import refuse
from fastdiff.formats.names import Parts, fits, join
from fastdiff.nn.unet import UNet

KINDS = {"UNet2DModel": unet2d.keywords, "UNet2DConditionModel": condition.keywords}
"""Class of diffusers, and what its config means."""


def empty(config: Mapping[str, Any]) -> tuple[UNet, dict[str, Parts]]:
    """(the net that a config describes, without memory; our parameter: the tensors of diffusers that make it).

    config: as in config.json. Raises ValueError naming the key that is not supported.
    """
    kind = config.get("_class_name", "UNet2DModel")
    if kind not in KINDS:
        raise refuse("_class_name", kind, ", ".join(KINDS))
    with torch.device("meta"):
        net = UNet(**KINDS[kind](config))
    cond = "class_embedding" if config.get("addition_embed_type") is None else "add_embedding"
    names = modules(net, cond)
    return net, {name: Parts(theirs(name, names)) for name in net.state_dict()}


def convert(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> UNet:
    """A U-Net of diffusers as our `UNet`, with its weights; parameters narrower than float32 are widened to it.

    config: as in its config.json. state: its state_dict, with the old attention names (query, key, value, proj_attn) or
    the new ones. A net with num_class_embeds has these classes and no null class: diffusers does not say which label
    means none. A UNet2DModel's out_channels = 2 in_channels is taken for a learned variance. Raises ValueError naming
    the key of the config that is not supported, or the weights that are missing, left over or of another shape.
    """
    net, names = empty(config)
    given = renamed(state)
    wanted = {t for parts in names.values() for t in parts.names}
    wrong = [f"{name} is missing" for name in sorted(wanted - given.keys())]
    wrong += [f"{name} is left over" for name in sorted(given.keys() - wanted)]
    weights = {}
    for name, p in net.state_dict().items():
        parts, shape = names[name].names, tuple(p.shape)
        if not all(n in given for n in parts):
            continue
        bad = [n for n in parts if not fits(given[n], shape, len(parts))]
        wrong += [f"{n} has shape {tuple(given[n].shape)}, not {(shape[0] // len(parts), *shape[1:])}" for n in bad]
        if not bad:
            t = join([given[n] for n in parts], shape)
            weights[name] = t.to(torch.promote_types(t.dtype, torch.float32))
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"diffusers: the weights do not fit the config: {'; '.join(wrong[:4])}{more}; "
            "take config.json and the weights from one checkpoint"
        )
    net.load_state_dict(weights, assign=True)
    return net
