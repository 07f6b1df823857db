"""A Denoiser as a folder that diffusers reads: its U-Net, scheduler and, where it needs no more, the pipeline.

A net with a context is a `UNet2DConditionModel`, any other a `UNet2DModel`; written without diffusers.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.files.atomic import replace_folder, sync
from fastdiff.formats.diffusers import write_condition
from fastdiff.formats.diffusers.names import modules, theirs
from fastdiff.formats.diffusers.read import WEIGHTS
from fastdiff.formats.diffusers.refusal import refuse
from fastdiff.formats.diffusers.write_schedule import scheduler_config
from fastdiff.nn.unet import UNet
from fastdiff.sampling.denoiser import Denoiser

INDEX, NET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
FILES = (INDEX, NET, f"unet/{WEIGHTS}", SCHEDULER)
"""All but the first where the net has a context: its pipeline has a text encoder too."""

_CONDITION = {"label": None, "number": "timestep", "vector": "identity"}
_SAID = {
    *("in_channels", "out_channels", "channels", "mults", "blocks", "attention", "middle", "middle_attention"),
    *("middle_groups", "middle_divisor", "heads", "head_channels", "groups", "eps", "dropout", "scale_shift"),
    *("resample_blocks", "conv_resample", "asymmetric", "classes", "null_class", "condition", "learned_variance"),
    *("time_channels", "flip", "shift", "center_input"),
}
"""Keywords of UNet that a UNet2DModel has a key for; the others must have their defaults."""


def _widths(c: dict[str, Any]) -> list[int]:
    """Channels of each level, of which diffusers' sinusoid has as many as the first."""
    widths = [round(c["channels"] * m) for m in c["mults"]]
    if widths[0] != c["channels"]:
        raise refuse("mults", c["mults"], "a first multiple of 1, for the embedding is as wide as the first level")
    return widths


def _head(c: dict[str, Any], widths: list[int]) -> int | None:
    """attention_head_dim: channels a head, one number for all levels; None is one head."""
    if c["head_channels"] or not c["heads"]:
        return c["head_channels"] or None
    levels = [i for i in range(len(widths)) if 2**i in c["attention"]]
    levels += [len(widths) - 1] * bool(c["middle"] and c["middle_attention"])
    heads = [h[i] if isinstance(h := c["heads"], list) else h for i in levels]
    sizes: set[int] = {widths[i] // h for i, h in zip(levels, heads, strict=True)}
    if all(h == 1 for h in heads) or not sizes:
        return None
    if len(sizes) > 1:
        raise refuse(
            "heads", c["heads"], f"heads of one width at all levels, or head_channels; these have {sorted(sizes)}"
        )
    return sizes.pop()


def _middle_groups(c: dict[str, Any], groups: int) -> int | None:
    """attn_norm_num_groups, whose None is the groups of the net, or with scale_shift no norm."""
    if not (c["middle"] and c["middle_attention"]):
        return None
    own = groups if c["middle_groups"] is None else c["middle_groups"]
    if own == 0 and not c["scale_shift"]:
        raise refuse("middle_groups", 0, "a norm in front of the middle's attention, where scale_shift is off")
    return None if own == (0 if c["scale_shift"] else groups) else own


def _resampling(c: dict[str, Any], widths: list[int]) -> dict[str, Any]:
    """The kinds of blocks, level by level, and what they resample by."""
    if len(widths) > 1 and not (c["conv_resample"] or c["resample_blocks"]):
        raise refuse("conv_resample", False, "True, or resample_blocks=True")
    attends = [2**i in c["attention"] for i in range(len(widths))]
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if c["resample_blocks"] else ("DownBlock2D", "UpBlock2D")
    )
    way = "resnet" if c["resample_blocks"] else "conv"
    return {
        "down_block_types": ["AttnDownBlock2D" if here else plain[0] for here in attends],
        "up_block_types": ["AttnUpBlock2D" if here else plain[1] for here in reversed(attends)],
        "downsample_type": way,
        "upsample_type": way,
    }


def _classes(c: dict[str, Any], null_label: bool) -> dict[str, Any]:
    if c["classes"] is not None and c["null_class"] and not null_label:
        raise ValueError(
            f"diffusers: null_class=True cannot be said: its num_class_embeds={c['classes'] + 1} would count the null "
            f"class as one class more; write it so with --null-label (null_label=True), where {c['classes']} is then "
            "the label of none"
        )
    count = None if c["classes"] is None else c["classes"] + c["null_class"]
    return {"num_class_embeds": count, "class_embed_type": _CONDITION.get(c["condition"])}


def _plain(c: dict[str, Any], widths: list[int], groups: int) -> dict[str, Any]:
    """The keys in which a UNet2DModel differs from a UNet2DConditionModel."""
    return {
        "_class_name": "UNet2DModel",
        **_resampling(c, widths),
        "mid_block_type": "UNetMidBlock2D" if c["middle"] else None,
        "attention_head_dim": _head(c, widths),
        "attn_norm_num_groups": _middle_groups(c, groups),
        "add_attention": c["middle"] and c["middle_attention"],
    }


def _check(c: dict[str, Any]) -> None:
    """Raises ValueError naming the keyword of the net that no key says."""
    context = c["context_channels"] is not None
    said = (_SAID | write_condition.SAID) - write_condition.UNSAID if context else _SAID
    for key, parameter in inspect.signature(UNet).parameters.items():
        if key not in said and c.get(key, parameter.default) != parameter.default:
            raise refuse(key, c[key], repr(parameter.default))
    accepted = [*_CONDITION, *["features"] * context]
    if c["condition"] not in accepted:
        raise refuse("condition", c["condition"], ", ".join(accepted))


def unet_config(net: UNet, size: list[int] | None = None, *, null_label: bool = False) -> dict[str, Any]:
    """The config.json of the UNet2DModel, or with a context the UNet2DConditionModel, that computes what `net` does.

    size: (height, width) of its images. null_label: write a null class as one class more, the last; diffusers does not
    know that it means none. Raises ValueError naming the keyword of the net that no key says.
    """
    c = net.config
    _check(c)
    widths = _widths(c)
    groups = c["groups"] or math.gcd(32, *widths)
    own = _plain if c["context_channels"] is None else write_condition.config
    return {
        "sample_size": None if size is None else size[0] if size[0] == size[1] else size,
        "in_channels": net.in_channels,
        "out_channels": net.out_channels,
        "center_input_sample": c["center_input"],
        "time_embedding_type": "positional",
        "time_embedding_dim": c["time_channels"],
        "freq_shift": c["shift"],
        "flip_sin_to_cos": c["flip"],
        "block_out_channels": widths,
        "layers_per_block": c["blocks"],
        "downsample_padding": 0 if c["asymmetric"] else 1,
        "mid_block_scale_factor": c["middle_divisor"],
        "dropout": c["dropout"],
        "act_fn": "silu",
        "norm_num_groups": groups,
        "norm_eps": c["eps"],
        "resnet_time_scale_shift": "scale_shift" if c["scale_shift"] else "default",
        **_classes(c, null_label),
        **own(c, widths, groups),
    }


def unet_state(net: UNet, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state_dict of that model, on the CPU, in `dtype` (None: the net's own)."""
    known, state = modules(net), {}
    for name, p in net.state_dict().items():
        names = theirs(name, known)
        for their, part in zip(names, p.chunk(len(names)), strict=True):
            # a tensor of its own memory, which safetensors wants
            state[their] = part.detach().to("cpu", dtype or p.dtype, copy=True).contiguous()
    return state


def check_target(path: Path) -> None:
    """Raises ValueError where `path` is there and holds anything but what `save_diffusers` writes."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a folder; choose another path")
    there = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()} if path.exists() else set()
    ours = INDEX in there or there == set(FILES[1:])
    other = sorted(there.difference(FILES)) or [f"no {INDEX}"] * (not ours)
    if there and other:
        raise ValueError(f"{path} is no folder that this wrote, it holds {other[0]}; choose another path or move it")


def save_diffusers(
    den: Denoiser, folder: str | Path, *, dtype: torch.dtype | None = None, null_label: bool = False
) -> None:
    """Write `den` as a folder of diffusers: `DDPMPipeline.from_pretrained(folder)`, or UNet2DModel's of folder/unet.

    A net with a context is a UNet2DConditionModel in folder/unet, its features class_labels (a "projection"), its
    scheduler beside it; no pipeline is named, for it needs the text encoder and autoencoder that a Denoiser has not.
    dtype: of the stored weights, the network's own unless given. null_label: see `unet_config`. Crash-safe; a folder
    that this wrote is replaced. Raises ValueError for what diffusers cannot say (see also `scheduler_config`), and
    where `folder` holds something else.
    """
    if not isinstance(den.net, UNet):
        raise ValueError(f"diffusers: the network is a {type(den.net).__name__}; accepted: fastdiff.UNet")
    if den.own_null is not None:
        raise ValueError("diffusers: a null condition of your own cannot be said; give it to fd.cfg(w, null=...)")
    path, shape = Path(os.path.realpath(folder)), den.meta.get("shape")
    net = unet_config(den.net, None if shape is None else list(shape[1:]), null_label=null_label)
    scheduler, state = scheduler_config(den), unet_state(den.net, dtype)
    configs = {NET: net, SCHEDULER: scheduler}
    index = {
        "_class_name": "DDIMPipeline" if scheduler["_class_name"] == "DDIMScheduler" else "DDPMPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    if den.net.context_channels is None:
        configs[INDEX] = index
    check_target(path)
    with replace_folder(path) as new:
        _fill(new, configs, state)


def _fill(folder: Path, configs: dict[str, dict[str, Any]], state: dict[str, Tensor]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("diffusers: writing weights needs safetensors; run `pip install safetensors`") from error
    mode = folder.stat().st_mode & 0o666
    for name, config in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n")
    save_file(state, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    os.chmod(folder / "unet" / WEIGHTS, mode)  # safetensors makes its files private, whatever the umask says
    for name in (*configs, f"unet/{WEIGHTS}", "unet", "scheduler"):
        sync(folder / name)
