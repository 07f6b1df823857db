"""inject in Triton's interpreter, against float64, and the offsets of large tensors."""

import pytest
import torch

from fastdiff.ops import jit
from fastdiff.ops.inject import inject_ref

if not jit.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from fastdiff.ops import group_norm_parts_triton, inject_triton
from tests.ops.interpreted_group_norm import BF16, FP16, Case, bound, error, tensors

INJECTIONS = [
    Case((2, 12, 5, 7), 1),
    Case((2, 12, 5, 7), 1, last=True, act=False),
    Case((2, 12, 5, 7), 1, injected=("add",), per_image=False, dtype=BF16),
    Case((2, 12, 5, 7), 1, injected=("scale",), act=False, dtype=FP16),
    Case((2, 12, 5, 7), 1, injected=("shift",), dtype=FP16, last=True),
    Case((3, 7, 11), 1),
    Case((2, 6, 3, 4, 2), 1, last=True, dtype=BF16),
    Case((2, 12, 5, 7), 1, injected=(), act=True),
    Case((1, 3, 70, 70), 1, injected=("add", "scale")),
]


@pytest.mark.parametrize("case", INJECTIONS, ids=str)
def test_inject_against_float64(case):
    dy, x, _, _, given = tensors(case)
    given.pop("x2")

    def grads(dtype):
        leaf = x.to(dtype).requires_grad_()
        wide = {k: v.double().expand(x.shape[:2]).clone().requires_grad_() for k, v in given.items()}
        y = inject_ref(leaf, act=case.act, **(wide if dtype is torch.float64 else given))
        return y.detach(), torch.autograd.grad(
            y, [leaf, *(wide.values() if dtype is torch.float64 else ())], dy.to(dtype)
        )

    y64, (dx64, *more) = grads(torch.float64)
    torch_y, (torch_dx,) = grads(case.dtype)
    y = inject_triton.run(x, act=case.act, **given)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    assert error(y, y64) <= bound(case, y64, error(torch_y, y64), 2)
    dx, sums = inject_triton.run_backward(dy, x, act=case.act, **given)
    assert (dx.dtype, dx.stride()) == (x.dtype, x.stride())
    assert error(dx, dx64) <= bound(case, dx64, error(torch_dx, dx64), 3)
    # s1 is what `shift` gets, s2 what `scale` gets; `add` gets (1 + scale) s1
    for name, grad in zip(given, more, strict=True):
        scale = 1 + given["scale"].double() if name == "add" and "scale" in given else 1.0
        got = sums[..., 1] if name == "scale" else sums[..., 0] * scale
        assert error(got, grad) <= 2e-6 * grad.abs().max() + 1e-6 * dy.abs().flatten(2).sum(2).max()


@triton.jit
def places(out, n, c0, p0, C, P, LAST: tl.constexpr):
    first, tile = group_norm_parts_triton.place(n, c0, p0, C, P, 4, 8, LAST, 8)
    i = tl.arange(0, 32)
    tl.store(out + i, tl.reshape(first + tile, (32,)))


@pytest.mark.parametrize("last", [False, True])
def test_offsets_beyond_32_bits(last):
    n, c0, p0, C, P = 70_001, 60, 2**15 - 8, 64, 2**15
    out = torch.empty(32, dtype=torch.int64)
    places[(1,)](out, n, c0, p0, C, P, last)
    c, p = c0 + torch.arange(4), p0 + torch.arange(8)
    wanted = (n * P + p[:, None]) * C + c if last else (n * C + c[:, None]) * P + p
    assert wanted.min() > 2**36
    assert torch.equal(out, wanted.flatten())


@pytest.mark.parametrize("last", [False, True])
def test_dy_of_the_other_layout(last):
    dy, x, _, _, given = tensors(Case((2, 6, 3, 5), 1, injected=("add", "scale"), last=last))
    other = dy.contiguous() if last else dy.to(memory_format=torch.channels_last)
    numbers = {name: given[name] for name in ("add", "scale")}
    wanted = inject_triton.run_backward(dy, x, act=True, **numbers)
    assert all(map(torch.equal, wanted, inject_triton.run_backward(other, x, act=True, **numbers)))


RESIDUALS = {
    "same": torch.randn_like,
    "x itself": lambda x: x,
    "fp32": lambda x: torch.randn_like(x, dtype=torch.float32),
    "other dtype": lambda x: torch.randn_like(x, dtype=BF16 if x.dtype is FP16 else FP16),
    "transposed": lambda x: torch.randn_like(x.mT.contiguous()).mT,
    "cropped": lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] + 2).normal_()[..., 1:-1],
}


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("case", [INJECTIONS[i] for i in (0, 1, 2, 4, 5, 6, 8)], ids=str)
def test_residual_against_float64(case, kind):
    _, x, _, _, given = tensors(case)
    given.pop("x2")
    torch.manual_seed(0)
    residual = RESIDUALS[kind](x)
    y = inject_triton.run(x, act=case.act, residual=residual, **given)
    wide = {k: v.double() for k, v in given.items()}
    y64 = inject_ref(x.double(), act=case.act, residual=residual.double(), **wide)
    plain = inject_ref(x, act=case.act, residual=residual, **given)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    assert error(y, y64) <= bound(case, y64, error(plain, y64), 2)
