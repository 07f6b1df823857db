"""Where diffusers' own numbers are wrong: what the difference is, and why ours are right."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff as fd
from tests.formats.peers import loop, peer_of, start, wide

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
]


def pair(name: str, config: dict[str, Any], n: int) -> tuple[Any, fd.DiffusersScheduler]:
    peer = peer_of(name, config)
    ours = fd.DiffusersScheduler.from_config(peer.config)
    peer.set_timesteps(n)
    ours.set_timesteps(n)
    return peer, ours


def marginal(scheduler: Any, schedule: fd.Schedule, predicts: str, told: list[int]) -> list[float]:
    """|state - (alpha x0 + sigma eps)| before each call but the first, where the network knows x0 and eps."""
    x0, eps = start() / 3, start().flip(0)
    alpha, sigma = (float(f(np.array(told[0]))) for f in (schedule.alpha, schedule.sigma))
    x, off = alpha * x0 + sigma * eps, []
    for k, t in enumerate(scheduler.timesteps):
        alpha, sigma = (float(f(np.array(told[k]))) for f in (schedule.alpha, schedule.sigma))
        if k:
            off.append(float((x - alpha * x0 - sigma * eps).abs().max()))
        F = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0}[predicts]
        x = scheduler.step(F, t, x).prev_sample
    return off


@pytest.mark.parametrize(("spacing", "n"), [("linspace", 10), ("trailing", 7)])
@pytest.mark.parametrize("name", ["DDIM", "PNDM"])
def test_steps_that_leave_the_grid(name: str, spacing: str, n: int) -> None:
    """diffusers goes T // n back from each time, and then calls the network at another one.

    With a network that knows x0 the state must be alpha x0 + sigma eps of the time that the network is told.
    """
    config = {"timestep_spacing": spacing} | ({"skip_prk_steps": True} if name == "PNDM" else {"clip_sample": False})
    with wide(name):
        peer, ours = pair(name, config, n)
        told = [int(t) for t in ours.timesteps]
        assert max(marginal(ours, fd.linear(), "epsilon", told)) < 1e-12
        assert max(marginal(peer, fd.linear(), "epsilon", told)) > 1e-3


def test_plms_averages_what_belongs_together() -> None:
    """PNDM with v-prediction averages v of several times, as if v were eps; ours averages eps.

    v = alpha eps - sigma x0 changes with the time where eps and x0 do not, so the average says another x0.
    """
    config = {"skip_prk_steps": True, "prediction_type": "v_prediction"}
    with wide("PNDM"):
        peer, ours = pair("PNDM", config, 10)
        told = [int(t) for t in ours.timesteps]
        assert max(marginal(ours, fd.linear(), "v_prediction", told)) < 1e-12
        assert max(marginal(peer, fd.linear(), "v_prediction", told)) > 1e-2


def test_image_to_image_with_plms() -> None:
    """diffusers' PNDM takes the second call of a loop for the extra one of its first step, wherever the loop starts.

    From then on its states belong to the time before the one that the network is told.
    """
    with wide("PNDM"):
        peer, ours = pair("PNDM", {"skip_prk_steps": True}, 20)
        inside = [int(t) for t in peer.timesteps][6:]
        for scheduler in (peer, ours):
            scheduler.timesteps = scheduler.timesteps[6:]
        ours.set_begin_index(6)
        ours_off, peer_off = (marginal(s, fd.linear(), "epsilon", inside) for s in (ours, peer))
        assert max(ours_off) < 1e-12
        assert min(peer_off[1:]) > 1e-3


def test_the_noise_behind_the_last_step() -> None:
    """DDPM's last step with variance beta draws noise of variance 1 - alpha_bar when it does not start at t = 0.

    The result is then no image but the state of the last step again; Ho's algorithm 2 draws none there.
    """
    config = {"timestep_spacing": "trailing", "variance_type": "fixed_large", "clip_sample": False}
    peer, ours = pair("DDPM", config, 40)
    assert int(peer.timesteps[-1]) == 24
    x0, x = torch.zeros(1, 1, 64, 64), torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    sigma = float(fd.linear().sigma(np.array(24.0)))
    ends = [s.step(x, peer.timesteps[-1], sigma * x, generator=torch.Generator()).prev_sample for s in (peer, ours)]
    assert float(ends[0].std()) == pytest.approx(sigma, rel=0.05)
    assert torch.allclose(ends[1], x0, atol=1e-7)


def test_the_first_noise_of_zero_snr() -> None:
    """From pure noise x_s = alpha_s x0 + sigma_s z; diffusers' fixed_large draws 1 z, more than the level has."""
    keys = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    with wide("DDPM"):
        peer, ours = pair("DDPM", keys | {"variance_type": "fixed_large"}, 2)
        zero, ends = start() * 0, []
        for scheduler in (peer, ours):
            generator = torch.Generator().manual_seed(2)
            ends.append(scheduler.step(zero, scheduler.timesteps[0], zero, generator=generator).prev_sample)
        z = torch.randn(zero.shape, generator=torch.Generator().manual_seed(2))
    assert float((ends[0] - z).abs().max()) < 1e-12
    sigma = float(np.sqrt(1 - ours.alphas_cumprod[499].double().numpy()))
    assert float((ends[1] - sigma * z).abs().max()) < 1e-6
    assert sigma < 0.97


def test_fixed_large_log_is_the_logarithm_of_a_variance() -> None:
    """diffusers takes its square root: NaN. Ours draws noise of that variance."""
    peer, ours = pair("DDPM", {"variance_type": "fixed_large_log"}, 10)
    same = fd.DiffusersScheduler.from_config(ours.config, variance_type="fixed_large")
    same.set_timesteps(10)
    x, F = start(torch.float32), start(torch.float32).flip(0)
    ends = [s.step(F, 900, x, generator=torch.Generator().manual_seed(1)).prev_sample for s in (peer, ours, same)]
    assert ends[0].isnan().all()
    assert torch.equal(ends[1], ends[2])


def test_float32_tables() -> None:
    """1 - alpha_bar of float32 loses digits at the first steps: the posterior variance is 4e-4 off, ours is not."""
    peer, ours = pair("DDPM", {"prediction_type": "sample"}, 1000)
    bar, exact = Fraction(1), []
    for i in range(4):
        beta = Fraction(1, 10000) + (Fraction(2, 100) - Fraction(1, 10000)) * i / 999
        exact.append(float((1 - bar) / (1 - bar * (1 - beta)) * beta))
        bar *= 1 - beta
    zero, off = start() * 0, []
    for t in (1, 2, 3):
        z = torch.randn(zero.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        # of a state and an x0 of nothing the noise is left
        x = ours.step(zero, t, zero, generator=torch.Generator().manual_seed(t)).prev_sample
        assert float((x / z).square().mean()) == pytest.approx(exact[t], rel=1e-12)
        off.append(abs(float(peer._get_variance(t)) / exact[t] - 1))
    assert 1e-4 < max(off) < 1e-3


def test_third_order_sde() -> None:
    """sde-dpmsolver++ of order 3 subtracts 1/2 D2 where -phi_3 adds it: a whole D2 away, and of order 1 for it.

    x0 = s^2, s the distance in ln u from now, has D2 = h^2, and int_0^1 k e^{-k (1 - r)} (h r)^2 dr = R2 h^2, k = 2 h.
    The formula as published takes half of R2, and the peer R2/2 - 1.
    """
    config = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "timestep_spacing": "trailing"}
    with wide("DPMSolverMultistep"):
        peer, ours = pair("DPMSolverMultistep", config | {"prediction_type": "sample"}, 20)
        log_u, ends = np.log(ours.u[:11]), []
        for scheduler in (peer, ours):
            x = zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
            for k in range(10):
                x0 = zero + float((log_u[k] - log_u[9]) ** 2)
                # the state does not matter to what is remembered
                x = scheduler.step(x0, scheduler.timesteps[k], zero, variance_noise=zero).prev_sample
            ends.append(float(x) * float(np.hypot(1, ours.u[10])))
    h = log_u[9] - log_u[10]
    R2 = 1 - 2 * (1 - (1 - np.exp(-2 * h)) / (2 * h)) / (2 * h)
    assert ends == pytest.approx([(R2 / 2 - 1) * h**2, R2 / 2 * h**2], rel=1e-9)
    assert abs(ends[1] - R2 * h**2) < abs(ends[0] - R2 * h**2) / 3


@pytest.mark.parametrize("n", [61, 998])
def test_a_step_too_many(n: int) -> None:
    """numpy.arange of trailing times ends one late where 1000/n rounds down: diffusers then steps from t = -1."""
    peer, ours = pair("DDPM", {"timestep_spacing": "trailing"}, n)
    assert int(peer.timesteps[-1]) == -1
    assert len(ours.timesteps) == n
    assert int(ours.timesteps[-1]) >= 0


def test_levels_that_repeat() -> None:
    """1000 steps of DPMSolverMultistep's linspace hold one time twice: 0/0 in diffusers, a first order step in ours."""
    with wide("DPMSolverMultistep"):
        peer, ours = pair("DPMSolverMultistep", {"prediction_type": "v_prediction"}, 1000)
        told = [float(t) for t in peer.timesteps]
        assert len(set(told)) < 1000
        assert loop(peer, start(), told).isnan().any()
        end = loop(ours, start(), told)
        ours.set_timesteps(990)
        other = loop(ours, start(), [float(t) for t in ours.timesteps])
        assert float((end - other).abs().max()) < 1e-4


def test_a_level_that_the_last_step_repeats() -> None:
    """Karras sigmas end at the schedule's lowest, and final_sigmas_type="sigma_min" appends it once more."""
    config = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_order": 3}
    peer, ours = pair("DPMSolverMultistep", config | {"prediction_type": "v_prediction"}, 20)
    told, states = [float(t) for t in peer.timesteps], []
    assert loop(peer, start(torch.float32), told).isnan().all()
    loop(ours, start(), told, states=states)
    # nothing is left to do there
    assert float((states[-1] - states[-2]).abs().max()) < 1e-14
    noisy = fd.DiffusersScheduler.from_config(ours.config, solver_order=2, algorithm_type="sde-dpmsolver++")
    noisy.set_timesteps(20)
    loop(noisy, start(), told, states=states, generator=torch.Generator().manual_seed(0))
    assert float((states[-1] - states[-2]).abs().max()) < 1e-14


def test_noise_before_a_number_of_steps_is_set() -> None:
    """DPMSolverMultistep's first sigmas rise while its timesteps fall: add_noise takes the level of 999 - t for t."""
    peer, x0 = peer_of("DPMSolverMultistep", {}), start(torch.float32)
    ours = fd.DiffusersScheduler.from_config(peer.config)
    noise, t = x0.flip(0), torch.tensor([100, 100])
    alpha, sigma = (float(f(np.array(100.0))) for f in (fd.linear().alpha, fd.linear().sigma))
    assert torch.allclose(ours.add_noise(x0, noise, t), alpha * x0 + sigma * noise, atol=1e-6)
    assert torch.allclose(peer.add_noise(x0, noise, t), ours.add_noise(x0, noise, 999 - t), atol=1e-4)
