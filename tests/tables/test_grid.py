"""Spacings against the programs that named them, and levels on and off the grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdiff.tables.schedule import (
    cosine,
    edm,
    flow,
    levels,
    linear,
    scaled_linear,
    sigmoid,
    sub_vp,
    times,
    ve,
    vp,
)

ALL = [linear(), cosine(), sigmoid(), vp(), scaled_linear(T=None), sub_vp(), ve(), edm(), flow(), cosine(T=None)]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_integer_spacings_are_those_of_diffusers(diffusers, spacing):
    s = linear()
    for offset in (0, 1) if spacing == "leading" else (0,):
        for steps in (1, 2, 3, 5, 7, 10, 13, 20, 25, 50, 64, 100, 300, 333, 999):
            peer = diffusers.DDIMScheduler(1000, timestep_spacing=spacing, steps_offset=offset)
            peer.set_timesteps(steps)
            ours = times(s, steps, spacing, steps_offset=offset)
            np.testing.assert_array_equal(ours[:-1], peer.timesteps.numpy()[:steps], err_msg=f"{spacing} {steps}")
            assert ours[-1] == -1
            assert len(ours) == steps + 1
    np.testing.assert_array_equal(times(s, 1000, "trailing"), np.arange(999, -2, -1))
    assert times(s, 10, spacing, final="first")[-1] == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the peer's own, with NumPy 2
def test_karras_levels_are_those_of_diffusers(diffusers):
    for steps in (5, 20, 50):
        for option, spacing in (("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential")):
            peer = diffusers.EulerDiscreteScheduler(
                1000, beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace", **{option: True}
            )
            # the peer's float32 products are off by 8e-5 at the first step
            peer.alphas_cumprod = torch.from_numpy(linear().alpha(np.arange(1000.0)) ** 2)
            peer.set_timesteps(steps)
            grid = levels(linear(), times(linear(), steps, spacing))
            np.testing.assert_allclose(grid.u[:-1], peer.sigmas.numpy()[:-1], rtol=1e-6)
            np.testing.assert_allclose(grid.t[:-1], peer.timesteps.numpy(), rtol=1e-6, atol=1e-4)


def test_quad_and_respaced_are_those_of_their_programs():
    s = linear()
    quad = [int(q) for q in [(math.sqrt(800) * i / 9) ** 2 for i in range(10)]]
    np.testing.assert_array_equal(times(s, 10, "quad")[-2::-1], quad)
    np.testing.assert_array_equal(times(s, None, "ddim25")[-2::-1], range(0, 1000, 40))
    np.testing.assert_array_equal(times(s, None, "ddim50")[-2::-1], range(0, 1000, 20))
    # three sections of 334, 333, 333 steps
    kept = times(s, None, "10,15,20")[-2::-1]
    assert len(kept) == 45
    np.testing.assert_array_equal(kept[:10], np.round(np.arange(10) * 37.0))
    np.testing.assert_array_equal(kept[10:25], 334 + np.round(np.arange(15) * 332 / 14))
    np.testing.assert_array_equal(kept[[25, 44]], [667, 999])
    np.testing.assert_array_equal(times(s, 1000, "1000"), np.arange(999, -2, -1))
    assert (times(linear(T=4000), None, "250")[[0, -2]] == [3999, 0]).all()
    with pytest.raises(ValueError, match=r'no whole stride keeps 999.*use "999"'):
        times(s, None, "ddim999")
    with pytest.raises(ValueError, match=r"contradicts spacing='ddim25', which has 25"):
        times(s, 20, "ddim25")
    with pytest.raises(ValueError, match=r"section 1 of spacing='10,600' keeps 600 of 500"):
        times(s, None, "10,600")


def test_levels_of_u():
    s = edm()
    u = times(s, 18)
    want = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)] + [0]
    np.testing.assert_allclose(u, want, rtol=1e-13, atol=0)
    np.testing.assert_array_equal(u[[0, -2, -1]], [80, 0.002, 0])
    first = times(s, 18, final="first")
    assert (len(first), first[0], first[-1]) == (19, 80, 0.002)
    np.testing.assert_allclose(np.diff(np.log(times(s, 9, "exponential")[:-1]), n=2), 0, atol=1e-12)
    log = levels(vp(), times(vp(), 9, "logsnr"))
    np.testing.assert_allclose(np.diff(np.log(log.u), n=2), 0, atol=1e-11)
    assert (len(log.u), log.t[0], log.t[-1]) == (10, 1, 1e-3)
    for s in (linear(), cosine()):
        t = times(s, 6, "karras")
        assert (len(t), t[0], t[-2], t[-1]) == (7, s.t_max, 0, -1)
        np.testing.assert_allclose(np.diff(levels(s, t[:-1]).u ** (1 / 7), n=2), 0, atol=1e-10)


def test_uniform_times_end_where_asked():
    np.testing.assert_array_equal(times(vp(), 4), np.linspace(1, 1e-3, 5))
    np.testing.assert_array_equal(times(vp(), 4, t_end=0.01, denoise=True), [*np.linspace(1, 0.01, 5), 0])
    np.testing.assert_array_equal(times(flow(), 4, denoise=True), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_array_equal(times(linear(), 2, lambda s, n: [s.t_max, 3 * n, -1]), [999, 6, -1])
    np.testing.assert_array_equal(times(linear(), 2, final="first", denoise=True), [999, 499, 0, -1])


@pytest.mark.parametrize(
    ("s", "steps", "options", "message"),
    [
        (linear(), 0, {}, "steps must be a whole number >= 1, got 0"),
        (linear(), 2.5, {}, "got 2.5"),
        (linear(), None, {}, "got None"),
        (linear(), 1001, {}, "exceeds the schedule's T=1000"),
        (linear(), 1000, {"spacing": "leading", "steps_offset": 1}, "asks for t=1000 > 999"),
        (linear(), 10, {"spacing": "uniform"}, "not one of trailing, leading"),
        (vp(), 10, {"spacing": "trailing"}, "not one of uniform, karras"),
        (flow(), 10, {"spacing": "karras"}, "goes from inf to 0"),
        (linear(), 10, {"t_end": 0.1}, "t_end is a time of a continuous schedule"),
        (vp(), 10, {"t_end": 1.0}, "below 1, got 1.0"),
        (vp(), 10, {"final": "last"}, "got 'last'"),
    ],
)
def test_grids_refuse(s, steps, options, message):
    with pytest.raises(ValueError, match=message):
        times(s, steps, **options)


def test_levels_off_the_grid():
    for s in ALL:
        grid = levels(s, times(s, 6))
        u = np.array([0.03, 0.7, 11.0])
        t, alpha, sigma = grid.at(u)
        np.testing.assert_allclose(sigma / alpha, u, rtol=1e-15)
        np.testing.assert_allclose(s.sigma(t) / s.alpha(t), u, rtol=2e-12)
    # beyond a discrete schedule the state keeps its u, the network is told the nearest step
    t, alpha, sigma = levels(linear(), [999, -1]).at(np.array([1e4, 1e-4, 0.0]))
    np.testing.assert_array_equal(t, [999, 0, -1])
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-15)


def test_quantized_levels_are_the_schedules_own():
    s = linear()
    grid = levels(s, [998.6, 400.4, -1], quantize=True)
    np.testing.assert_array_equal(grid.t, [999, 400, -1])
    own = s.sigma(np.array([41.0, 42.0])) / s.alpha(np.array([41.0, 42.0]))
    middle = np.sqrt(own[0] * own[1])
    np.testing.assert_array_equal(grid.snap(np.array([middle * 0.9999, middle * 1.0001, 0.0])), [*own, 0])
    with pytest.raises(ValueError, match="needs a discrete schedule, got 'vp'"):
        levels(vp(), [1, 0.5], quantize=True)


@pytest.mark.parametrize("bad", [[1000, 0], [5, -0.5], [5, -2], [5], [[5, 4]], [5, np.nan]])
def test_levels_refuse_times_that_are_not_there(bad):
    with pytest.raises(ValueError, match=r"t of schedule|times must be"):
        levels(linear(), bad)
    with pytest.raises(ValueError, match=">= 0"):
        levels(vp(), [0.5, -1])
