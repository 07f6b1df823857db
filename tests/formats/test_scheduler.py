"""fd.DiffusersScheduler against diffusers' schedulers: the same network, the same noise, the same loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdiff as fd
from tests.formats.peers import MODULES, loop, peer_of, start, wide

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # its schedulers call NumPy in a way that NumPy 2 warns of
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
]

DRAWS = ("DDPM", "DDIM", "EulerAncestralDiscrete")


def far(name: str, config: dict[str, Any], n: int | None, lay: dict[str, Any] | None = None, **options: Any) -> float:
    """Largest difference of any state of the loop, in float64, relative to states larger than 1."""
    with wide(name):
        peer = peer_of(name, config)
        ours = fd.DiffusersScheduler.from_config(peer.config)
        given = lay or {"num_inference_steps": n}
        peer.set_timesteps(**given)
        ours.set_timesteps(**given)
        told = [float(t) for t in peer.timesteps]
        assert [float(t) for t in ours.timesteps] == pytest.approx(told, rel=1e-6, abs=1e-4)
        assert ours.order == peer.order
        assert float(ours.init_noise_sigma) == pytest.approx(float(peer.init_noise_sigma), rel=1e-12)
        runs: list[list[torch.Tensor]] = [[], []]
        for scheduler, states in zip((peer, ours), runs, strict=True):
            if name in DRAWS or str(config.get("algorithm_type")).startswith("sde"):
                options["generator"] = torch.Generator().manual_seed(3)
            loop(scheduler, start(), told, states=states, **options)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("n", [1, 2, 7, 10, 50])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", [name for name in MODULES if name != "PNDM"])
def test_float64_loops_agree(name: str, predicts: str, n: int) -> None:
    if (name, predicts) == ("EulerAncestralDiscrete", "sample"):
        pytest.skip("the peer has not implemented it")
    for spacing in ("leading", "trailing", "linspace"):
        if name == "DDIM" and (spacing == "linspace" or 1000 % n):
            continue  # its steps leave the grid there
        for betas in ("linear", "scaled_linear"):
            config = {"prediction_type": predicts, "timestep_spacing": spacing, "beta_schedule": betas}
            assert far(name, config, n) < 1e-9
