"""`fd.patch` under torch.compile, tracing, autocast and other layouts, and on diffusers' networks."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastdiff as fd
from tests.nn import other_nets as other
from tests.nn.other_nets import MODELS, draw, far, randomise

pytestmark = pytest.mark.usefixtures("one_thread")


# a graph break at the reentrant checkpoint makes torch look at .grad of an inner tensor
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("none", "adm")])
def test_compiles_as_in_eager(name: str, calls: list[bool]) -> None:
    make, ops, fused = MODELS[name]
    net = randomise(make())
    twin, x = copy.deepcopy(net), draw(2, 8, 6, 5).requires_grad_()
    fd.patch(net)
    compiled = torch.compile(net, fullgraph="adm" not in name, backend="aot_eager")
    assert far(compiled(x), twin(x)) < 1e-6
    assert (len(calls), sum(calls)) == ((4, 2) if name == "decorated" else (ops, fused))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_layout_stay(dtype: torch.dtype) -> None:
    net = randomise(other.Pair()).to(dtype).to(memory_format=torch.channels_last)
    twin, x = copy.deepcopy(net), draw(2, 8, 6, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    fd.patch(net)
    y, wanted = net(x), twin(x)
    assert (y.dtype, y.stride()) == (wanted.dtype, wanted.stride())
    exact = copy.deepcopy(twin).double()(x.double())
    assert far(y, exact) <= 2 * far(wanted, exact) + 1e-7


def test_frozen_parameters_and_autocast() -> None:
    net = randomise(other.Pair())
    net.norm.requires_grad_(False)
    twin, x = copy.deepcopy(net), draw(2, 8, 4, 4)
    fd.patch(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, want = net(x), twin(x)
    assert y.dtype == want.dtype
    assert far(y, want) < 1e-2
    y.sum().backward()
    want.sum().backward()
    assert net.norm.weight.grad is None
    assert far(net.conv.weight.grad, twin.conv.weight.grad) < 1e-2


def test_traces_and_scripts_as_before() -> None:
    net = randomise(nn.Sequential(other.Pair(), nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())))
    x, other_x = draw(1, 8, 4, 4), draw(1, 8, 4, 4, seed=3)
    want = net(other_x)
    fd.patch(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forms = [torch.fx.symbolic_trace(net), torch.jit.trace(net, x), torch.jit.script(net)]
    forms.append(torch.export.export(net, (x,)).module())
    for form in forms:
        assert far(form(other_x), want) < 1e-6


TRANSFORMS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "vmap": lambda net, x: torch.func.vmap(net)(x[None])[0],
    "grad": lambda net, x: torch.func.grad(lambda x: net(x).square().sum())(x),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (x + 1,))[1],
    "functional_call": lambda net, x: torch.func.functional_call(net, {n: 2 * p for n, p in net.named_parameters()}, x),
    "twice": lambda net, x: torch.func.grad(lambda x: torch.func.grad(lambda y: net(y).sum())(x).square().sum())(x),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own use of it
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    net = randomise(other.Pair())
    twin, x = copy.deepcopy(net), draw(2, 8, 4, 4)
    fd.patch(net)
    assert far(TRANSFORMS[name](net, x), TRANSFORMS[name](twin, x)) < 1e-5


TINY: dict[str, Any] = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
UNCONDITIONAL = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
CONDITIONAL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}


# with scale-shift the second norm of each of the 8 resnets has its SiLU behind scale and shift
@pytest.mark.parametrize(
    ("kind", "config", "fused"),
    [
        ("UNet2DModel", UNCONDITIONAL, 17),
        ("UNet2DModel", {**UNCONDITIONAL, "resnet_time_scale_shift": "scale_shift"}, 9),
        ("UNet2DConditionModel", CONDITIONAL, 17),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_diffusers(kind: str, config: dict[str, Any], fused: int, last: bool, calls: list[bool]) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = getattr(diffusers, kind)(**TINY, **config)
    net = net.to(memory_format=torch.channels_last) if last else net
    x = draw(2, net.config.in_channels, 8, 8).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    args = (x, 3) if kind == "UNet2DModel" else (x, 3, draw(2, 5, 16))
    twin = copy.deepcopy(net)
    patched = fd.patch(net)
    y, want = net(*args).sample, twin(*args).sample
    norms = sum(isinstance(m, nn.GroupNorm) for m in twin.modules())
    assert len(patched.norms) == norms == len(calls)
    # diffusers' resnets have branches where scale and shift stand between
    assert sum(n.fused == "SiLU in ResnetBlock2D.forward" for n in patched.norms) == 8
    assert sum(n.fused == "SiLU in ResnetBlock2D.forward, in some branches" for n in patched.norms) == 8
    assert sum(calls) == fused
    assert far(y, want) < 1e-5
    assert y.stride() == want.stride()
    y.square().mean().backward()
    want.square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert far(p.grad, q.grad) < 1e-4 or q.grad.norm() < 1e-7
    assert net.config == twin.config
    assert type(net).__name__ == kind
    patched.undo()
    assert torch.equal(net(*args).sample, want)


def test_diffusers_compiled_into_one_graph(calls: list[bool]) -> None:
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(**TINY, **UNCONDITIONAL)
    x = draw(2, 3, 8, 8)
    with torch.no_grad():
        want = net(x, 3).sample
        fd.patch(net)
        graphs: list[torch.fx.GraphModule] = []

        def look(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        assert far(torch.compile(net, fullgraph=True, backend=look)(x, 3).sample, want) < 1e-5
    assert len(graphs) == 1
    assert (len(calls), sum(calls)) == (21, 17)
    torch._dynamo.reset()
