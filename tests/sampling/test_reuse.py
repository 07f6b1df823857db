"""fd.deep_cache: the deep part of the U-Net in some rows only."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastdiff as fd
from fastdiff.nn.layers import Deep
from fastdiff.nn.prepare import prepare
from fastdiff.sampling.reuse import fresh_rows
from tests.sampling.foreign import ForeignUNet
from tests.sampling.recorder import FakeRecorder

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (2, 1, 16, 8)
NETS = {
    "ddpm": {"channels": 8, "mults": (1, 2, 3), "blocks": 2, "attention": (2,), "asymmetric": True},
    "adm": {"channels": 8, "mults": (1, 2), "blocks": 1, "scale_shift": True, "resample_blocks": True, "classes": 4},
    "flat": {"channels": 8, "mults": (1,), "blocks": 3, "attention": (), "middle": False},
}


def network(kind):
    torch.manual_seed(0)
    net = fd.UNet(in_channels=1, **NETS[kind]).eval()
    torch.nn.init.normal_(net.out.weight, std=0.02)
    return net


@pytest.mark.parametrize("kind", NETS)
def test_the_kept_part_is_the_part_that_is_left_out(kind):
    """On the same x the shallow call is the whole one, bit for bit; on another x only what is above differs."""
    net = network(kind)
    x, other, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([3.0, 500.0])
    work = []
    with torch.no_grad():
        whole = net(x, t)
        for stages in range(1, len(net.up) + 1):
            kept = torch.full(net.deep_shape(SHAPE, stages), torch.nan)
            assert torch.equal(net(x, t, deep=Deep(stages, kept, fresh=True)), whole)
            assert kept.isfinite().all()
            with FlopCounterMode(display=False) as counter:
                assert torch.equal(net(x, t, deep=Deep(stages, kept, fresh=False)), whole)
            work.append(counter.get_total_flops())
            assert not torch.equal(net(other, t, deep=Deep(stages, kept, fresh=False)), whole)
    assert work == sorted(set(work))
    for stages in (0, len(net.up) + 1):
        with pytest.raises(ValueError, match="accepted: 1 to"):
            net.deep_shape(SHAPE, stages)


@pytest.mark.parametrize("kind", NETS)
def test_a_prepared_network_keeps_the_same_part(kind):
    net = network(kind)
    fast, x, t = prepare(net), torch.randn(SHAPE), torch.tensor([3.0, 500.0])
    kept = torch.zeros(net.deep_shape(SHAPE, 2)), torch.zeros(fast.deep_shape(SHAPE, 2))
    with torch.no_grad():
        for y in (x, x + 0.1):
            fresh = y is x
            a, b = (f(y, t, deep=Deep(2, k, fresh)) for f, k in zip((net, fast), kept, strict=True))
            assert (a - b).norm() <= 1e-5 * a.norm()
    assert (kept[0] - kept[1]).norm() <= 1e-5 * kept[0].norm()


def test_which_rows_run_the_deep_part():
    assert fresh_rows([2] * 7, 3) == [True, False, False, True, False, False, True]
    assert fresh_rows([2] * 3, 1) == [True] * 3
    # what fewer images kept does not serve more of them; what more kept serves fewer
    assert fresh_rows([2, 4, 4, 2, 2, 4], 3) == [True, True, False, False, True, True]
    assert fresh_rows([], 3) == []


def by_hand(net, den, every, stages, **given):
    """The same by a network that counts its calls."""
    calls, kept = [], torch.zeros(net.deep_shape(SHAPE, stages))

    def counting(x, t, cond):
        fresh = len(calls) % every == 0
        calls.append(fresh)
        return net(x, t, cond, deep=Deep(stages, kept, fresh))

    return fd.sample(den.with_net(counting), SHAPE, **given), calls


@pytest.mark.parametrize("stages", [1, 3])
def test_a_loop_that_reuses(stages):
    net = network("ddpm")
    den = fd.Denoiser(net, fd.linear(), "eps")
    given = {"solver": "dpmpp_2m", "steps": 8, "seed": 1, "clip": 1.0}
    plain = fd.sample(den, SHAPE, **given)
    assert torch.equal(fd.sample(den, SHAPE, reuse=fd.deep_cache(1, stages), **given), plain)
    got = fd.sample(den, SHAPE, reuse=fd.deep_cache(3, stages), **given)
    wanted, calls = by_hand(net, den, 3, stages, **given)
    assert calls == [True, False, False] * 2 + [True, False]
    assert (got - wanted).abs().max() <= 1e-5
    assert (got - plain).abs().max() > 1e-4


def test_two_graphs_on_the_same_buffers():
    den = fd.Denoiser(network("adm"), fd.linear(), "eps")
    FakeRecorder.forget()
    fast, slow = (fd.Sampler(den, SHAPE, run) for run in (fd.graph(recorder=FakeRecorder), fd.eager))
    for steps in (9, 12):
        given = {"steps": steps, "cond": torch.tensor([1, 2]), "guidance": fd.cfg(2.0), "reuse": fd.deep_cache(3)}
        assert torch.equal(fast(**given), slow(**given))
    (only,) = FakeRecorder.all
    # a third of 21 rows, and the rest; two of each before their capture
    assert sorted(r.replays for r in only.recordings) == [7 - 2, 14 - 2]


def test_mistakes():
    den = fd.Denoiser(network("flat"), fd.linear(), "eps")
    with pytest.raises(ValueError, match="every=0"):
        fd.deep_cache(0)
    with pytest.raises(ValueError, match="accepted: 1 to 4"):
        fd.sample(den, SHAPE, steps=2, reuse=fd.deep_cache(2, 5))
    with pytest.raises(ValueError, match=r"is no fd\.UNet"):
        fd.sample(den.with_net(ForeignUNet()), SHAPE, steps=2, reuse=fd.deep_cache(2))
    pull = fd.energy(lambda x0, t, c: x0.sum((1, 2, 3)))
    with pytest.raises(ValueError, match="reuse=None"):
        fd.sample(den, SHAPE, steps=2, reuse=fd.deep_cache(2), guidance=pull)
