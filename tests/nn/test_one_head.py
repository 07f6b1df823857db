"""Attention of one head with two of its projections folded into the others: its formula, its weights, its errors."""

import copy

import pytest
import torch

from fastdiff.nn.attended import OneHead, folded_bias, folded_weight
from fastdiff.nn.convolved import Convolved
from fastdiff.nn.layers import Attention
from fastdiff.nn.prepare import prepare
from fastdiff.nn.unet import UNet
from fastdiff.ops import dispatch, native
from fastdiff.ops.norm_silu_conv import moments_ref, panels
from tests.nn.test_unet import draw, far, randomise

pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels here")


def one_head(layer: Attention) -> OneHead:
    """What `prepare` makes of the layer, in the layer's dtype."""
    qkv, out = layer.qkv, layer.out
    with torch.no_grad():
        weight = panels(folded_weight(qkv.weight, out.weight)[..., None, None])
        bias = folded_bias(qkv.weight, qkv.bias, out.weight, out.bias)
    weight, bias = (torch.nn.Parameter(v.to(qkv.weight.dtype)) for v in (weight, bias))
    return OneHead(layer, Convolved(weight, bias, 2 * out.out_features, 1, layer.norm, append=True))


@pytest.mark.parametrize("divisor", [1.0, 2**0.5])
@pytest.mark.parametrize(
    ("channels", "groups", "size"), [(8, 2, (3, 5)), (40, 5, (4, 4)), (33, 3, (1, 1)), (3, 1, (9, 1))]
)
def test_it_is_the_formula(channels: int, groups: int, size: tuple[int, int], divisor: float) -> None:
    layer = randomise(Attention(channels, groups=groups, divisor=divisor).double())
    x = draw(2, channels, *size).double().contiguous(memory_format=torch.channels_last)
    y, want = one_head(layer)(x), layer(x)
    assert far(y.x, want) <= 1e-13
    if divisor == 1:
        assert far(y.moments, moments_ref(want)) <= 1e-12
    else:
        assert y.moments is None


def test_scores_of_every_size() -> None:
    """From a mean of all values to a choice of one."""
    layer = randomise(Attention(32, groups=4).double())
    x = draw(2, 32, 6, 6).double().contiguous(memory_format=torch.channels_last)
    for times in (1e-3, 1.0, 30.0):
        with torch.no_grad():
            layer.qkv.weight[:64].mul_(times)
        assert far(one_head(layer)(x).x, layer(x)) <= 1e-11


@needs_kernels
@pytest.mark.parametrize("name", ["qkv.weight", "qkv.bias", "out.weight", "out.bias", "norm.weight", "norm.bias"])
def test_it_follows_each_of_its_parameters(name: str) -> None:
    net = randomise(UNet(channels=16, mults=(1, 2), blocks=1, attention=(2,), groups=4))
    fast, (x, t) = prepare(net), (draw(2, 3, 8, 8), torch.tensor([3, 700]))
    assert sum(isinstance(m, OneHead) for m in fast.modules()) >= 3
    changed = net.middle[0].attention.get_parameter(name)
    with torch.no_grad():
        before = fast(x, t)
        # not by a factor alone: softmax does not see a constant in all scores
        changed.add_(draw(*changed.shape, seed=5))
        wide = copy.deepcopy(net).double()(x.double(), t)
        for _ in range(2):
            assert far(fast(x, t), wide) <= 2e-5
    assert far(before, wide) > 1e-3


@needs_kernels
@pytest.mark.parametrize("times", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_the_kernels_err_as_pytorch_does(mean: float, times: float) -> None:
    """times: of queries and keys, up to scores that choose one value."""
    layer = randomise(Attention(64, groups=8))
    with torch.no_grad():
        layer.qkv.weight[:128].mul_(times)
    wide = copy.deepcopy(layer).double()
    x = (draw(2, 64, 12, 12) + mean).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        want, theirs = wide(x.double()), layer(x)
        with dispatch.backend("cpp"):
            ours = one_head(layer)(x).x
    # without the residual, which would hide it
    errors = [far(y.double() - x.double(), want - x.double()) for y in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] + 2**-22
