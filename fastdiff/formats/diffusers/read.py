"""Folders that diffusers' `save_pretrained` wrote, read without diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdiff.formats.diffusers.convert import convert
from fastdiff.nn.unet import UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"diffusers: {path} cannot be read as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"diffusers: {path} holds a {type(config).__name__}, not an object; fetch the checkpoint again"
        )
    return config


def read_unet(folder: str | Path) -> tuple[UNet, dict[str, Any]]:
    """(net, scheduler's config) from a folder that diffusers' `save_pretrained` wrote, a pipeline's or a U-Net's.

    Looks for config.json and diffusion_pytorch_model.safetensors in `folder` or `folder`/unet, and for
    scheduler_config.json in a scheduler folder beside them or with them; {} where there is none. Raises ValueError with
    one sentence for what is absent, broken or not supported, ImportError without safetensors.
    """
    root = Path(folder)
    unet = root / "unet" if (root / "unet").is_dir() else root
    if not (unet / "config.json").is_file() or not (unet / WEIGHTS).is_file():
        raise ValueError(
            f"diffusers: {root} holds no config.json beside a {WEIGHTS} (nor its unet folder); save the model again "
            "with save_pretrained(folder, safe_serialization=True)"
        )
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("diffusers: reading weights needs safetensors; run `pip install safetensors`") from error
    config = _json(unet / "config.json")
    try:
        state = load_file(unet / WEIGHTS)
    except (SafetensorError, OSError) as error:
        size = (unet / WEIGHTS).stat().st_size
        raise ValueError(
            f"diffusers: {unet / WEIGHTS} ({size} bytes) is cut off or broken ({error}); fetch the checkpoint again"
        ) from error
    places = (root / "scheduler", unet, unet.parent / "scheduler")
    found = [p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()]
    return convert(config, state), _json(found[0]) if found else {}


def vae_scaling(folder: str | Path) -> dict[str, float]:
    """{"vae_scaling_factor": s} of a latent diffusion's folder, whose x is s times what its autoencoder gives, else {}.

    Rombach 2022, appendix G: s makes the latents' variance one.
    """
    path = Path(folder) / "vae" / "config.json"
    return {"vae_scaling_factor": float(_json(path).get("scaling_factor", 0.18215))} if path.is_file() else {}
