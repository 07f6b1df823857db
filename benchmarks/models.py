"""The networks of the report: keywords of fd.UNet, and diffusers' config of the same network where there is one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastdiff as fd
from benchmarks.plain import PlainUNet
from fastdiff.formats.diffusers.condition import keywords as condition_keywords
from fastdiff.formats.diffusers.convert import convert
from fastdiff.nn.arguments import Cond


class Model(NamedTuple):
    """A network that is known from a paper, with random weights."""

    name: str
    unet: dict[str, Any]
    """Keywords of fd.UNet."""
    size: int
    """Pixels along an image's side."""
    millions: float | None = None
    """Parameters of the published network."""
    gflop: float | None = None
    """Multiplications and additions of the published network, an image, 10^9."""
    weight: float = 1.0
    """How much longer than for DDPM-CIFAR10 the compiler takes, as far as that is known before."""
    diffusers: dict[str, Any] | None = None
    """Keywords of diffusers' UNet2DModel, or with a context UNet2DConditionModel, where that can be this network."""


class Pair(NamedTuple):
    """Our network and a rival's of the same weights, fp32, both called as net(x, t, cond)."""

    ours: fd.UNet
    theirs: nn.Module
    label: str
    """Whose the rival's is."""
    missing: str | None = None
    """Why it is not diffusers'."""


_CIFAR10: dict[str, Any] = {  # google/ddpm-cifar10-32
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
_DDPM: dict[str, Any] = {"attention": (2,), "eps": 1e-6, "asymmetric": True, "flip": False, "shift": 1}

SMALL = Model(
    "small 32x32",
    {"channels": 32, "mults": (1, 2), "blocks": 1, **_DDPM},
    32,
    diffusers={
        **_CIFAR10,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
)
# Ho, Jain & Abbeel 2020
DDPM = Model(
    "DDPM-CIFAR10",
    {"channels": 128, "mults": (1, 2, 2, 2), "blocks": 2, **_DDPM},
    32,
    millions=35.75,
    gflop=12.44,
    diffusers=_CIFAR10,
)
# Karras 2022, DDPM++: theirs has attention in the last block alone of a level on the way up, and a stem of 128 channels
EDM = Model(
    "EDM-CIFAR-like",
    {"channels": 128, "mults": (2, 2, 2), "blocks": 4, "attention": (2,), "resample_blocks": True, "eps": 1e-6},
    32,
    millions=55.73,
    gflop=42.39,
    weight=1.6,
)
# Dhariwal & Nichol 2021: 64x64, with classes
ADM = Model(
    "ADM-64",
    {
        "channels": 192,
        "mults": (1, 2, 3, 4),
        "blocks": 3,
        "attention": (2, 4, 8),
        "head_channels": 64,
        "scale_shift": True,
        "resample_blocks": True,
        "classes": 1000,
        "null_class": False,
        "learned_variance": True,
    },
    64,
    millions=295.9,
    gflop=219.4,
    weight=2.5,
)
# ADM's network at a size that two cores run in a quarter of a second: narrower, one block a level
ADM_SMALL = Model(
    "ADM-like 64x64",
    {**ADM.unet, "channels": 128, "blocks": 1, "learned_variance": False},
    64,
    weight=1.2,
)
# grey images of 28x28, whose halvings end at an odd 7x7
FASHION = Model(
    "28x28 grey",
    {"in_channels": 1, "channels": 64, "mults": (1, 2, 2), "blocks": 2, **_DDPM},
    28,
    diffusers={
        **_CIFAR10,
        "sample_size": 28,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (64, 128, 128),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
)
TOKENS = 77
"""Of a text, as CLIP gives them."""


def _latent(name: str, size: int, config: dict[str, Any], **known: Any) -> Model:
    """A latent diffusion's network, by diffusers' config."""
    return Model(name, condition_keywords(config), size, diffusers=config, **known)


# Rombach 2022, as Stable Diffusion 1.5 has it
_SD15: dict[str, Any] = {"cross_attention_dim": 768}
SD15 = _latent("SD1.5", 64, _SD15, millions=859.5, gflop=803, weight=4.0)
# Podell 2023
_SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    # the features that it makes of a text and of sizes, given as they are
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2816,
}
SDXL = _latent("SDXL", 128, _SDXL, millions=2567.5, weight=8.0)
# latents of two cores; SDXL with fewer transformers, or its weights would not fit twice into a small machine
SD15_CPU = SD15._replace(name="SD1.5 32x32", size=32)
SDXL_CPU = _latent("SDXL-like 32x32", 32, {**_SDXL, "transformer_layers_per_block": (1, 2, 4)})
# to see whether it works
SD_SMALL = _latent(
    "SD-like 8x8",
    8,
    {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "layers_per_block": 1,
    },
)
MODELS = {model.name: model for model in (DDPM, EDM, ADM, SMALL, ADM_SMALL, FASHION, SD15, SDXL)}


def shape(model: Model, batch: int) -> tuple[int, int, int, int]:
    """Of a batch of its images."""
    return batch, model.unet.get("in_channels", 3), model.size, model.size


def predicts(model: Model) -> str:
    """How `fd.Denoiser` is to read the network."""
    return "eps+range" if model.unet.get("learned_variance") else "eps"


def condition(model: Model, batch: int) -> Cond:
    """A label for each image, or a text's embedding and what goes with it, where the network wants one."""
    channels, more = model.unet.get("context_channels"), model.unet.get("condition_channels")
    if channels is not None:
        g = torch.Generator().manual_seed(1)
        context = torch.randn(batch, TOKENS, channels, generator=g)
        return context if more is None else {"context": context, "features": torch.randn(batch, more, generator=g)}
    return torch.arange(batch) % model.unet["classes"] if model.unet.get("classes") else None


def build(model: Model, *, seed: int = 0, quiet: bool = False) -> fd.UNet:
    """Our network with random weights everywhere, those that start as zeros too.

    quiet: hardly any output; a loop around random weights of full strength is chaotic: no two roundings of it agree.
    """
    torch.manual_seed(seed)
    net = fd.UNet(**model.unet).eval()
    for m in net.modules():
        if isinstance(m, nn.GroupNorm):
            nn.init.normal_(m.weight, 1.0, 0.1)
            nn.init.normal_(m.bias, 0.0, 0.1)
        elif isinstance(m, nn.Conv2d | nn.Linear):
            m.reset_parameters()
    if quiet:
        nn.init.normal_(net.out.weight, std=1e-3)
    return net


class Sample(nn.Module):
    """diffusers' network called as ours is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """F (N, C, H, W)."""
        given: dict[str, Any] = {"return_dict": False}
        if isinstance(cond, dict):
            given["class_labels"] = cond["features"].to(x.dtype)
            cond = cond["context"]
        if cond is not None:
            given["encoder_hidden_states"] = cond.to(x.dtype)
        F: Tensor = self.net(x, t, **given)[0]
        return F


def live(model: Model, *, seed: int = 0, quiet: bool = False) -> nn.Module:
    """diffusers' network with random weights. Raises ImportError, ValueError."""
    if model.diffusers is None:
        raise ValueError(f"diffusers has no network like {model.name}")
    import diffusers

    torch.manual_seed(seed)
    kind = "UNet2DConditionModel" if "context_channels" in model.unet else "UNet2DModel"
    net: nn.Module = getattr(diffusers, kind)(**model.diffusers).eval()
    if quiet:
        nn.init.normal_(net.get_submodule("conv_out").weight, std=1e-3)  # type: ignore[arg-type]
    return net


def of_diffusers(model: Model, *, seed: int = 0, quiet: bool = False) -> Pair:
    """diffusers' network with random weights, and ours with the same. Raises ImportError, ValueError."""
    theirs: Any = live(model, seed=seed, quiet=quiet)
    ours = convert({**theirs.config, "_class_name": type(theirs).__name__}, theirs.state_dict())
    return Pair(ours.eval(), Sample(theirs), "diffusers")


def pair(model: Model, device: str, *, quiet: bool = False) -> Pair:
    """The two networks; where diffusers' cannot be had, one of torch's modules stands for it."""
    try:
        made = of_diffusers(model, quiet=quiet)
    except (ImportError, ValueError) as error:
        ours = build(model, quiet=quiet)
        made = Pair(ours, PlainUNet(ours), "plain torch", str(error))
    return made._replace(ours=made.ours.to(device), theirs=made.theirs.to(device))


def count(model: Model) -> tuple[int, int]:
    """Parameters, and multiplications plus additions of one image, counted in convolutions and matrix products."""
    with torch.device("meta"), torch.no_grad(), fd.backend("reference"):
        net = fd.UNet(**model.unet).eval()
        x, t, cond = torch.empty(shape(model, 1)), torch.zeros(1), condition(model, 1)
        with FlopCounterMode(display=False) as counter:
            net(x, t, cond)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()
