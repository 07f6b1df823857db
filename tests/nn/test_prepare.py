"""`prepare`: the numbers of the net it was made from, whatever the tactics."""

import copy
import pickle

import pytest
import torch

from fastdiff.nn.prepare import PreparedUNet, Tactics, prepare
from fastdiff.nn.unet import UNet
from tests.nn.prepared import GRID, TACTICS, inputs, make
from tests.nn.test_unet import draw, far, randomise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("kind", "tactics"), GRID)
def test_the_numbers_of_the_net(kind: str, tactics: str) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        net, (x, t, cond) = make(kind, dtype), inputs(kind, dtype)
        fast = prepare(net, tactics=TACTICS[tactics])
        with torch.no_grad():
            want = net(x, t, cond)
            assert far(fast(x, t, cond), want) <= bound
            assert far(fast(x, None, table_row=fast.time_table(t, cond)), want) <= bound
            line = fast.time_table(t[:1], None if cond is None else cond[:1])
            assert far(fast(x[:1], None, table_row=line), want[:1]) <= bound


# torch's mean of volumes knows no bfloat16 on CPUs
@pytest.mark.parametrize(("kind", "tactics"), [p for p in GRID if p.values[0] != "adm volume"])
def test_rounding_is_no_worse_in_bfloat16(kind: str, tactics: str) -> None:
    net, (x, t, cond) = make(kind), inputs(kind)
    if cond is not None and cond.is_floating_point():
        cond = cond.bfloat16()
    x, half = x.bfloat16(), copy.deepcopy(net).bfloat16()
    fast, exact = prepare(net, dtype=torch.bfloat16, tactics=TACTICS[tactics]), net.double()
    with torch.no_grad():
        want = exact(x.double(), t, cond)
        error = far(half(x, t, cond).double(), want)
        assert far(fast(x, t, cond).double(), want) <= 2 * error
        assert far(fast(x, None, table_row=fast.time_table(t, cond)).double(), want) <= 2 * error


@pytest.mark.parametrize("kind", ["ddpm", "adm", "line", "volume"])
def test_gradients_of_the_image(kind: str) -> None:
    net, (x, t, cond) = make(kind, torch.float64), inputs(kind, torch.float64)
    weight = draw(*net(x, t, cond).shape, seed=2, dtype=torch.float64)
    for tactics in TACTICS.values():
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        (net(a, t, cond) * weight).sum().backward()
        (prepare(net, tactics=tactics)(b, t, cond) * weight).sum().backward()
        assert far(b.grad, a.grad) <= 1e-12


@pytest.mark.parametrize(("kind", "backend"), [("ddpm", "eager"), ("adm", "aot_eager")])
def test_compiles_into_one_graph(kind: str, backend: str) -> None:
    net, (x, t, cond) = make(kind), inputs(kind)
    fast = prepare(net)
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert far(compiled(x, t, cond), net(x, t, cond)) <= 1e-5
        net.out.bias.add_(1)
        # the packed tensors are the graph's inputs
        assert fast.refresh()
        assert far(compiled(x, t, cond), net(x, t, cond)) <= 1e-5


def test_autocast_keeps_working() -> None:
    net, (x, t, cond) = make("adm"), inputs("adm")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert far(prepare(net)(x, t, cond).float(), net(x, t, cond).float()) < 0.05


def test_layouts_of_the_image_are_one() -> None:
    net, (x, t, cond) = make("adm", torch.float64), inputs("adm", torch.float64)
    want = net(x, t, cond)
    for tactics in TACTICS.values():
        fast = prepare(net, tactics=tactics)
        last = x.to(memory_format=torch.channels_last)
        assert far(fast(last, t, cond), want) <= 1e-12
        assert far(fast(x.mT.contiguous().mT, t, cond), want) <= 1e-12


def test_what_it_says_of_itself() -> None:
    net, (x, t, cond) = make("adm"), inputs("adm")
    fast = prepare(net, dtype=torch.float64)
    for name in ("config", "classes", "in_channels", "out_channels", "factor", "columns", "dims"):
        assert getattr(fast, name) == getattr(net, name)
    assert torch.equal(fast.null(cond), net.null(cond))
    assert far(fast.embed(t, cond, x), net.embed(t, cond, x).double()) <= 1e-5
    assert {p.dtype for p in fast.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in fast.parameters())
    assert fast.tactics == Tactics()


def test_the_net_stays_as_it_is() -> None:
    net = randomise(UNet(dropout=0.5, channels=8, mults=(1, 2), blocks=1, groups=4))
    before, modules = copy.deepcopy(net.state_dict()), list(net.modules())
    x = draw(2, 3, 4, 4)
    want = net.eval()(x, 5)
    fast = prepare(net.train())
    for mode in (True, False):
        assert far(fast.train(mode)(x, 5), want) <= 1e-5
    assert net.training
    assert list(net.modules()) == modules
    assert all(p.requires_grad for p in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    net(x, 5).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_copies_are_prepared_from_copies() -> None:
    net, (x, t, cond) = make("ddpm"), inputs("ddpm")
    fast = prepare(net, tactics=TACTICS["fold_upsample"])
    want = fast(x, t, cond)
    twins = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    with torch.no_grad():
        net.out.weight.zero_()
    for twin in twins:
        assert isinstance(twin, PreparedUNet)
        assert twin.tactics == fast.tactics
        assert torch.equal(twin(x, t, cond), want)
    assert not torch.equal(fast(x, t, cond), want)


def test_what_cannot_be_prepared_is_named() -> None:
    net = make("ddpm")
    with pytest.raises(TypeError, match=r"net is a Linear.*fd\.patch"):
        prepare(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="net is a PreparedUNet"):
        prepare(prepare(net))
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        prepare(net, dtype=torch.int8)
    with pytest.raises(TypeError, match="stay where they are"):
        prepare(net).half()
    handle = net.stem.register_forward_hook(lambda m, args, y: 2 * y)
    with pytest.raises(TypeError, match=r"net\.stem has a hook"):
        prepare(net)
    handle.remove()
    with torch.inference_mode():
        born = UNet(channels=8, mults=(1, 2), groups=4)
    with pytest.raises(ValueError, match=r"'time\.linear1\.weight' was made under torch\.inference_mode"):
        prepare(born)
    net.norm = torch.nn.GroupNorm(4, 8)
    with pytest.raises(TypeError, match=r"net\.norm is a GroupNorm, where a UNet of its config has a GroupNorm"):
        prepare(net)
    net = make("ddpm")
    net.out = torch.nn.Conv2d(8, 4, 3, padding=1)
    with pytest.raises(TypeError, match="other parameters"):
        prepare(net)
    with pytest.raises(ValueError, match="multiple of 2"):
        prepare(make("ddpm"))(draw(1, 3, 4, 5), 0)
    with pytest.raises(ValueError, match=r"takes \(N, 3, H, W\)"):
        prepare(make("ddpm"))(draw(1, 3, 4), 0)
    with pytest.raises(ValueError, match="t is None"):
        prepare(make("ddpm"))(draw(1, 3, 4, 4), None)
