"""q_sample: every backend against the formula in float64."""

import math

import pytest
import torch

from fastdiff.ops import dispatch, philox, q_sample

BACKENDS = [n for n in dispatch.BACKENDS if dispatch.reason("q_sample", n) is None]
SHAPES = [(3, 2, 5, 7), (1, 1, 1, 1), (4, 3, 16, 16), (2, 5, 13), (2, 1, 3, 5, 3), (0, 3, 4, 4), (2, 3, 0, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]


def made(shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, 256, shape, generator=g).to(torch.uint8)
    if dtype != torch.uint8:
        x0 = torch.randn(shape, generator=g).to(dtype)
    t = torch.randint(0, 10, (shape[0],), generator=g)
    angle = torch.linspace(0.05, 1.5, 10, dtype=torch.float64)
    return x0, t, torch.stack([angle.cos(), angle.sin()], 1).float()


def written_out(x0, t, table, eps):
    """x_t and v, image by image, in float64."""
    pixels = x0.double() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.double()
    x_t, v = torch.empty_like(pixels), torch.empty_like(pixels)
    for n in range(len(x0)):
        alpha, sigma = table[t[n]].double().tolist()
        x_t[n] = alpha * pixels[n] + sigma * eps[n]
        v[n] = alpha * eps[n] - sigma * pixels[n]
    return x_t, v


def close(got, wanted, slack=0.0):
    """Within two roundings of the result's dtype and the slack."""
    size = wanted.abs().max().item() if wanted.numel() else 0.0
    assert (got.double() - wanted).abs().max().item() <= 2 * torch.finfo(got.dtype).eps * size + slack if size else True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_given_noise(backend, dtype, shape):
    x0, t, table = made(shape, dtype)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wanted_x, wanted_v = written_out(x0, t, table, noise.double())
    with dispatch.backend(backend):
        x_t, eps, v = q_sample(x0, t, table, noise=noise, eps=True, v=True)
        alone = q_sample(x0, t, table, noise=noise)
    assert x_t.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    close(x_t, wanted_x)
    close(v, wanted_v)
    assert torch.equal(eps, noise.to(eps.dtype))
    assert torch.equal(alone, x_t)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_own_noise(backend, dtype, shape):
    x0, t, table = made(shape, dtype)
    key, index = philox.seed_tensor(5), torch.arange(shape[0]) * 3 + 2**33
    z = philox.normal(key, index, 9, 130, shape[1:], torch.float64)
    wanted_x, wanted_v = written_out(x0, t, table, z)
    with dispatch.backend(backend):
        x_t, eps, v = q_sample(x0, t, table, seed=key, index=index, step=9, stream=130, eps=True, v=True)
    close(x_t, wanted_x, 1e-6)
    close(v, wanted_v, 1e-6)
    close(eps, z, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    x0, t, table = made((4, 3, 8, 6), torch.float32)
    key, index = philox.seed_tensor(5), torch.arange(4)
    with dispatch.backend(backend):
        wanted = q_sample(x0, t, table, seed=key, index=index)
        for view in (
            x0.to(memory_format=torch.channels_last),
            x0.transpose(2, 3).contiguous().transpose(2, 3),
            torch.stack([x0, x0], -1)[..., 1],
        ):
            assert torch.equal(q_sample(view, t, table, seed=key, index=index), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_pixel(backend):
    x0, t, table = made((3, 1, 4, 4), torch.float32)
    noise = torch.randn(3, 1, 4, 4)
    x0[1, 0, 2, 3] = math.nan
    with dispatch.backend(backend):
        assert q_sample(x0, t, table, noise=noise).isnan().nonzero().tolist() == [[1, 0, 2, 3]]


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_gradients_reach_the_image(backend):
    x0, t, table = made((2, 1, 3, 3), torch.float32)
    x0.requires_grad_()
    noise = torch.randn(2, 1, 3, 3)
    with dispatch.backend(backend):
        q_sample(x0, t, table, noise=noise).sum().backward()
    assert torch.equal(x0.grad, table[t, 0].reshape(2, 1, 1, 1).expand(2, 1, 3, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_times_outside_the_table(backend):
    x0, _, table = made((2, 1, 3, 3), torch.float32)
    for wrong in (10, -1):
        with dispatch.backend(backend), pytest.raises((IndexError, ValueError), match="range"):
            q_sample(x0, torch.tensor([0, wrong]), table, noise=torch.zeros(2, 1, 3, 3))


def test_arguments_that_do_not_fit():
    x0, t, table = made((2, 1, 3, 3), torch.float32)
    with pytest.raises(ValueError, match="pass noise"):
        q_sample(x0, t, table)
    with pytest.raises(ValueError, match="t must be"):
        q_sample(x0, t[:1], table, noise=x0)
    with pytest.raises(ValueError, match="noise must be"):
        q_sample(x0, t, table, noise=x0[:1])
