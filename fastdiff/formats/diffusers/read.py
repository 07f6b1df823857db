"""Folders that diffusers' `save_pretrained` wrote, read without diffusers."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.formats.diffusers.convert import convert
from fastdiff.nn.unet import UNet

VAE = "vae/config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMS = (
    *(WEIGHTS, f"{WEIGHTS}.index.json"),
    *(f"diffusion_pytorch_model.{narrow}.safetensors" for narrow in ("fp16", "bf16")),
    *(f"{WEIGHTS}.index.{narrow}.json" for narrow in ("fp16", "bf16")),
)
"""Where the weights may be, the better place first: in one file, in parts named by an index; narrower, alike."""


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


def form(names: Collection[str]) -> str | None:
    """The first of FORMS among a folder's file names."""
    return next((name for name in FORMS if name in names), None)


def parts(index: Path) -> list[str]:
    """The files that an index of weights names, beside it. Raises ValueError for an index that names none."""
    found = _json(index).get("weight_map")
    names = sorted({str(name) for name in found.values()}) if isinstance(found, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(
            f"diffusers: {index} has no weight_map of files beside it; save the model again with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    return names


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in `folder` that together hold the weights. Raises ValueError where one is absent."""
    names = {p.name for p in folder.iterdir() if p.is_file()} if folder.is_dir() else set()
    chosen = form(names)
    if chosen is None:
        other = sorted(name for name in names if name.endswith((".safetensors", ".bin")))
        raise ValueError(
            f"diffusers: {folder} holds no {WEIGHTS}, nor its parts with an index, nor its fp16 or bf16 variant"
            f"{' (but ' + ', '.join(other[:3]) + ')' if other else ''}; save the model again with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    if not chosen.endswith(".json"):
        return [folder / chosen]
    wanted = parts(folder / chosen)
    absent = [name for name in wanted if name not in names]
    if absent:
        raise ValueError(
            f"diffusers: {folder} lacks {absent[0]} ({len(absent)} of the {len(wanted)} parts that {chosen} names); "
            "fetch the checkpoint again"
        )
    return [folder / name for name in wanted]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The state_dict in `folder`, whole or in parts. Raises ValueError for broken files, ImportError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("diffusers: reading weights needs safetensors; run `pip install safetensors`") from error
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"diffusers: {file} ({file.stat().st_size} bytes) is cut off or broken ({error}); "
                "fetch the checkpoint again"
            ) from error
    return state


def unet_folder(root: Path) -> Path:
    """Where the U-Net of a pipeline's folder, or of its own, is."""
    return root / "unet" if (root / "unet").is_dir() else root


def read_unet(folder: str | Path) -> tuple[UNet, dict[str, Any]]:
    """(net, scheduler's config) from a folder that diffusers' `save_pretrained` wrote, a pipeline's or a U-Net's.

    Looks for config.json and the weights in `folder` or `folder`/unet: diffusion_pytorch_model.safetensors, or its
    parts with an index, or, where there is only that, its fp16 or bf16 variant. And for scheduler_config.json in a
    scheduler folder beside them or with them; {} where there is none. Raises ValueError with one sentence for what is
    absent, broken or not supported, ImportError without safetensors.
    """
    root = Path(folder)
    unet = unet_folder(root)
    if not (unet / "config.json").is_file():
        raise ValueError(
            f"diffusers: {root} holds no config.json beside a {WEIGHTS} (nor its unet folder); save the model again "
            "with save_pretrained(folder, safe_serialization=True)"
        )
    config, state = _json(unet / "config.json"), read_weights(unet)
    places = (root / "scheduler", unet, unet.parent / "scheduler")
    found = [p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()]
    return convert(config, state), _json(found[0]) if found else {}


def vae_scaling(folder: str | Path) -> dict[str, float]:
    """{"vae_scaling_factor": s} of a latent diffusion's folder, whose x is s times what its autoencoder gives, else {}.

    Rombach 2022, appendix G: s makes the latents' variance one.
    """
    path = Path(folder) / VAE
    return {"vae_scaling_factor": float(_json(path).get("scaling_factor", 0.18215))} if path.is_file() else {}
