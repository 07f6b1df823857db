"""Products in float8: within their bound, where they fit, and nowhere unasked."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastdiff.nn.follow import Packer
from fastdiff.nn.fp8 import LEAST, Fp8Linear, fits, input_scale
from fastdiff.nn.prepare import Tactics, prepare
from fastdiff.nn.unet import UNet
from tests.nn.prepared import TACTICS
from tests.nn.test_prepare_calls import Calls
from tests.nn.test_unet import draw, far, randomise

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"channels": 16, "mults": (1, 2), "blocks": 1, "attention": (2,), "head_channels": 16}
LOSSY = Tactics(fp8=True)


def rounding(v: Tensor, s: float) -> Tensor:
    """How far e4m3(v / s) s may lie from v."""
    return torch.maximum(v.abs() / 16, torch.tensor(2.0**-10 * s, dtype=v.dtype))


def linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Fp8Linear:
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    net.weight.data = weight
    if bias is not None:
        net.bias.data = bias
    packer = Packer(net, dtype, False)
    twin = packer.twin()
    made = Fp8Linear(packer, twin.weight, twin.bias)
    packer.fill(made)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-3, 100.0])
def test_a_product_is_within_its_bound(dtype: torch.dtype, size: float) -> None:
    x = (size * draw(3, 7, 48) * draw(1, 1, 48, seed=4).exp()).to(dtype)
    w, bias = draw(32, 48, seed=2) * draw(32, 1, seed=5).exp(), size * draw(32, seed=3)
    y = linear(w, bias, dtype)(x[..., :16], x[..., 16:]).double()
    s, x, w = float(input_scale(x)), x.double(), w.double()
    want = x @ w.T + bias
    dx, dw = rounding(x, s), rounding(w, float(w.abs().max() / 448))
    bound = dx @ w.T.abs() + x.abs() @ dw.T + dx @ dw.T
    assert ((y - want).abs() <= bound + torch.finfo(dtype).eps * (x.abs() @ w.T.abs() + bias.abs())).all()
    # the errors of a sum are not all on one side
    assert 0.01 < far(y, want) < 0.06


def test_scales_are_powers_of_two() -> None:
    for largest in (0.02, 1.0, 1.999, 2.0, 3e4):
        s = input_scale(torch.tensor([[0.01, -largest]]), torch.tensor([[0.0]]))
        assert 128 <= largest / float(s) < 256
        assert float(s.frexp().mantissa) == 0.5
    assert float(input_scale(torch.zeros(2, 2))) == LEAST
    for bad in (float("nan"), float("inf")):
        assert linear(torch.eye(16), None, torch.float32)(torch.full((2, 16), bad)).isnan().all()
    assert torch.equal(linear(torch.zeros(16, 16), torch.ones(16), torch.float32)(draw(2, 16)), torch.ones(2, 16))


def test_gradients_are_those_of_the_packed_weight() -> None:
    w, x = draw(32, 48, seed=2), draw(5, 48).requires_grad_()
    made = linear(w, None, torch.float32)
    a, b = x[:, :32], x[:, 32:]
    y = made(a, b)
    with torch.no_grad():
        assert torch.equal(y, made(a, b))
    dy = draw(5, 32, seed=3)
    packed = made.weight.float() * made.scale
    assert far(torch.autograd.grad(y, x, dy)[0], dy @ packed) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_in_float8(dtype: torch.dtype) -> None:
    net, x = randomise(UNet(**WIDE)), draw(2, 3, 4, 6)
    fast = prepare(net, dtype=dtype, tactics=LOSSY)
    with torch.no_grad(), Calls() as seen:
        y = fast(x, 5)
    assert y.dtype == dtype
    assert 0.01 < far(y.float(), net(x, 5)) < 0.1
    layers = dict(net.named_modules())
    attended = [n for n in layers if n.endswith((".qkv", ".attention.out"))]
    assert set(fast.fp8_layers) == {*attended, *(n for n in layers if n.endswith("shortcut"))}
    assert seen.names["_scaled_mm"] == len(fast.fp8_layers)
    # of the two halves, only their float8 copies lie side by side
    assert seen.names["cat"] == 0
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(a, 5).float().sum().backward()
    net(b, 5).sum().backward()
    assert far(a.grad, b.grad) < 0.3


def test_where_it_does_not_fit() -> None:
    net, x = randomise(UNet(**WIDE | {"channels": 24})), draw(2, 3, 4, 4)
    fast = prepare(net, tactics=LOSSY)
    shortcuts = {name: m.in_channels for name, m in net.named_modules() if name.endswith("shortcut")}
    assert {24, 48 + 24, 48 + 48} <= set(shortcuts.values())
    assert [shortcuts[n] for n in fast.fp8_layers if n in shortcuts] == [48 + 48]
    odd = prepare(randomise(UNet(**WIDE | {"channels": 12, "head_channels": 4})), tactics=LOSSY)
    assert odd.fp8_layers == ()
    assert prepare(net, dtype=torch.float64, tactics=LOSSY).fp8_layers == ()
    assert prepare(net).fp8_layers == ()
    assert not Tactics().fp8
    with torch.no_grad():
        exact = prepare(net.double(), tactics=LOSSY)
        assert far(exact(x.double(), 5), net(x.double(), 5)) <= 1e-12


@pytest.mark.parametrize(("capability", "good"), [((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_hardware_without_it(capability: tuple[int, int], good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    packer = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda:0"))
    assert fits(64, 32, packer) == good
    assert not fits(64, 40, packer)
    assert not fits(40, 64, packer)


# of dynamo's own making
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_follows_the_net_and_compiles() -> None:
    # one level: compilers take their time
    net, x = randomise(UNet(**WIDE | {"mults": (1,), "attention": (1,)})), draw(2, 3, 4, 4)
    fast = prepare(net, tactics=TACTICS["none"]._replace(fp8=True))
    assert fast.fp8_layers
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)
        y = fast(x, 5)
        assert torch.equal(y, prepare(net, tactics=fast.tactics)(x, 5))
        assert far(compiled(x, 5), y) <= 1e-5
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a, 5).sum().backward()
    fast(b, 5).sum().backward()
    assert far(a.grad, b.grad) <= 1e-5
