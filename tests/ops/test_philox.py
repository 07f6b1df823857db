"""The noise: known answers, its layout, its distribution."""

import math

import pytest
import torch

from fastdiff.ops import dispatch, normal, philox


def _words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 in Python integers, one counter at a time, straight from Salmon 2011, figure 2."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_the_paper(counter, key, answer):
    assert tuple(_words(counter, key)) == answer


def test_counter_layout():
    seed, step, stream = 0xFEDCBA9876543210, 77, 200
    index = torch.tensor([0, 5, 2**40 + 3])
    got = torch.stack(philox.words(philox.seed_tensor(seed), index, step, stream, 9), 2)
    for n, number in enumerate(index.tolist()):
        for block in range(9):
            counter = (block, step | stream << 24, number % 2**32, number >> 32)
            assert got[n, block].tolist() == _words(counter, (seed % 2**32, seed >> 32))


def test_uniform_is_the_rounded_word():
    key, index = philox.seed_tensor(3), torch.arange(4)
    u = philox.uniform(key, index, 0, 9, (4096,))
    w = torch.stack(philox.words(key, index, 0, 9, 1024), 2).flatten(1)
    exact = w.to(torch.float64) * 2.0**-32 + 2.0**-33
    assert u.dtype == torch.float32
    # two roundings, of the word and of the sum
    assert (u.double() - exact).abs().max() <= 2**-24
    assert u.min() > 0
    assert u.max() <= 1


def test_normal_is_box_muller_of_the_uniforms():
    key, index = philox.seed_tensor(11), torch.arange(64)
    u = philox.uniform(key, index, 5, 1, (1024,)).double().reshape(64, 256, 4)
    r = (-2 * u[..., 0::2].log()).sqrt()
    angle = 2 * math.pi * u[..., 1::2]
    wanted = torch.stack([r * angle.cos(), r * angle.sin()], 3).reshape(64, 1024)
    assert (philox.normal(key, index, 5, 1, (1024,)).double() - wanted).abs().max() <= 1e-6
    assert (philox.normal(key, index, 5, 1, (1024,), torch.float64) - wanted).abs().max() <= 1e-14


def test_noise_of_an_image_is_its_own():
    key = philox.seed_tensor(1)
    many = philox.normal(key, torch.arange(64), 3, 1, (3, 8, 8))
    assert torch.equal(philox.normal(key, torch.tensor([17]), 3, 1, (3, 8, 8))[0], many[17])
    shuffled = torch.tensor([5, 63, 0])
    assert torch.equal(philox.normal(key, shuffled, 3, 1, (3, 8, 8)), many[shuffled])
    # a larger image begins with the same numbers
    assert torch.equal(philox.normal(key, shuffled, 3, 1, (200,))[:, :192], many[shuffled].flatten(1))


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 4}, {"stream": 2}, {"index": 8}])
def test_every_part_of_the_key_matters(other):
    def draw(seed=1, step=3, stream=1, index=7):
        return philox.normal(philox.seed_tensor(seed), torch.tensor([index]), step, stream, (1 << 14,))[0]

    a, b = draw(), draw(**other)
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(len(a))


def test_moments():
    z = philox.normal(philox.seed_tensor(0), torch.arange(256), 0, 0, (1 << 12,), torch.float64)
    n = z.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4.5 * math.sqrt(spread / n)
    four = z.reshape(-1, 4)
    assert (torch.corrcoef(four.T) - torch.eye(4)).abs().max() < 4.5 / math.sqrt(len(four))


def test_seeds_of_64_bits():
    assert philox.seed_tensor(2**64 - 1).item() == -1
    assert philox.seed_tensor(-5).item() == -5
    with pytest.raises(ValueError, match="64 bits"):
        philox.seed_tensor(2**64)


@pytest.mark.parametrize("backend", [n for n in dispatch.BACKENDS if dispatch.reason("normal", n) is None])
@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (3, 32, 32), (4099,)])
def test_normal_as_an_op(backend, shape):
    key, index = philox.seed_tensor(2**63 + 7), torch.tensor([0, 3, 2**40 + 1, 2**62])
    wanted = philox.normal(key, index, 11, 200, shape, torch.float64)
    with dispatch.backend(backend):
        got = normal(key, index, 11, 200, shape)
        assert torch.equal(normal(key, index[2:3], 11, 200, shape)[0], got[2])
    assert got.dtype == torch.float32
    assert (got - wanted).abs().max() <= 1e-6
