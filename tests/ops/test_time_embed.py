"""Sinusoidal features against DDPM's and guided diffusion's formulas, number by number."""

import math

import pytest
import torch

from fastdiff.ops import time_embed


@pytest.mark.parametrize(("dim", "shift", "flip"), [(8, 0.0, True), (8, 1.0, False), (7, 0.0, True), (128, 1.0, True)])
@pytest.mark.parametrize("period", [10000.0, 100.0])
def test_formula(dim, shift, flip, period):
    t = torch.tensor([0.0, 1.0, 17.0, 999.0, 3.25])
    got = time_embed(t.double(), dim, max_period=period, flip=flip, shift=shift)
    half = dim // 2
    for n, time in enumerate(t.tolist()):
        for j in range(half):
            angle = time * period ** (-j / (half - shift))
            c, s = (j, half + j) if flip else (half + j, j)
            assert math.isclose(got[n, c], math.cos(angle), abs_tol=1e-12)
            assert math.isclose(got[n, s], math.sin(angle), abs_tol=1e-12)
    assert (got[:, 2 * half :] == 0).all()


def test_whole_steps_equal_real_times():
    steps = torch.arange(1000)
    assert torch.equal(time_embed(steps, 64), time_embed(steps.float(), 64))
    assert time_embed(steps, 64).dtype == torch.float32


def test_too_few_features():
    with pytest.raises(ValueError, match="dim=2 with shift=1"):
        time_embed(torch.zeros(1), 2, shift=1.0)
