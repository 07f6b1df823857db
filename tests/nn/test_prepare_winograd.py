"""`prepare` on convolutions of our own: the net's numbers within 2e-5, on every way through a call."""

import copy
import threading

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.nn.layers import Deep
from fastdiff.nn.prepare import Tactics, prepare
from fastdiff.nn.unet import UNet
from fastdiff.ops import dispatch
from tests.nn.test_prepare_calls import Calls
from tests.nn.test_unet import draw, far, randomise

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(dispatch.reason("norm_silu_conv", "cpp") is not None, reason="no compiled kernels here"),
]

BOUND = 2e-5
SMALL = {"channels": 16, "mults": (1, 2), "blocks": 1, "attention": (2,), "groups": 4}
ADM = {"scale_shift": True, "resample_blocks": True, "head_channels": 8}
# config, spatial size
NETS = {
    "ddpm": ({"asymmetric": True, "mults": (1, 2, 2), "blocks": 2}, (16, 16)),
    "symmetric": ({}, (10, 6)),
    "adm": (ADM | {"classes": 3, "learned_variance": True}, (12, 20)),
    "heads": ({"attention": (1, 2), "head_channels": 4, "scale_shift": True}, (8, 8)),
    "pooled": ({"conv_resample": False, "middle_divisor": 2**0.5, "classes": 4, "null_class": False}, (6, 10)),
    "centered": ({"center_input": True, "in_channels": 1, "out_channels": 2}, (14, 14)),
    "24 and 40": ({"channels": 24, "mults": (1, 5 / 3), "groups": 8, "asymmetric": True}, (28, 28)),
    "odd": ({"channels": 9, "mults": (1, 5 / 3, 3), "groups": 3, "in_channels": 1, "out_channels": 5}, (4, 12)),
    "narrowing": ({"mults": (2, 1), "groups": 8, "scale_shift": True, "condition": "vector"}, (6, 6)),
    "no middle": ({"mults": (1,), "blocks": 2, "attention": (), "middle": False}, (9, 7)),
    "wide": ({"channels": 160, "mults": (1, 1), "groups": 32, "attention": ()}, (4, 68)),
}


def make(kind: str) -> UNet:
    return randomise(UNet(**SMALL | NETS[kind][0]))


def inputs(kind: str, images: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    config, size = SMALL | NETS[kind][0], NETS[kind][1]
    g = torch.Generator().manual_seed(seed)
    cond = torch.randint(0, 3, (images,), generator=g) if "classes" in config else None
    if config.get("condition") == "vector":
        cond = draw(images, 4 * config["channels"], seed=seed)
    t = torch.randint(0, 1000, (images,), generator=g)
    return draw(images, config.get("in_channels", 3), *size, seed=seed), t, cond


def exact(net: UNet, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
    """In float64."""
    with torch.no_grad():
        wide = cond.double() if cond is not None and cond.is_floating_point() else cond
        return copy.deepcopy(net).double().eval()(x.double(), t, wide)


@pytest.mark.parametrize("kind", NETS)
def test_the_numbers_of_the_net(kind: str) -> None:
    """The first call with a shape, the ones behind it, with a table, beside gradients, and other shapes between."""
    net = make(kind)
    fast = prepare(net)
    with torch.no_grad():
        for seed, images in enumerate((2, 2, 1, 2, 3, 1)):
            x, t, cond = inputs(kind, images, seed)
            want = exact(net, x, t, cond)
            assert far(fast(x, t, cond), want) <= BOUND
            assert far(fast(x.to(memory_format=torch.channels_last), t, cond), want) <= BOUND
            table = fast.time_table(t, cond)
            assert far(fast(x, None, table_row=table), want) <= BOUND
            assert far(fast(x[:1], None, table_row=table[:1]), want[:1]) <= BOUND
        x, t, cond = inputs(kind, 4)
        line = fast.time_table(t[:1], None if cond is None else cond[:1])
        one = None if cond is None else cond[:1].expand(4, *cond.shape[1:])
        assert far(fast(x, None, table_row=line), exact(net, x, t[:1].expand(4), one)) <= BOUND


@pytest.mark.parametrize("kind", NETS)
def test_exact_rounds_as_the_net_does(kind: str) -> None:
    net, (x, t, cond) = make(kind), inputs(kind)
    fast, want = prepare(net, exact=True), exact(net, x, t, cond)
    assert not fast.tactics.winograd
    with torch.no_grad():
        for _ in range(2):
            assert far(fast(x, t, cond), want) <= 2 * far(net(x, t, cond), want) + 2**-23


@pytest.mark.parametrize("kind", NETS)
def test_every_convolution_is_ours(kind: str) -> None:
    """None of torch's is left, and exact=True has no other than torch's."""
    net, (x, t, cond) = make(kind), inputs(kind)
    for given, ours in (({}, True), ({"exact": True}, False), ({"tactics": Tactics(winograd=False)}, False)):
        # gradients, for what a tape plays no mode sees
        with Calls() as seen:
            prepare(net, **given)(x.requires_grad_(), t, cond)
        assert (seen.names["convolution"] == 0) is ours
        assert (seen.names["norm_silu_conv_cpp"] > 0) is ours


@pytest.mark.parametrize("kind", ["ddpm", "adm", "pooled", "odd"])
def test_it_follows_the_net_whatever_was_called_before(kind: str) -> None:
    net, (x, t, cond) = make(kind), inputs(kind)
    fast, other = prepare(net), randomise(UNet(**net.config), 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

    def step() -> None:
        net(x, t, cond).square().mean().backward()
        optimizer.step()

    def unseen() -> None:
        net.up[0].res.conv1.weight.data.mul_(2)
        assert fast.refresh(every=True)

    before = exact(net, x, t, cond)
    for change in (step, lambda: net.load_state_dict(other.state_dict()), unseen):
        with torch.no_grad():
            fast(x, t, cond)
            fast(x, t, cond)
        change()
        want = exact(net, x, t, cond)
        assert far(before, want) > 1e-3
        with torch.no_grad():
            for _ in range(2):
                assert far(fast(x, t, cond), want) <= BOUND
        before = want


def test_results_stay_what_they_were() -> None:
    net = make("ddpm")
    fast = prepare(net)
    (x, t, _), (z, s, _) = inputs("ddpm"), inputs("ddpm", seed=2)
    with torch.no_grad():
        first = [fast(x, t) for _ in range(3)]
        kept = [y.clone() for y in first]
        fast(z, s)
        first[1].add_(1)
        assert torch.equal(fast(x, t), kept[0])
    assert torch.equal(first[0], kept[0])
    assert torch.equal(first[2], kept[2])
    with torch.inference_mode():
        assert torch.equal(fast(x, t), kept[0])
    with torch.no_grad():
        assert torch.equal(fast(x, t), kept[0])


@pytest.mark.parametrize("kind", ["ddpm", "adm", "24 and 40"])
def test_the_same_bits_on_any_threads_and_alone(kind: str) -> None:
    fast, (x, t, cond) = prepare(make(kind)), inputs(kind, 3)
    with torch.no_grad():
        table = fast.time_table(t, cond)
        want = fast(x, None, table_row=table)
        alone = fast(x[1:2], None, table_row=table[1:2])
        assert far(alone, want[1:2].double()) <= 1e-6
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(2):
                assert torch.equal(fast(x, None, table_row=table), want)
    torch.set_num_threads(1)


def test_several_threads_call_at_once() -> None:
    net = make("ddpm")
    fast = prepare(net)
    given = [inputs("ddpm", 1 + i % 2, i) for i in range(4)]
    wanted = [exact(net, *v) for v in given]
    wrong: list[float] = []

    def call(i: int) -> None:
        for _ in range(10):
            with torch.no_grad():
                error = far(fast(*given[i]), wanted[i])
            if not error <= BOUND:
                wrong.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["ddpm", "adm", "pooled", "24 and 40"])
def test_gradients_of_the_image(kind: str) -> None:
    net, (x, t, cond) = make(kind), inputs(kind)
    fast = prepare(net)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    y = fast(a, t, cond)
    weight = draw(*y.shape, seed=2)
    (grad,) = torch.autograd.grad((y * weight).sum(), a)
    (want,) = torch.autograd.grad((copy.deepcopy(net).double()(b, t, cond) * weight).sum(), b)
    assert far(grad, want) <= 5e-5


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_deep_part_is_kept_and_used_again(stages: int) -> None:
    net = make("ddpm")
    fast, (x, t, _) = prepare(net), inputs("ddpm")
    wide = copy.deepcopy(net).double()
    kept = torch.full(fast.deep_shape(x.shape, stages), torch.nan)
    own = torch.full(wide.deep_shape(x.shape, stages), torch.nan, dtype=torch.float64)
    with torch.no_grad():
        for seed, fresh in ((1, True), (2, False), (3, False), (4, True), (5, False)):
            x, t, _ = inputs("ddpm", seed=seed)
            want = wide(x.double(), t, deep=Deep(stages, own, fresh))
            assert far(fast(x, t, deep=Deep(stages, kept, fresh)), want) <= BOUND
            assert far(kept, own) <= BOUND
            # a whole call between two of these
            assert far(fast(x, t), wide(x.double(), t)) <= BOUND


@pytest.mark.parametrize(
    "config", [{"asymmetric": True}, {"scale_shift": True, "resample_blocks": True, "classes": 10}]
)
def test_packed_weights_are_as_large_as_the_checkpoint(config: dict) -> None:
    net = UNet(channels=64, mults=(1, 2), blocks=1, attention=(2,), **config)
    bytes_of = [sum(p.nbytes for p in module.parameters()) for module in (prepare(net), net)]
    assert bytes_of[0] <= 1.5 * bytes_of[1]


def test_other_backends_and_dtypes_are_the_nets() -> None:
    net, (x, t, _) = make("ddpm"), inputs("ddpm")
    fast, want = prepare(net), exact(net, x, t, None)
    with torch.no_grad():
        fast(x, t)
        with fd.backend("reference"):
            assert far(fast(x, t), want) <= 1e-6
        with fd.backend("cpp"):
            assert far(fast(x, t), want) <= BOUND
        assert far(prepare(net, dtype=torch.float64)(x, t), want) <= 1e-7
    # made where the reference was asked for, and called where it is not
    with fd.backend("reference"):
        fast = prepare(net)
    with torch.no_grad():
        assert far(fast(x, t), want) <= BOUND


def test_samples_hardly_move() -> None:
    """A whole run: 50 steps of DDIM, the largest difference of a pixel."""
    torch.manual_seed(0)
    net = make("24 and 40")
    with torch.no_grad():
        net.out.weight.mul_(0.1)
    den = fd.Denoiser(net, fd.linear(), "eps")
    runs = [fd.Sampler(d, (2, 3, 12, 12))("ddim", steps=50, seed=1) for d in (den.prepare(exact=True), den.prepare())]
    assert (runs[0] - runs[1]).abs().max() <= 1e-3
