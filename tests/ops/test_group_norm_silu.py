"""group_norm_silu: the reference against the formula written out in float64."""

import pytest
import torch

from fastdiff.ops import group_norm_silu

SHAPES = [(2, 12, 5, 7), (3, 8, 11), (2, 6, 3, 4, 2), (1, 4, 1, 1)]


def written_out(x, groups, weight, bias, eps, add, scale, shift, act):
    """One group of one image at a time, in float64."""
    n, channels = x.shape[:2]
    wide = channels // groups

    def numbers(v, i, default):
        return (
            torch.full((channels,), default, dtype=torch.float64)
            if v is None
            else (v if v.ndim == 1 else v[i]).double()
        )

    y = torch.empty(x.shape, dtype=torch.float64)
    for i in range(n):
        z = x[i].double().reshape(channels, -1) + numbers(add, i, 0.0)[:, None]
        for g in range(groups):
            block = slice(g * wide, (g + 1) * wide)
            part = z[block]
            z[block] = (part - part.mean()) / (part.var(unbiased=False) + eps).sqrt()
        out = z * numbers(weight, i, 1.0)[:, None] + numbers(bias, i, 0.0)[:, None]
        out = out * (1 + numbers(scale, i, 0.0)[:, None]) + numbers(shift, i, 0.0)[:, None]
        y[i] = (out * torch.sigmoid(out) if act else out).reshape(x.shape[1:])
    return y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("injected", [(), ("add",), ("scale", "shift"), ("add", "scale", "shift")])
@pytest.mark.parametrize("act", [False, True])
def test_against_float64(shape, injected, act):
    g = torch.Generator().manual_seed(0)
    n, channels = shape[:2]
    x = 3 * torch.randn(shape, generator=g) + 1
    weight, bias = torch.randn(2, channels, generator=g)
    for per_image in (False, True):
        size = (n, channels) if per_image else (channels,)
        extra = {name: torch.randn(size, generator=g) for name in injected}
        full = {"add": None, "scale": None, "shift": None} | extra
        for groups in (1, 2, channels):
            if channels == groups and x[0, 0].numel() == 1:
                continue
            wanted = written_out(x, groups, weight, bias, 1e-5, **full, act=act)
            got = group_norm_silu(x, groups, weight, bias, act=act, **extra)
            assert (got - wanted).abs().max() <= 2e-5
            wide = {k: v.double() for k, v in extra.items()}
            got = group_norm_silu(x.double(), groups, weight.double(), bias.double(), act=act, **wide)
            assert (got - wanted).abs().max() <= 1e-12


def test_two_tensors_are_normalised_as_one():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 4, 4, generator=g), 2 + torch.randn(2, 7, 4, 4, generator=g)
    weight, bias = torch.randn(2, 12, generator=g)
    wanted = written_out(torch.cat([a, b], 1), 3, weight, bias, 1e-6, None, None, None, True)
    assert (group_norm_silu(a, 3, weight, bias, eps=1e-6, x2=b) - wanted).abs().max() <= 2e-5


def test_bf16_keeps_fp32_statistics():
    x = (100 + torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    wanted = written_out(x, 2, None, None, 1e-5, None, None, None, False)
    got = group_norm_silu(x, 2, None, None, act=False)
    assert got.dtype == torch.bfloat16
    assert (got.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_gradients():
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3), (4,), (4,), (2, 4), (2, 4), (2, 4)]
    x, weight, bias, add, scale, shift = (
        torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes
    )

    def f(x, weight, bias, add, scale, shift):
        return group_norm_silu(x, 2, weight, bias, add=add, scale=scale, shift=shift)

    assert torch.autograd.gradcheck(f, (x, weight, bias, add, scale, shift))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias, add, scale, shift))


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups=5 does not divide the 12 channels"):
        group_norm_silu(torch.zeros(1, 12, 2, 2), 5, None, None)
