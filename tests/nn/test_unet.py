"""The U-Net against itself in other dimensions, weights and layouts; `tests/formats/test_diffusers.py` has a rival."""

import json

import pytest
import torch
from torch import nn

from fastdiff.nn.layers import Attention
from fastdiff.nn.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"channels": 8, "mults": (1, 2), "blocks": 1, "groups": 4, "head_channels": 4}
ADM = {"scale_shift": True, "resample_blocks": True}


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that hide nothing: no zero convolution, no norm that is the identity."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) / fan_in**0.5 + (p.ndim == 1))
    return net


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|"""
    return float((a - b).detach().norm() / b.detach().norm())


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_of_the_papers() -> None:
    with torch.device("meta"):
        ddpm = UNet(channels=128, mults=(1, 2, 2, 2), blocks=2, attention=(2,), dropout=0.1, asymmetric=True)
        lsun = UNet(channels=128, mults=(1, 1, 2, 2, 4, 4), attention=(16,), asymmetric=True)
        adm64 = UNet(
            channels=192,
            mults=(1, 2, 3, 4),
            blocks=3,
            attention=(2, 4, 8),
            head_channels=64,
            classes=1000,
            null_class=False,
            learned_variance=True,
            **ADM,
        )
        adm256 = UNet(
            channels=256,
            mults=(1, 1, 2, 2, 4, 4),
            attention=(8, 16, 32),
            head_channels=64,
            classes=1000,
            null_class=False,
            learned_variance=True,
            **ADM,
        )
    assert count(ddpm) == 35_746_307
    assert round(count(lsun) / 1e6, 1) == 113.7
    assert round(count(adm64) / 1e6, 1) == 295.9
    assert round(count(adm256) / 1e6, 1) == 553.8


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", [{"asymmetric": True}, {"conv_resample": False}, ADM], ids=["ddpm", "pooled", "adm"])
def test_a_constant_axis_changes_nothing(dims: int, kind: dict) -> None:
    """With the kernels of a (dims - 1)-net in its middle slice, a dims-net maps constant volumes as that net does.

    Attention over repeated pixels and statistics over repeated slices are those of one slice, so values agree, and by
    the chain rule gradients: of the middle slices, and of the input summed over the constant axis.
    """
    depth, size = 4, (4, 6)[: dims - 1]
    low = randomise(UNet(dims=dims - 1, in_channels=2, attention=(1, 2), **SMALL, **kind).double())
    high = UNet(dims=dims, in_channels=2, attention=(1, 2), **SMALL, **kind).double()
    with torch.no_grad():
        for thin, thick in zip(low.parameters(), high.parameters(), strict=True):
            if thin.ndim == thick.ndim:
                thick.copy_(thin)
            else:
                thick.zero_()[:, :, thick.shape[2] // 2] = thin
    x = draw(2, 2, *size, dtype=torch.float64).requires_grad_()
    X = x.detach()[:, :, None].repeat_interleave(depth, 2).requires_grad_()
    t, weight = torch.tensor([3, 700]), draw(2, 2, *size, seed=2, dtype=torch.float64)
    y, Y = low(x, t), high(X, t)
    assert far(Y, y[:, :, None].expand_as(Y)) < 1e-12
    (y * weight).sum().backward()
    (Y * weight[:, :, None]).sum().div(depth).backward()
    assert far(X.grad.sum(2), x.grad) < 1e-10
    for thin, thick in zip(low.parameters(), high.parameters(), strict=True):
        grad = thick.grad if thin.ndim == thick.ndim else thick.grad[:, :, thick.shape[2] // 2]
        assert (grad - thin.grad).norm() <= 1e-9 * thin.grad.norm() + 1e-12


def test_pool_and_repeat_are_convolutions_of_known_kernels() -> None:
    plain = randomise(UNet(conv_resample=False, **SMALL))
    conv = UNet(asymmetric=True, **SMALL)
    state = plain.state_dict()
    for name, p in conv.state_dict().items():
        if name not in state:
            state[name] = torch.zeros_like(p)
            for c in range(p.shape[0]) if p.ndim > 1 else ():
                if "resample" in name:
                    state[name][c, c, 1, 1] = 1
                else:
                    state[name][c, c, :2, :2] = 0.25
    conv.load_state_dict(state)
    x, t = draw(2, 3, 6, 10), torch.tensor([0, 999])
    assert far(conv(x, t), plain(x, t)) < 1e-5


def test_attention_is_the_formula() -> None:
    at = randomise(Attention(12, groups=3, heads=3, divisor=2.0)).double()
    x = draw(2, 12, 5, 4, dtype=torch.float64)
    z = nn.functional.group_norm(x, 3, at.norm.weight, at.norm.bias).flatten(2)
    w, b = at.qkv.weight.view(3, 3, 4, 12), at.qkv.bias.view(3, 3, 4)
    q, k, v = (torch.einsum("hdc,ncl->nhdl", w[i], z) + b[i][None, :, :, None] for i in range(3))
    weight = (torch.einsum("nhdl,nhdm->nhlm", q, k) / 4**0.5).softmax(-1)
    h = torch.einsum("nhlm,nhdm->nhdl", weight, v).reshape(2, 12, -1)
    h = torch.einsum("oc,ncl->nol", at.out.weight, h) + at.out.bias[:, None]
    assert far(at(x), (x + h.view_as(x)) / 2) < 1e-13


def test_config_rebuilds_the_net() -> None:
    net = randomise(UNet(classes=5, attention=(1, 2), learned_variance=True, shift=0.5, **SMALL, **ADM))
    twin = UNet(**json.loads(json.dumps(net.config)))
    twin.load_state_dict(net.state_dict())
    x, t, c = draw(2, 3, 4, 4), torch.tensor([5, 9]), torch.tensor([0, 5])
    assert torch.equal(twin(x, t, c), net(x, t, c))
    assert twin.config == net.config


def test_no_class_is_the_last_label() -> None:
    net = randomise(UNet(classes=5, **SMALL))
    x, t, c = draw(3, 3, 4, 4), torch.tensor([5, 9, 700]), torch.tensor([0, 4, 2])
    assert net.null(c).tolist() == [5, 5, 5]
    assert torch.equal(net(x, t), net(x, t, net.null(c)))
    assert far(net(x, t, c), net(x, t)) > 1e-3
    assert torch.equal(net(x, t, torch.tensor(3)), net(x, t, torch.tensor([3, 3, 3])))
    with pytest.raises(ValueError, match="no null class"):
        UNet(classes=5, null_class=False, **SMALL)(x, t)
    with pytest.raises(ValueError, match="without classes"):
        UNet(**SMALL)(x, t, c)
    with pytest.raises(ValueError, match="labels are integers"):
        net(x, t, c.float())


def test_conditions_that_are_numbers_or_vectors() -> None:
    x, t = draw(2, 3, 4, 4), torch.tensor([5, 9])
    net = randomise(UNet(condition="number", **SMALL))
    assert far(net(x, t, torch.tensor([5.0, 9.0])), net(x, t, torch.tensor([5.0, 700.0]))) > 1e-3
    net = randomise(UNet(condition="vector", **SMALL))
    # a vector that undoes the embedding of t leaves a net that does not know t
    undo = -net.time(t)
    assert far(net(x, t, undo), net(x, t + 100, -net.time(t + 100))) < 1e-5
    with pytest.raises(ValueError, match="vector of shape"):
        net(x, t)


def test_times_of_every_form_are_one_time() -> None:
    net = randomise(UNet(**SMALL))
    x = draw(2, 3, 4, 4)
    want = net(x, torch.tensor([250, 250]))
    for t in (250, 250.0, torch.tensor(250), torch.tensor([250.0]), torch.tensor([250, 250], dtype=torch.int32)):
        assert torch.equal(net(x, t), want)
    scaled = UNet(time_scale=1000.0, **SMALL)
    scaled.load_state_dict(net.state_dict())
    assert far(scaled(x, torch.tensor([0.25, 0.25])), want) < 1e-6
    assert far(net(x, 251), want) > 1e-4


def test_new_nets_say_zero_and_learn() -> None:
    net = UNet(**SMALL)
    x, t = draw(2, 3, 4, 4), torch.tensor([5, 9])
    assert torch.equal(net(x, t), torch.zeros_like(x))
    losses = []
    for i in range(40):
        loss = (net(x, t) - x).square().mean()
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                # by the sign of the gradient: torch.optim takes seconds to import
                p.sub_(0.01 * 0.93**i * g.sign())
    assert losses[-1] < 0.3 * losses[0]


def test_learned_variance_is_a_second_half_of_channels() -> None:
    net = randomise(UNet(learned_variance=True, **SMALL))
    mean = UNet(**SMALL)
    mean.load_state_dict({k: v[:3] if k.startswith("out.") else v for k, v in net.state_dict().items()})
    x = draw(2, 3, 4, 4)
    y = net(x, 7)
    assert y.shape == (2, 6, 4, 4)
    assert torch.allclose(y[:, :3], mean(x, 7), atol=1e-6)


def test_layouts_and_dtypes_agree() -> None:
    net = randomise(UNet(attention=(1, 2), classes=3, **SMALL, **ADM)).eval()
    x, t, c = draw(2, 3, 8, 4), torch.tensor([5, 900]), torch.tensor([0, 1])
    with torch.no_grad():
        exact = UNet(**net.config).double()
        exact.load_state_dict(net.state_dict())
        want = exact(x.double(), t, c)
        assert far(net(x, t, c).double(), want) < 1e-5
        last = net.to(memory_format=torch.channels_last)
        assert far(last(x.to(memory_format=torch.channels_last), t, c).double(), want) < 1e-5
        half = net.bfloat16()(x, t, c)
    assert half.dtype == torch.bfloat16
    assert 1e-4 < far(half.double(), want) < 0.05


def test_compiles_into_one_graph() -> None:
    net = randomise(UNet(attention=(1, 2), classes=3, **SMALL))
    x, t, c = draw(2, 3, 4, 4), torch.tensor([5, 900]), torch.tensor([0, 1])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert far(compiled(x, t, c), net(x, t, c)) < 1e-6
        assert far(compiled(x, t), net(x, t)) < 1e-6


def test_groups_adapt_or_refuse() -> None:
    with torch.device("meta"):
        assert UNet(channels=48).norm.num_groups == 16
        assert UNet(channels=64, mults=(1, 1.5)).norm.num_groups == 32
        assert UNet(channels=10, attention=()).norm.num_groups == 2
    with pytest.raises(ValueError, match=r"groups=32 .* \[48, 96\]"):
        UNet(channels=48, mults=(1, 2), groups=32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("channels", 0),
        ("mults", ()),
        ("blocks", 0),
        ("attention", (16,)),
        ("dims", 4),
        ("condition", "text"),
        ("classes", 0),
    ],
)
def test_impossible_keywords_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"UNet: {key}="):
        UNet(**{key: value})


def test_impossible_heads_and_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="heads=3 does not divide 256"):
        UNet(heads=3)
    with pytest.raises(ValueError, match="heads=2 is not possible"):
        UNet(heads=2, head_channels=64)
    net = UNet(**SMALL)
    with pytest.raises(ValueError, match="multiple of 2"):
        net(draw(1, 3, 4, 5), 0)
    with pytest.raises(ValueError, match=r"takes \(N, 3, H, W\)"):
        net(draw(1, 4, 4, 4), 0)
    with pytest.raises(ValueError, match="t has shape"):
        net(draw(3, 3, 4, 4), torch.tensor([1, 2]))
