"""Denoisers from folders and back: our own checkpoints, diffusers' U-Nets, the package's own and the hub's models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastdiff._version import __version__
from fastdiff.files.atomic import find_folder
from fastdiff.files.checkpoint import read_folder, write_folder
from fastdiff.formats.diffusers.convert import KINDS
from fastdiff.formats.diffusers.read import read_unet, vae_scaling
from fastdiff.formats.diffusers.schedule import schedule_of
from fastdiff.nn.unet import UNet
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.tables.schedule import from_spec

_SHIPPED = Path(__file__).resolve().parents[1] / "models"


def shipped() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(p.name for p in _SHIPPED.iterdir() if p.is_dir()) if _SHIPPED.is_dir() else []


def _diffusers_config(folder: Path) -> dict[str, Any] | None:
    """The U-Net's config where the folder is diffusers', empty where it cannot be read; None for other folders."""
    nested = folder / "unet" / "config.json"
    try:
        config = json.loads((nested if nested.is_file() else folder / "config.json").read_text())
    except (OSError, ValueError):
        config = None
    config = config if isinstance(config, dict) else {}
    return config if nested.is_file() or config.get("_class_name") in KINDS else None


def _meta(name: str, net: UNet, size: Any) -> dict[str, Any]:
    """Name and, where the config has a sample_size, the shape of an image."""
    if size is None:
        return {"name": name}
    height, width = (size, size) if isinstance(size, int) else size
    return {"name": name, "shape": [net.in_channels, height, width]}


def _ours(folder: Path) -> Denoiser:
    config, tensors = read_folder(folder)
    try:
        net = UNet(**config["net"])
        schedule = from_spec(config["schedule"])
        net.load_state_dict({name: t.float() for name, t in tensors["model"].items()})
        predicts, meta = config["predicts"], config["meta"]
        return Denoiser(
            net.eval(), schedule, predicts, sigma_data=config["sigma_data"], defaults=config["defaults"], meta=meta
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"load: {folder} does not hold a Denoiser that this version can build ({error}); "
            f"it was written by fastdiff {config.get('fastdiff', 'of unknown version')}"
        ) from error


def load(name: str | Path) -> Denoiser:
    """A Denoiser, on the CPU and in evaluation mode: by the name of a model that comes with us, from a folder, or from
    the Hugging Face hub by "org/name", or "org/name@revision".

    A folder is one of ours (`fd.save`, checked against its checksums) or diffusers' UNet2DModel or UNet2DConditionModel
    (config and safetensors, with the scheduler's config where there is one). The latter is Stable Diffusion's: x is a
    latent, `den.meta["vae_scaling_factor"]` times the autoencoder's, and cond the embedding of a text. What the hub has
    is read from its cache where that has it, without network; else it is downloaded (the extra [hub]). Raises
    FileNotFoundError where there is nothing, ValueError where it is broken or of no known kind, and what `hub.resolve`
    raises.
    """
    # a folder of that name in the working directory is ./name
    folder = _SHIPPED / name if isinstance(name, str) and name in shipped() else Path(name)
    label = folder.name
    try:
        found, _ = find_folder(folder)
    except FileNotFoundError:
        from fastdiff.formats import hub

        repo = hub.parse(name)
        if repo is None:
            raise FileNotFoundError(
                f"load: there is no folder {str(name)!r} and no model of that name; accepted: a folder, org/name on "
                f"the Hugging Face hub, or one of {', '.join(shipped())}"
            ) from None
        found = folder = hub.resolve(repo)
        label = repo.name.partition("/")[2]
    config = _diffusers_config(found)
    if config is not None:
        net, scheduler = read_unet(found)
        schedule, predicts, defaults = schedule_of(scheduler)
        meta = _meta(label, net, config.get("sample_size")) | vae_scaling(found)
        return Denoiser(net.eval(), schedule, predicts, defaults=defaults, meta=meta)
    den = _ours(folder)
    den.meta.setdefault("name", label)
    return den


def save(den: Denoiser, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write `den` as a folder that `load` reads: config.json with checksums, model.safetensors. Crash-safe.

    dtype: of the stored weights, the network's own unless given. Raises ValueError for what no file can hold: a network
    that is no fastdiff.UNet, a null condition or a schedule of the caller's own.
    """
    if not isinstance(den.net, UNet):
        raise ValueError(
            f"save: the network is a {type(den.net).__name__}; save its state_dict, or build a fastdiff.UNet"
        )
    if den.schedule.spec is None:
        raise ValueError(f"save: schedule {den.schedule.name!r} is made of functions; use a named one or fd.from_betas")
    if den.own_null is not None:
        raise ValueError("save: a null condition of your own has no place in a file; give it to fd.cfg(w, null=...)")
    config: dict[str, Any] = {
        "fastdiff": __version__,
        "net": den.net.config,
        "schedule": den.schedule.spec,
        "predicts": den.predicts,
        "sigma_data": den.sigma_data,
        "defaults": den.defaults,
        "meta": den.meta,
    }
    weights = den.net.state_dict()
    write_folder(folder, config, {"model": {k: v.to("cpu", dtype or v.dtype) for k, v in weights.items()}})
