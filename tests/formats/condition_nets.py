"""Small `UNet2DConditionModel`s of diffusers: Stable Diffusion's shapes, random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
SD15: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "cross_attention_dim": 24,
    "attention_head_dim": (2, 4, 8),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
    "norm_num_groups": 16,
}
NETS: dict[str, dict[str, Any]] = {
    "sd15": SD15,
    "sd21": SD15 | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "layers_per_block": 1},
    "sdxl": SDXL,
    "classes": SD15 | {"num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift", "layers_per_block": 1},
    "projection": SD15 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
}


def peer(name: str) -> nn.Module:
    """A random net in which no parameter is 0 or 1."""
    import diffusers

    net: nn.Module = diffusers.UNet2DConditionModel(**NETS[name]).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / (p[0].numel() if p.ndim > 1 else 4) ** 0.5 + (p.ndim == 1))
    return net.requires_grad_(False)


def inputs(name: str, n: int = 2, size: tuple[int, int] = (12, 20), tokens: int = 7) -> dict[str, Any]:
    """The keywords of one call."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    call = {
        "sample": draw(n, 4, *size),
        "timestep": torch.tensor([3, 981])[:n],
        "encoder_hidden_states": draw(n, tokens, 24),
    }
    if name == "sdxl":
        ids = torch.tensor([[512.0, 384, 0, 8, 512, 512], [1024, 768, 16, 0, 512, 384]])[:n]
        call["added_cond_kwargs"] = {"text_embeds": draw(n, 20), "time_ids": ids}
    if name == "classes":
        call["class_labels"] = torch.tensor([4, 1])[:n]
    if name == "projection":
        call["class_labels"] = draw(n, 12)
    return call


def control(net: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    """What a ControlNet adds to a call: one tensor a skip, and the middle's."""
    shapes: list[torch.Size] = []
    net.conv_in.register_forward_hook(lambda _m, _x, y: shapes.append(y.shape))
    for block in net.down_blocks:
        block.register_forward_hook(lambda _m, _x, y: shapes.extend(r.shape for r in y[1]))
    with torch.no_grad():
        net(**call)
    for module in (net.conv_in, *net.down_blocks):
        module._forward_hooks.clear()
    g = torch.Generator().manual_seed(2)
    *skips, middle = (torch.randn(shape, generator=g) for shape in [*shapes, shapes[-1]])
    return {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}
