"""The residual of inject: what is copied, rounded and kept of it, and what is refused."""

import pytest
import torch

from fastdiff.ops import dispatch, inject, native
from fastdiff.ops.group_norm_call import Given
from tests.ops.describe import FLOATS

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels here")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_kernels)]
NO_NUMBERS = (None,) * 6
FORMS = [torch.contiguous_format, torch.channels_last]


def drawn(*shape, dtype=torch.float32, form=torch.contiguous_format, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).contiguous(memory_format=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_residual_that_lies_as_x_does_is_read_where_it_lies(dtype, form):
    given = Given.of(drawn(2, 3, 5, 7, dtype=dtype, form=form), *NO_NUMBERS)
    for own in {dtype, torch.float32}:
        v = drawn(2, 3, 5, 7, dtype=own, form=form)
        assert given.beside(v) is v
    # of one channel or one pixel both layouts are the same
    one = Given.of(drawn(2, 1, 5, 7, dtype=dtype, form=form), *NO_NUMBERS)
    v = drawn(2, 1, 5, 7, dtype=dtype, form=FORMS[form is FORMS[0]])
    assert one.beside(v).data_ptr() == v.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own", [*FLOATS, torch.float64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rounded_once_in_any_layout(backend, dtype, own, form):
    x, r = drawn(2, 3, 5, 7, dtype=dtype, form=form), drawn(2, 3, 5, 7, dtype=own, seed=1)
    wanted = (x.float() + r.float()).to(dtype)
    with dispatch.backend(backend):
        for v in (r, r.contiguous(memory_format=torch.channels_last), r.mT.contiguous().mT):
            y = inject(x, residual=v)
            assert torch.equal(y, wanted)
            assert y.stride() == x.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_x_as_its_own_residual(backend, dtype):
    x, add = drawn(2, 3, 5, 7, dtype=dtype), drawn(3)
    kept, other = x.clone(), x.clone()
    with dispatch.backend(backend):
        y, wanted = inject(x, add=add, residual=x, act=True), inject(x, add=add, residual=other, act=True)
        assert torch.equal(y, wanted)
        assert torch.equal(x, kept)
        a, b, c = (v.detach().clone().requires_grad_() for v in (x, x, x))
        (both,) = torch.autograd.grad(inject(a, add=add, residual=a, act=True).sum(), a)
        apart = torch.autograd.grad(inject(b, add=add, residual=c, act=True).sum(), (b, c))
    if backend == "reference":
        # it adds the two in fp32
        apart = [v.float() for v in apart]
        assert (both.float() - sum(apart)).abs().max() <= 2 * torch.finfo(dtype).eps * both.float().abs().max()
    else:
        assert torch.equal(both, sum(apart))


@pytest.mark.parametrize("own", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_its_gradient_is_dy_and_keeps_nothing(dtype, own):
    x, r = drawn(2, 3, 5, 7, dtype=dtype), drawn(2, 3, 5, 7, dtype=own, seed=1)
    x.requires_grad_()
    r.requires_grad_()
    dy, kept = drawn(2, 3, 5, 7, dtype=dtype, seed=2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.data_ptr()) or v, lambda v: v):
        y = inject(x, residual=r, act=True)
    (dr,) = torch.autograd.grad(y, r, dy)
    assert dr.dtype == own
    assert torch.equal(dr, dy.to(own))
    assert r.data_ptr() not in kept


@pytest.mark.parametrize("residual", [torch.zeros(2, 3, 7, 5), torch.zeros(3, 5, 7), torch.zeros(1, 3, 5, 7)])
def test_another_shape_is_refused(residual):
    with pytest.raises(ValueError, match=r"inject: residual is \(.*\) on cpu; accepted: \(2, 3, 5, 7\) on cpu, as x"):
        inject(torch.zeros(2, 3, 5, 7), residual=residual)


def test_another_device_is_refused():
    with pytest.raises(ValueError, match=r"residual is \(2, 3, 4\) on meta; accepted: \(2, 3, 4\) on cpu, as x"):
        inject(torch.zeros(2, 3, 4), residual=torch.zeros(2, 3, 4, device="meta"))
