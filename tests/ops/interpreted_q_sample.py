"""The Triton kernel of q_sample, run by the interpreter, against the reference."""

import pytest
import torch

from fastdiff.ops import philox, q_sample_triton
from fastdiff.ops.q_sample import q_sample_ref

SHAPES = [(3, 2, 5, 7), (1, 1, 1, 1), (2, 3, 16, 32), (2, 5, 13), (2, 1, 3, 5, 3), (0, 3, 4, 4), (2, 3, 0, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]


def made(shape, dtype):
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, shape, generator=g).to(torch.uint8)
    if dtype != torch.uint8:
        x0 = torch.randn(shape, generator=g).to(dtype)
    angle = torch.linspace(0.05, 1.5, 10, dtype=torch.float64)
    t = torch.randint(0, 10, (shape[0],), generator=g)
    return x0, t, torch.stack([angle.cos(), angle.sin()], 1).float()


def compare(x0, t, table, slack=0.0, **given):
    got, wanted = q_sample_triton.run(x0, t, table, **given), q_sample_ref(x0, t, table, **given)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.is_contiguous()
        assert torch.equal(a.isnan(), b.isnan())
        difference = (a.double() - b.double()).nan_to_num()
        if difference.numel():
            assert difference.abs().max() <= slack + 2 * torch.finfo(b.dtype).eps * b.nan_to_num().abs().max()
    return got


@pytest.mark.parametrize(
    ("asked", "shape", "dtype"),
    # every pair: two of the four that are asked for with each shape and dtype
    [
        pytest.param(asked, shape, dtype, marks=pytest.mark.slow if (i + j + k) % 2 else ())
        for i, asked in enumerate(((False, False), (True, False), (False, True), (True, True)))
        for j, shape in enumerate(SHAPES)
        for k, dtype in enumerate(DTYPES)
    ],
)
def test_given_and_own_noise(shape, dtype, asked):
    x0, t, table = made(shape, dtype)
    both = dict(zip(("eps", "v"), asked, strict=True))
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        compare(x0, t, table, noise=torch.randn(shape).to(kind), **both)
    own = {"seed": philox.seed_tensor(-5), "index": torch.arange(shape[0]) * 3 + 2**33, "step": 9, "stream": 130}
    compare(x0, t, table, slack=2e-6, **own, **both)


@pytest.mark.parametrize(
    "mask",
    [(3, 2, 4, 6), (1, 2, 4, 6), (3, 1, 4, 6), (1, 1, 4, 6), (3, 2, 1, 1), (3, 1, 1, 1), (1, 1, 1, 1), (3, 1, 4, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_masks(mask, dtype):
    x0, t, table = made((3, 2, 4, 6), dtype)
    where = torch.rand(mask, generator=torch.Generator().manual_seed(3)) < 0.5
    given = {"noise": torch.randn(x0.shape), "eps": True, "v": True}
    whole = compare(x0, t, table, **given)
    got = compare(x0, t, table, where=where, **given)
    assert torch.equal(got[1], whole[1])
    assert torch.equal(got[2], whole[2])
    everywhere = where.expand(x0.shape)
    assert torch.equal(got[0][everywhere], whole[0][everywhere])
    for view in (where.expand(3, 2, 4, 6), torch.stack([where, ~where], -1)[..., 0]):
        assert torch.equal(q_sample_triton.run(x0, t, table, where=view, **given)[0], got[0])


def test_layouts_of_every_argument():
    x0, t, table = made((4, 3, 8, 6), torch.float32)
    noise = torch.randn(x0.shape)
    wanted = compare(x0, t, table, noise=noise)[0]
    for view in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], -1)[..., 1],
    ):
        assert torch.equal(q_sample_triton.run(view(x0), t, table, noise=view(noise))[0], wanted)
    spread = torch.stack([t, t + 1], 1)[:, 0]
    assert torch.equal(q_sample_triton.run(x0, spread, table.double(), noise=noise)[0], wanted)


def test_out_is_written_and_returned():
    x0, t, table = made((2, 3, 4, 4), torch.bfloat16)
    noise, out = torch.randn(x0.shape), torch.full(x0.shape, torch.nan, dtype=torch.bfloat16)
    got = q_sample_triton.run(x0, t, table, noise=noise, eps=True, out=out)
    assert got[0] is out
    assert torch.equal(out, q_sample_ref(x0, t, table, noise=noise)[0])
    assert torch.equal(got[1], noise.bfloat16())


def test_nan_stays_in_its_pixel():
    x0, t, table = made((3, 1, 4, 4), torch.float32)
    x0[1, 0, 2, 3] = torch.nan
    assert compare(x0, t, table, noise=torch.randn(3, 1, 4, 4))[0].isnan().nonzero().tolist() == [[1, 0, 2, 3]]


def test_what_the_kernel_refuses():
    x0, t, table = made((2, 1, 3, 3), torch.float32)
    noise = torch.randn(2, 1, 3, 3)
    assert q_sample_triton.refuses(x0, t, table, noise=noise) is None
    assert "got torch.float64" in q_sample_triton.refuses(x0.double(), t, table, noise=noise)
    assert "run on cpu" in q_sample_triton.refuses(x0, t, table, noise=noise.to("meta"))
    assert "within 2^30" in q_sample_triton.refuses(torch.empty(2, 2, 2**15, 2**15, device="meta"), t, table)
