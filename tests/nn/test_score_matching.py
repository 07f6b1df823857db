"""Sliced score matching through fd.UNet, whose loss has a derivative in it: equal to plain torch's, or refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdiff as fd
from fastdiff.nn import GroupNorm, Sinusoid

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainNorm(nn.Module):
    """fastdiff's GroupNorm in torch's own modules."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps), norm.act
        self.norm.load_state_dict(norm.state_dict())

    def forward(self, x, *, x2=None, add=None, scale=None, shift=None):
        x = x if x2 is None else torch.cat([x, x2], 1)
        x = self.norm(x if add is None else x + add[:, :, None, None])
        x = x if scale is None else x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return functional.silu(x) if self.act else x


class PlainTime(nn.Module):
    """fastdiff's Sinusoid in torch's own modules: flip=True, shift=0."""

    def __init__(self, time):
        super().__init__()
        self.features, self.linear1, self.linear2 = time.features, time.linear1, time.linear2

    def forward(self, t):
        dtype = self.linear1.weight.dtype
        f = 10000 ** (-torch.arange(self.features // 2, dtype=dtype) / (self.features // 2))
        angle = t[:, None].to(dtype) * f
        return self.linear2(functional.silu(self.linear1(torch.cat([angle.cos(), angle.sin()], 1))))


def plain(net):
    """The same network and weights without an op of fastdiff."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GroupNorm):
                setattr(module, name, PlainNorm(child))
            if isinstance(child, Sinusoid):
                setattr(module, name, PlainTime(child))
    return net


def score_matching(net, x, t, v):
    """v^T grad_x(v^T s(x)) + 1/2 (v^T s(x))^2, and its gradient by the parameters (Song 2019)."""
    x = x.clone().requires_grad_()
    projected = (net(x, t) * v).flatten(1).sum(1)
    (gradient,) = torch.autograd.grad(projected.sum(), x, create_graph=True)
    loss = ((gradient * v).flatten(1).sum(1) + projected**2 / 2).mean()
    parameters = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


def small(**given):
    """A network whose every weight does something."""
    torch.manual_seed(0)
    net = fd.UNet(in_channels=2, channels=8, mults=(1, 2), blocks=1, groups=4, **given)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    x, v = torch.randn(2, 2, 2, 4, 4, dtype=torch.float64)
    return net, x, torch.tensor([3.0, 400.0], dtype=torch.float64), v


NONE = {"attention": (), "middle_attention": False}


@pytest.mark.parametrize("given", [NONE, NONE | {"scale_shift": True}, {"attention": (2,)}], ids=str)
def test_a_step_of_sliced_score_matching(given):
    net, x, t, v = small(**given)
    with sdpa_kernel(SDPBackend.MATH):
        exact_loss, exact = score_matching(plain(net).double(), x, t, v)
        loss, gradient = score_matching(copy.deepcopy(net).double(), x, t, v)
        # in fp32, where the kernels run: as near as torch's own modules are
        _, torch32 = score_matching(plain(net), x.float(), t.float(), v.float())
        _, ours32 = score_matching(net, x.float(), t.float(), v.float())
    assert abs(loss - exact_loss) <= 1e-10 * abs(exact_loss)
    assert (gradient - exact).norm() <= 1e-10 * exact.norm()
    assert (ours32 - exact).norm() <= 3 * (torch32 - exact).norm()


def test_torch_refuses_second_derivatives_of_its_fast_attention():
    """With attention in the network the math backend is to be asked for, as above; nothing wrong comes out without."""
    net, x, t, v = small(attention=(2,))
    with pytest.raises(RuntimeError, match=r"derivative for .*attention.* is not implemented"):
        score_matching(net, x.float(), t.float(), v.float())
