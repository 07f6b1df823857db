"""Nets, calls and tactics for the tests of `fastdiff/nn/prepare.py`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.nn.prepare import Tactics
from fastdiff.nn.unet import UNet
from tests.nn.test_unet import draw, randomise

SMALL = {"channels": 8, "mults": (1, 2), "blocks": 1, "attention": (2,), "groups": 4}
ADM = {"scale_shift": True, "resample_blocks": True, "head_channels": 4}
# config, spatial size
KINDS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "ddpm": ({"asymmetric": True}, (8, 6)),
    "adm": (ADM | {"classes": 3, "learned_variance": True}, (4, 10)),
    "pooled": ({"conv_resample": False, "middle_divisor": 2**0.5, "classes": 4, "null_class": False}, (6, 4)),
    "odd": ({"channels": 9, "mults": (1, 5 / 3, 3), "groups": 3, "in_channels": 1, "out_channels": 5}, (4, 12)),
    "narrowing": ({"mults": (2, 1), "groups": 8, "scale_shift": True, "condition": "vector"}, (6, 6)),
    "line": ({"dims": 1, "in_channels": 2, "asymmetric": True}, (10,)),
    "adm line": (ADM | {"dims": 1, "in_channels": 2}, (6,)),
    "volume": ({"dims": 3, "in_channels": 2, "asymmetric": True}, (4, 2, 6)),
    "adm volume": (ADM | {"dims": 3, "in_channels": 2}, (2, 4, 4)),
}
NAMES = [name for name, on in Tactics()._asdict().items() if on]
TACTICS = {"all": Tactics(), "none": Tactics(**dict.fromkeys(NAMES, False))}
TACTICS |= {name: TACTICS["none"]._replace(**{name: True}) for name in NAMES}
# each tactic alone on every third kind, all and none on every one; the rest is slow
GRID = [
    pytest.param(kind, tactics, marks=() if tactics in ("all", "none") or (i + j) % 3 == 0 else pytest.mark.slow)
    for i, kind in enumerate(KINDS)
    for j, tactics in enumerate(TACTICS)
]


def make(kind: str, dtype: torch.dtype = torch.float32) -> UNet:
    """A net whose biases are as large as its weights' results."""
    return randomise(UNet(**SMALL | KINDS[kind][0])).to(dtype)


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, t, cond) of two images."""
    config, size = SMALL | KINDS[kind][0], KINDS[kind][1]
    cond = torch.tensor([0, 2]) if "classes" in config else None
    if config.get("condition") == "vector":
        cond = draw(2, 4 * config["channels"], seed=3, dtype=dtype)
    return draw(2, config.get("in_channels", 3), *size, dtype=dtype), torch.tensor([3, 700]), cond
