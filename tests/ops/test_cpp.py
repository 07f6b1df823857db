"""What the CPU kernels alone have to get right: masks by stride, memory written twice, pixels, angles in double."""

import math
import re
from pathlib import Path

import pytest
import torch

from fastdiff import ops
from fastdiff.ops import dispatch, native, philox, q_sample_cpp, step, step_cpp, time_embed_cpp
from fastdiff.ops.q_sample import q_sample_ref
from fastdiff.ops.time_embed import time_embed_ref
from tests.ops.cases import Case, copied, inputs, run

pytestmark = pytest.mark.skipif(native.cpu is None, reason=str(native.missing()))

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def noising(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(shape, generator=g).to(dtype)
    if dtype == torch.uint8:
        x0 = torch.randint(0, 256, shape, generator=g).to(dtype)
    t, table = torch.randint(0, 10, (shape[0],), generator=g), torch.rand(10, 2, generator=g)
    return x0, t, table, torch.randn(shape, generator=g)


def mask_of(shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4


MASKS = {
    "dense": lambda n, c, *s: mask_of((n, c, *s)),
    "one for all": lambda n, c, *s: mask_of((1, 1, *(1 for _ in s)), 3),
    "an image": lambda n, c, *s: mask_of((n, 1, *(1 for _ in s))),
    "a channel": lambda n, c, *s: mask_of((1, c, *(1 for _ in s))),
    "pixels": lambda n, c, *s: mask_of((1, 1, *s)),
    "lines": lambda n, c, *s: mask_of((n, 1, *s[:-1], 1)),
    "columns": lambda n, c, *s: mask_of((n, c, *(1 for _ in s[:-1]), s[-1])),
    "channels last": lambda n, c, *s: mask_of((n, *s, c)).movedim(-1, 1),
    "every second": lambda n, c, *s: mask_of((n, c, *s, 2))[..., 1],
}


@pytest.mark.parametrize(
    "shape", [(3, 2, 5, 7), (2, 5, 13), (2, 1, 3, 5, 3), (4, 3, 33, 37), (0, 3, 4, 4), (3, 4, 1, 1)]
)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, shape):
    x0, t, table, noise = noising(shape)
    where = MASKS[name](*shape)
    noise[~where.expand(shape)] = math.nan
    wanted = q_sample_ref(x0, t, table, noise=noise, where=where, eps=True, v=True)
    got = q_sample_cpp.run(x0, t, table, noise=noise, where=where, eps=True, v=True)
    assert not got[0].isnan().any()
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8])
def test_masked_pixels_keep_every_bit(dtype):
    x0, t, table, noise = noising((3, 3, 17, 19), dtype)
    where = mask_of((3, 1, 17, 19))
    (x_t,) = q_sample_cpp.run(x0, t, table, noise=noise, where=where)
    (free,) = q_sample_cpp.run(x0, t, table, noise=noise)
    kept = x0 if dtype != torch.uint8 else x0.float() / 127.5 - 1
    assert torch.equal(x_t, torch.where(where, free, kept))


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (0, 3, 4, 4), (1, 3, 31, 101), (2, 1, 64, 64)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_into_a_given_tensor(shape, dtype):
    x0, t, table, noise = noising(shape, dtype)
    where = mask_of((shape[0], 1, *shape[2:]))
    for mask in (None, where):
        wanted = q_sample_cpp.run(x0, t, table, noise=noise, where=mask, eps=True, v=True)
        for shift in (0, 1, 16):
            room = torch.full((x0.numel() + 48,), 7.0, dtype=dtype)
            out = room[shift : shift + x0.numel()].view(shape)
            got = q_sample_cpp.run(x0, t, table, noise=noise, where=mask, eps=True, v=True, out=out)
            assert got[0] is out
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
            assert (room[:shift] == 7).all()
            assert (room[shift + x0.numel() :] == 7).all()


def flags_at(address):
    """What the system says of the memory there; nothing where it does not tell."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(found[1], 16) <= address < int(found[2], 16)
        if here and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
def test_large_results_lie_in_huge_pages():
    large = native.fresh((3, native.LARGE // 8), torch.float32)
    assert large.shape == (3, native.LARGE // 8)
    assert "hg" in flags_at(large.data_ptr() + large.nbytes // 2)


def test_huge_pages_are_asked_for_large_results_alone(monkeypatch):
    # by the calls, since a small result may well lie where the system was asked for huge pages before
    asked = []
    monkeypatch.setattr(native.cpu, "advise_huge", lambda *place: asked.append(place))
    small = native.fresh((native.LARGE // 4,), torch.float32)
    assert asked == []
    large = native.fresh_like(torch.empty(native.LARGE // 4 + 1))
    assert small.nbytes == native.LARGE
    assert asked == [(large.data_ptr(), large.nbytes)]


def test_advice_on_less_than_a_page():
    x = torch.ones(2000)
    for size in (0, 1, 4096, 8000):
        native.cpu.advise_huge(x.data_ptr(), size)
    assert (x == 1).all()


# of the larger size all pairs, of which the others are slow
LAYOUTS = [
    pytest.param(size, c, pad, dtype, marks=pytest.mark.slow if size[0] > 9 and (i + j + k) % 3 else ())
    for size in ((9, 6), (41, 47))
    for i, c in enumerate((2, 3, 4, 5, 16, 65))
    for j, pad in enumerate((0, 3, 8))
    for k, dtype in enumerate(FLOATS)
]


@pytest.mark.parametrize(("size", "channels", "pad", "dtype"), LAYOUTS)
def test_pixels_that_hold_their_channels(channels, pad, dtype, size):
    """F and x_in in channels_last, with and without channels beyond those of the state, which keep what they hold."""
    everything = ("A", "B0", "BF", "B1", "B2", "B3", "P", "Q")
    for guided, only in ((False, "both"), (True, "both"), (True, "F"), (True, "x_in")):
        case = Case((2, channels, *size), guided=guided, columns=everything, dtype=dtype)
        plain = inputs(case)
        wanted = run(step.step_reference_, copied(plain))
        args = copied(plain)
        for name in ("F", "x_in") if only == "both" else (only,):
            n = len(args[name])
            wide = torch.full((n, channels + pad, *size), 7.0, dtype=dtype).to(memory_format=torch.channels_last)
            wide[:, :channels] = args[name]
            args[name] = wide
        got = run(step_cpp.run, args)
        for name in ("x", "h"):
            assert torch.equal(got[name], wanted[name]), name
        assert torch.equal(got["x_in"][:, :channels], wanted["x_in"])
        assert (got["x_in"][:, channels:] == 7).all()


@pytest.mark.parametrize("variance", ["range", "moment"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_second_output_beside_the_first(variance, channels):
    """channels_last F of 2 C channels gives the same bits as NCHW F."""
    args = inputs(Case((3, channels, 23, 29), guided=True, variance=variance, columns=("A", "B0", "S", "Q")))
    wanted = run(step_cpp.run, copied(args))
    got = run(step_cpp.run, copied(args) | {"F": args["F"].to(memory_format=torch.channels_last)})
    for name in ("x", "x_in"):
        assert torch.equal(got[name], wanted[name])


TIMES = {
    "steps": torch.arange(0, 1000, 7),
    "negative": torch.tensor([-5, -1, 0, 3]),
    "real": torch.rand(33, generator=torch.Generator().manual_seed(0)) * 999,
    "bf16": torch.rand(7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "int32": torch.arange(5, dtype=torch.int32),
    "far": torch.tensor([1e6, 1048576.0, 1048577.0, 3e7, 1e30]),
    "none": torch.zeros(0),
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize(
    ("dim", "given"),
    [
        (128, {}),
        (64, {"shift": 1.0}),
        (7, {"flip": True, "scale": 1000.0}),
        (2, {}),
        (1, {"shift": -1.0}),
        (320, {"flip": True, "max_period": 0.01}),
        (5000, {"scale": 0.25}),
    ],
)
def test_features_against_float64(name, dim, given):
    t = TIMES[name]
    exact, got = time_embed_ref(t.double(), dim, **given), time_embed_cpp.run(t, dim, **given)
    error, theirs = ((a.double() - exact).abs() for a in (got, time_embed_ref(t, dim, **given)))
    assert got.shape == (len(t), dim)
    assert error.numel() == 0 or error.max() <= 2 * theirs.max()
    # half a last place of numbers up to 1, where float64's own angles are that good
    fastest = given.get("scale", 1.0) * max(1.0, 1 / given.get("max_period", 1.0))
    near = error[(t.double().abs() * fastest <= 1e6)]
    assert near.numel() == 0 or near.max() <= 3.2e-8
    for dtype in FLOATS:
        rounded = time_embed_cpp.run(t, dim, **given, dtype=dtype)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, time_embed_cpp.run(t, dim, **given).to(dtype))


def test_features_of_times_that_are_no_numbers():
    got = time_embed_cpp.run(torch.tensor([math.nan, 1.0, math.inf, -math.inf]), 8)
    assert got.isnan().all(1).tolist() == [True, False, True, True]


def results(x, x2, small, key):
    """Of every op that makes a tensor, gradients too."""
    add = small[:8]

    def normed_and_injected(x):
        joined = ops.group_norm_silu(x, 4, None, None, x2=x2, add=small)
        return joined, ops.group_norm_silu(x, 4, None, None), ops.inject(x, add=add, act=True)

    leaf = x.clone().requires_grad_()
    return [
        *normed_and_injected(x),
        *(torch.autograd.grad(y, leaf, y.detach())[0] for y in normed_and_injected(leaf)),
        ops.norm_silu_conv(x, x.flatten()[:576].view(4, 16, 3, 3), x2=x2, groups=4, add=add[:4]),
        ops.attention(x.flatten(2), 4),
        ops.norm_linear(x.flatten(2), x.flatten()[: 36 * 6].view(6, 36), norm=True, gate=True),
        ops.time_embed(small, 8),
        ops.normal(*key, 0, 1, (3, 5)),
        *ops.q_sample(x, key[1], small.view(8, 2), noise=x2, eps=True),
    ]


def test_results_lie_on_the_cpu_wherever_new_tensors_would():
    x, x2 = torch.randn(2, 2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    given = (x, x2, torch.linspace(0.1, 1, 16), (philox.seed_tensor(3), torch.arange(2)))
    with dispatch.backend("cpp"):
        wanted = results(*given)
        with torch.device("meta"):
            got = results(*given)
    assert all(map(torch.equal, got, wanted))
