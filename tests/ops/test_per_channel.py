"""The small tensors of kernels: a slice of a wide row gives the bits that a dense copy gives, and is not copied."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastdiff.ops import dispatch, group_norm_silu, inject, native, norm_silu_conv
from tests.ops.describe import laid

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels here")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_kernels)]
N, C = 3, 12


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(count, seed=0):
    """add, scale, shift of one shape."""
    return dict(zip(("add", "scale", "shift"), drawn(3, *count, seed=seed), strict=True))


OPS = {
    "group_norm_silu": lambda x, given: group_norm_silu(x, 4, None, None, **given),
    "inject": lambda x, given: inject(x, act=True, **given),
    "norm_silu_conv": lambda x, given: norm_silu_conv(x, drawn(C, C, 3, 3, seed=2), groups=4, **given),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_slices_give_the_same_bits(op, last, backend):
    x = drawn(N, C, 6, 5, seed=1).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    found = []
    for layout in ("contiguous", "sliced", "transposed", "unaligned"):
        leaves = {k: laid(v, layout).requires_grad_() for k, v in small((N, C)).items()}
        with dispatch.backend(backend):
            y = OPS[op](x.requires_grad_(), leaves)
        found.append([y, *torch.autograd.grad(y, [x, *leaves.values()], drawn(*y.shape, seed=3))])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_no_slice_is_copied(op, monkeypatch):
    given, seen = {k: laid(v, "sliced") for k, v in small((N, C)).items()}, []
    address = native.address
    monkeypatch.setattr(native, "address", lambda v: seen.append(address(v)) or seen[-1])
    with dispatch.backend("cpp"), torch.no_grad():
        OPS[op](drawn(N, C, 6, 5), given)
    assert {v.data_ptr() for v in given.values()} <= set(seen)


def test_what_is_taken_as_it_lies():
    row = drawn(N, 5 * C)
    for v, apart in ((row[:, C : 2 * C], 5 * C), (row[:1].expand(N, -1), 0), (row[0, 3:], 0), (row[:, 3:4], 5 * C)):
        assert native.per_channel(v) is v
        assert native.apart(v) == apart
    assert native.per_channel(None) is None
    assert native.apart(None) == 0
    for v in (row[:, ::2], row.t(), row[:, 0], row.to(torch.bfloat16)[:, 1:]):
        taken = native.per_channel(v)
        assert torch.equal(taken, v.float())
        assert (taken.stride(-1), native.apart(taken)) == (1, v.shape[-1] if v.ndim == 2 else 0)


def test_a_graph_gets_them_dense():
    """The step from image to image is a number of it, and a compiler may lay out anew what is not dense."""
    with FakeTensorMode():
        taken = native.per_channel(torch.empty(N, 5 * C)[:, C : 2 * C])
        assert (taken.stride(), native.apart(taken)) == ((C, 1), C)
