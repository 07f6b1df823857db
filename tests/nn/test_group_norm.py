"""`fd.nn.GroupNorm` against `torch.nn.GroupNorm` and `SiLU` in float64."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff.nn import GroupNorm

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(groups: int, channels: int, **given: object) -> tuple[GroupNorm, nn.Module]:
    """Ours with a SiLU, and torch's in float64, with the same weights."""
    g = torch.Generator().manual_seed(0)
    ours = GroupNorm(groups, channels, act="silu", **given)
    for p in ours.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) + 1)
    theirs = nn.GroupNorm(groups, channels, ours.eps, ours.affine).double()
    theirs.load_state_dict(ours.state_dict(), strict=ours.bias is not None or not ours.affine)
    return ours, nn.Sequential(theirs, nn.SiLU())


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("size", [(), (5,), (3, 4), (2, 3, 4)], ids=len)
@pytest.mark.parametrize(("groups", "channels"), [(1, 7), (7, 7), (4, 20), (32, 320)])
def test_any_channels_any_axes(groups: int, channels: int, size: tuple[int, ...]) -> None:
    if channels // groups == 1 and not size:
        pytest.skip("torch refuses one value a group")
    ours, theirs = pair(groups, channels, eps=1e-3)
    x, dy = draw(2, channels, *size), draw(2, channels, *size, seed=2)
    x, x64 = x.requires_grad_(), x.detach().double().requires_grad_()
    y, y64 = ours(x), theirs(x64)
    assert far(y, y64) < 1e-6
    y.backward(dy)
    y64.backward(dy.double())
    assert far(x.grad, x64.grad) < 1e-5
    assert far(ours.weight.grad, theirs[0].weight.grad) < 1e-5
    assert far(ours.bias.grad, theirs[0].bias.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_stays(dtype: torch.dtype) -> None:
    ours, theirs = pair(4, 12)
    x = draw(2, 12, 5, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    y = ours(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert far(y, theirs(x.double())) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_constructor_is_torchs_and_apexs() -> None:
    names = list(inspect.signature(nn.GroupNorm).parameters)
    assert [n for n in inspect.signature(GroupNorm).parameters if n in names] == names
    apex = ["num_groups", "num_channels", "eps", "affine", "device", "dtype", "act"]
    assert list(inspect.signature(GroupNorm).parameters)[: len(apex)] == apex
    norm = GroupNorm(2, 4, 1e-3, True, "meta", torch.bfloat16, "SiLU")
    assert (norm.weight.device.type, norm.weight.dtype, norm.act) == ("meta", torch.bfloat16, "silu")
    plain = GroupNorm(2, 4, affine=False, act=None)
    assert list(plain.state_dict()) == []
    x = draw(1, 4, 3, 3)
    assert far(plain(x), nn.functional.group_norm(x.double(), 2)) < 1e-6
    swish, theirs = pair(2, 4)
    swish.act = "swish"
    assert far(swish(x), theirs(x.double())) < 1e-6
    no_bias = GroupNorm(2, 4, bias=False)
    assert list(no_bias.state_dict()) == ["weight"]
    assert far(no_bias(x), nn.functional.group_norm(x.double(), 2)) < 1e-6


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_groups=5 does not divide num_channels=12"):
        GroupNorm(5, 12)
    with pytest.raises(ValueError, match="num_groups=0"):
        GroupNorm(0, 12)
    with pytest.raises(ValueError, match="act='relu' is unknown"):
        GroupNorm(2, 4, act="relu")
    with pytest.raises(ValueError, match="act=True is unknown"):
        GroupNorm(2, 4, act=True)


def test_it_is_torchs_and_changes_places_with_it() -> None:
    ours, theirs = pair(2, 4)
    assert isinstance(ours, nn.GroupNorm)
    theirs[0].float().load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs[0].state_dict())
    x = draw(1, 4, 3, 3)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is GroupNorm
        assert torch.equal(twin(x), ours(x))
    assert fd.nn.GroupNorm is GroupNorm


@pytest.mark.parametrize("form", ["add", "scale_shift", "x2"])
def test_the_embedding_and_the_skip(form: str) -> None:
    ours, theirs = pair(3, 12)
    x, e = draw(2, 12, 4, 4), draw(2, 12, seed=3)
    z, wide = x.double(), e.double()[:, :, None, None]
    if form == "add":
        y, want = ours(x, add=e), theirs(z + wide)
    elif form == "x2":
        y, want = ours(x[:, :5], x2=x[:, 5:]), theirs(z)
    else:
        y, want = ours(x, scale=e, shift=2 * e), theirs[1](theirs[0](z) * (1 + wide) + 2 * wide)
    assert far(y, want) < 1e-6


@pytest.mark.parametrize("act", ["", "silu"])
def test_traces_as_torchs_functions(act: str) -> None:
    norm, x = nn.Sequential(GroupNorm(2, 4, act=act)), draw(2, 4, 3, 3)
    graph = torch.fx.symbolic_trace(norm)
    assert any(n.target is nn.functional.group_norm for n in graph.graph.nodes)
    assert far(graph(x), norm(x).double()) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit being deprecated, and of torch's own check of sizes
        traced = torch.jit.trace(norm, x)
    other = draw(2, 4, 3, 3, seed=5)
    assert far(traced(other), norm(other).double()) < 1e-6


def test_compiles_without_a_break() -> None:
    norm, x = pair(2, 4)[0], draw(2, 4, 3, 3)
    assert far(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x).double()) < 1e-6
