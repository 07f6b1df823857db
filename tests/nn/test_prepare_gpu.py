"""The prepared net on a GPU: its numbers, and a captured graph that follows."""

import pytest
import torch

from fastdiff.nn.prepare import Tactics, prepare
from fastdiff.nn.unet import UNet
from tests.nn.prepared import KINDS, TACTICS, inputs, make
from tests.nn.test_unet import draw, far, randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, torch sees none here"),
]


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("tactics", TACTICS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_the_net(kind, tactics):
    net, (x, t, cond) = make(kind), inputs(kind)
    with torch.no_grad():
        want = net.double()(x.double(), t, cond if cond is None or not cond.is_floating_point() else cond.double())
        x, t, cond = x.cuda(), t.cuda(), cond if cond is None else cond.cuda()
        for dtype in (torch.float32, torch.bfloat16):
            half = make(kind).cuda().to(dtype)
            fast = prepare(half, tactics=TACTICS[tactics])
            error = far(half(x.to(dtype), t, cond).cpu().double(), want)
            assert far(fast(x.to(dtype), t, cond).cpu().double(), want) <= 2 * error + 1e-6
            table = fast.time_table(t, cond)
            assert far(fast(x.to(dtype), None, table_row=table).cpu().double(), want) <= 2 * error + 1e-6


def test_a_captured_graph_follows_the_net():
    net, (x, t, _) = make("ddpm").cuda(), inputs("ddpm")
    x, t, fast = x.cuda(), t.cuda(), prepare(net)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                fast(x, t)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fast(x, t)
        for p in net.parameters():
            p.mul_(0.9)
        assert fast.refresh()
        graph.replay()
        assert far(y, net(x, t)) <= 1e-5


def test_float8():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 before compute capability 8.9")
    net = randomise(UNet(channels=16, mults=(1, 2), blocks=1, attention=(2,), head_channels=16)).cuda()
    x = draw(2, 3, 8, 8).cuda()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        fast = prepare(net, dtype=dtype, tactics=Tactics(fp8=True))
        assert fast.fp8_layers
        with torch.no_grad():
            assert 0.01 < far(fast(x, 5).float(), net(x, 5)) < 0.1
