"""ddim, ddpm and dpmpp_3m_sde against the schedulers of diffusers, with the peer's own alphas, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff import row
from fastdiff.tables.plan import plan
from fastdiff.tables.schedule import schedule
from fastdiff.tables.solvers import ddim, ddpm, dpmpp_3m_sde
from tests.tables.gaussian import net, network, run

SHAPE = (2, 5)


def own_alphas(peer):
    """The peer's table of alphas as a schedule, and the peer in float64."""
    peer.alphas_cumprod = peer.alphas_cumprod.double()
    abar = peer.alphas_cumprod.numpy()
    i = lambda t: t.astype(int)  # noqa: E731
    return schedule(lambda t: np.sqrt(abar[i(t)]), lambda t: np.sqrt(1 - abar[i(t)]), T=len(abar))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("clipped_direction", [True, False])
@pytest.mark.parametrize(("predicts", "kind"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_ddim_is_diffusers(rng, diffusers, spacing, eta, clip, clipped_direction, predicts, kind):
    for steps, one in ((10, True), (50, False)):
        peer = diffusers.DDIMScheduler(
            1000,
            prediction_type=kind,
            timestep_spacing=spacing,
            clip_sample=clip is not None,
            set_alpha_to_one=one,
            steps_offset=0,
        )
        s = own_alphas(peer)
        peer.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64) if one else peer.alphas_cumprod[0]
        peer.set_timesteps(steps)
        options = {"eta": eta, "clipped_direction": clipped_direction, "clip": clip}
        rows = plan(s, predicts, ddim, steps=steps, spacing=spacing, final="zero" if one else "first", **options)
        x, zs = rng.standard_normal(SHAPE), rng.standard_normal((steps, *SHAPE))
        state = torch.from_numpy(x)
        for t, z in zip(peer.timesteps, zs, strict=True):
            F = torch.from_numpy(net(state.numpy(), int(t)))
            state = peer.step(
                F, t, state, eta=eta, use_clipped_model_output=clipped_direction, variance_noise=torch.from_numpy(z)
            ).prev_sample
        np.testing.assert_array_equal(rows[:-1, row.T], peer.timesteps.numpy())
        np.testing.assert_allclose(run(rows, x, network, zs), state.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("variance", "kind"), [("beta_tilde", "fixed_small"), ("beta", "fixed_large")])
@pytest.mark.parametrize(("steps", "spacing"), [(1000, "leading"), (50, "leading"), (40, "trailing")])
def test_ddpm_is_diffusers(rng, diffusers, variance, kind, steps, spacing):
    peer = diffusers.DDPMScheduler(1000, variance_type=kind, clip_sample=True, timestep_spacing=spacing)
    s = own_alphas(peer)
    peer.set_timesteps(steps)
    x = rng.standard_normal(SHAPE)
    state, theirs, ours = torch.from_numpy(x), torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    zs, states = [], []
    for t in peer.timesteps:
        F = torch.from_numpy(net(state.numpy(), int(t)))
        state = peer.step(F, t, state, generator=theirs).prev_sample
        zs.append(torch.randn(SHAPE, generator=ours, dtype=torch.float64).numpy())
        states.append(state.numpy())
    rows = plan(s, "eps", ddpm, steps=steps, spacing=spacing, variance=variance, clip=1.0)
    if variance == "beta" and peer.timesteps[-1] > 0:
        # the peer adds noise of variance 1 - abar_t to its result when the last step is not t = 0; Ho adds none
        rows, state = rows[:-1], torch.from_numpy(states[-2])
    np.testing.assert_allclose(run(rows, x, network, zs), state.numpy(), rtol=0, atol=1e-9)


def test_dpmpp_3m_ode_is_diffusers(rng, diffusers):
    # the peer's SDE form subtracts 1/2 where -phi_3 adds it, so the ODE form only
    peer = diffusers.DPMSolverMultistepScheduler(1000, prediction_type="sample", solver_order=3, solver_type="heun")
    s = own_alphas(peer)
    t = np.arange(999, 0, -50)
    rows = plan(s, "x0", dpmpp_3m_sde, times=[*t, -1], eta=0.0)
    # its `step` computes in float32, its updates in what they are given
    peer.sigmas = torch.from_numpy(np.append(s.sigma(t) / s.alpha(t), 0.0))
    x = rng.standard_normal(SHAPE)
    state, seen = torch.from_numpy(x), []
    for k in range(20):
        seen.append(torch.from_numpy(net(state.numpy(), int(t[k]))))
        peer._step_index = k
        if k in (0, 19):
            state = peer.dpm_solver_first_order_update(seen[-1], sample=state)
        elif k == 1:
            state = peer.multistep_dpm_solver_second_order_update(seen, sample=state)
        else:
            state = peer.multistep_dpm_solver_third_order_update(seen, sample=state)
    np.testing.assert_allclose(run(rows, x, network), state.numpy(), rtol=0, atol=1e-9)
