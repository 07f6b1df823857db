"""fd.verify: small errors where all is well, and a finding where a kernel or a packed weight is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff import row
from fastdiff.cli import main
from fastdiff.nn.prepare import PreparedUNet
from fastdiff.ops import dispatch, native
from fastdiff.sampling.report import Report, error
from fastdiff.sampling.verify_module import LOOP, NETWORK
from fastdiff.sampling.verify_sampler import _exact_products, _shares
from tests.nn.test_unet import far, randomise
from tests.sampling.foreign import ForeignUNet

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.cpu is None, reason="without compiled kernels the fused path is the reference"),
]

SHAPE = (2, 3, 8, 8)


def denoiser(predicts: str = "v", schedule: Any = None, **config: Any) -> fd.Denoiser:
    given = {"channels": 16, "mults": (1, 2), "blocks": 1, "attention": (2,)}
    return fd.Denoiser(randomise(fd.UNet(**given | config)), schedule or fd.cosine(), predicts)


def relative(report: Report) -> list[float]:
    return [e.relative for line in report.lines for e in line.errors]


def bounds(report: Report) -> list[float]:
    return [e.bound for line in report.lines for e in line.errors]


# ---- all is well


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize(
    ("predicts", "schedule"),
    [("eps", fd.linear()), ("v", fd.cosine()), ("flow", fd.flow()), ("edm", fd.edm())],
    ids=str,
)
def test_networks_of_ours_are_ok(predicts: str, schedule: Any, solver: str) -> None:
    report = fd.verify(denoiser(predicts, schedule), SHAPE, solver=solver)
    assert report.ok, str(report)
    assert [len(line.errors) for line in report.lines] == [2] * 4 + [1]
    # what is compared is not one and the same thing
    assert 1e-8 < max(relative(report)) < NETWORK


def test_the_numbers_are_those_of_the_samplers() -> None:
    den = denoiser("eps", fd.linear(), classes=3)
    given = {"steps": 5, "seed": 3, "cond": [0, 2], "guidance": fd.cfg(2.0)}
    report = fd.verify(den, SHAPE, **given)
    fast = fd.sample(den.prepare(), SHAPE, **given)
    with fd.backend("reference"):
        plain = fd.sample(den, SHAPE, **given)
    last = report.lines[-1].errors[0]
    assert last.relative == pytest.approx(far(fast, plain), rel=1e-6)
    assert last.largest == pytest.approx(float((fast - plain).abs().max()), rel=1e-6)
    times = [float(line.name.split("= ")[1]) for line in report.lines[:-1]]
    assert times == fd.plan(den.schedule, "eps", fd.ddim, steps=5, spacing="trailing")[:-1, row.T].tolist()


def test_which_paths_are_compared() -> None:
    den = denoiser()
    net = den.net
    with pytest.raises(ValueError, match="prepared with follow=False"):
        fd.verify(den.prepare(follow=False), SHAPE)
    winograd, exact = fd.verify(den, SHAPE), fd.verify(den, SHAPE, exact=True)
    assert (min(bounds(winograd)), min(bounds(exact))) == (NETWORK, LOOP)
    assert max(bounds(winograd)) < 3 * NETWORK
    assert fd.verify(den.prepare(), SHAPE).lines == winograd.lines
    foreign = fd.verify(fd.Denoiser(ForeignUNet(), fd.cosine(), "v"), (2, 1, 8, 8), cond=[1, 2])
    assert "network as it is" in foreign.title
    assert min(bounds(foreign)) == LOOP
    assert (winograd.ok, exact.ok, foreign.ok) == (True, True, True)
    # the network is left as it was
    assert type(net) is fd.UNet
    assert not net._forward_hooks
    function = fd.verify(fd.Denoiser(lambda x, t, c: 0.1 * x, fd.vp()), SHAPE, solver="euler")
    assert function.ok


def test_a_network_in_16_bits_is_held_to_its_own_error() -> None:
    den = denoiser("v")
    den.net.bfloat16()
    report = fd.verify(den, SHAPE)
    assert report.ok, str(report)
    assert all(1e-3 < r < b < 0.1 for r, b in zip(relative(report), bounds(report), strict=True))
    assert "in float32" in report.title


def test_shares_of_the_output() -> None:
    """Ill-conditioned is what starts from nearly pure noise and predicts eps: 1/alpha there, 1 for v."""
    one = torch.ones(1, 1, 2, 2)

    def shares(predicts: str, size: float = 1.0, *, carried: bool) -> list[tuple[float, float]]:
        steps = fd.plan(fd.cosine(), predicts, fd.ddim, steps=4, spacing="trailing")
        return list(_shares(steps, [(size * one, one)] * 4, [one] * 4, carried=carried))

    steps = fd.plan(fd.cosine(), "eps", fd.ddim, steps=4, spacing="trailing")
    alpha, sigma = steps[:, row.ALPHA], steps[:, row.SIGMA]
    for i, (x, x0) in enumerate(shares("eps", carried=False)):
        assert x0 == pytest.approx(max(1, sigma[i] / alpha[i]), rel=1e-6)
        assert x == pytest.approx(max(1, alpha[i + 1] * sigma[i] / alpha[i] - sigma[i + 1]), rel=1e-6)
    # what is made of the first error, and all later ones, in the end
    assert shares("eps", carried=True)[-1][0] == pytest.approx(1 / alpha[0], rel=0.1)
    assert shares("eps", 3.0, carried=False)[0][0] == pytest.approx(shares("eps", carried=False)[0][0] / 3)
    assert shares("v", carried=False) == [(1.0, 1.0)] * 4
    assert max(x for x, _ in shares("v", carried=True)) < 2


def test_float32_is_float32_and_comes_back() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with _exact_products():
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# ---- something is wrong


@pytest.fixture
def broken() -> Iterator[Callable[..., None]]:
    """broken(op, place, factor): the compiled kernel of an op errs by a factor in one of the tensors that it writes."""
    kept = {op: backends.copy() for op, backends in dispatch._table.items()}

    def plant(op: str, spoil: Callable[[tuple[Any, ...], Any], Any]) -> None:
        assert dispatch.reason(op, "cpp") is None
        right = dispatch.run(op, "cpp")

        def wrong(*args: Any, **given: Any) -> Any:
            return spoil(args, right(*args, **given))

        dispatch.replace(op, "cpp", run=wrong)

    yield plant
    dispatch._table.update(kept)


def test_a_wrong_step_is_found(broken: Callable[..., None]) -> None:
    den = denoiser("v")
    assert fd.verify(den, SHAPE).ok
    broken("step_", lambda args, result: args[0].mul_(1 + 1e-4))
    report = fd.verify(den, SHAPE)
    assert not report.ok
    assert report.lines[0].errors[0].relative == pytest.approx(1e-4, rel=0.01)
    assert str(report).endswith("NOT ok")


def test_a_kernel_that_gives_nan_is_found(broken: Callable[..., None]) -> None:
    den = denoiser("v")
    broken("step_", lambda args, result: args[0][0, 0, 0, 0].fill_(math.nan))
    assert not fd.verify(den, SHAPE).ok


def test_a_wrong_packed_weight_is_found() -> None:
    den = denoiser("v").prepare()
    assert isinstance(den.net, PreparedUNet)
    assert fd.verify(den, SHAPE).ok
    with torch.no_grad():
        next(p for p in den.net.net.out.parameters() if p.ndim > 1).mul_(1 + 1e-3)
    report = fd.verify(den, SHAPE)
    assert not report.ok
    assert max(relative(report)) > 1e-4


def test_a_network_of_nan_is_the_users(broken: Callable[..., None]) -> None:
    den = denoiser("v")
    nn.init.constant_(den.net.out.bias, math.nan)
    with pytest.raises(FloatingPointError, match="image 0"):
        fd.verify(den, SHAPE)


# ---- modules


class Net(nn.Module):
    """A module with norms and SiLUs, an input that is a list, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 4, 3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: list[Tensor], *, scale: float) -> dict[str, Any]:
        y = self.drop(self.net(x[0]))
        return {"y": scale * y, "more": (y.argmax(1),)}


@pytest.fixture
def images() -> list[Tensor]:
    return [torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))]


def test_any_module(images: list[Tensor]) -> None:
    net = Net()
    report = fd.verify(net, images, scale=0.5)
    assert report.ok, str(report)
    assert [line.name for line in report.lines] == ["output.y", "output.more[0]"]
    fused, base, against = report.lines[0].errors
    assert 0 < base.relative < 1e-6
    assert 0 < fused.relative < 1e-6
    assert against.bound == pytest.approx(2 * base.relative, abs=2e-7)
    assert "1 norms fused" in report.title
    # as it was: the class of the norm, the mode
    assert type(net.net[1]) is nn.GroupNorm
    assert net.training
    assert net.drop.training
    fd.patch(net)
    assert fd.verify(net, images, scale=0.5).ok
    assert type(net.net[1]) is fd.nn.GroupNorm


def test_a_wrong_norm_is_found(broken: Callable[..., None], images: list[Tensor]) -> None:
    net = Net()
    broken("group_norm_silu", lambda args, result: (result[0] * (1 + 1e-4), *result[1:]))
    report = fd.verify(net, images, scale=0.5)
    assert not report.ok
    assert report.lines[0].errors[2].relative > 1e-5
    assert type(net.net[1]) is nn.GroupNorm
    # a patched one is compared with its own reference
    fd.patch(net)
    assert not fd.verify(net, images, scale=0.5).ok


class Narrow(nn.Module):
    """It cannot be cast."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float())


def test_a_module_that_cannot_be_cast(broken: Callable[..., None]) -> None:
    report = fd.verify(Narrow(), torch.randn(3, 4))
    assert report.ok
    assert bounds(report) == [LOOP]
    broken("group_norm_silu", lambda args, result: (result[0] + 1e-3, *result[1:]))
    assert not fd.verify(Narrow(), torch.randn(3, 4)).ok


class Optimized(nn.Module):
    """What stands for a module, and knows it."""

    def __init__(self, original: nn.Module, error: float) -> None:
        super().__init__()
        self.original, self.error = original, error

    def forward(self, *args: Any) -> Tensor:
        return self.original(*args) * (1 + self.error)


@pytest.mark.parametrize(("planted", "ok"), [(1e-6, True), (1e-3, False)])
def test_a_module_that_has_its_original(planted: float, ok: bool) -> None:
    net = ForeignUNet()
    made = Optimized(net, planted)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    report = fd.verify(made, x, t)
    assert report.ok is ok
    assert report.lines[0].errors[0].relative == pytest.approx(planted, rel=0.1)
    assert "Optimized of ForeignUNet" in report.title
    report = fd.verify(fd.Denoiser(made, fd.cosine(), "v"), (2, 1, 8, 8))
    assert report.ok is ok


def test_a_unet_by_itself() -> None:
    net = denoiser().net
    report = fd.verify(net, torch.randn(SHAPE), 5)
    assert report.ok
    assert report.lines[0].errors[2].bound >= NETWORK
    assert "prepared, Winograd" in report.title
    with torch.no_grad():
        packed = fd.Denoiser(net, fd.cosine()).prepare().net
        next(p for p in packed.net.out.parameters() if p.ndim > 1).mul_(1 + 1e-3)
    assert not fd.verify(packed, torch.randn(SHAPE), 5).ok


def test_what_cannot_be_verified() -> None:
    with pytest.raises(TypeError, match=r"model is a str; pass a fd\.Denoiser"):
        fd.verify("digits")
    with pytest.raises(ValueError, match="Net needs example inputs"):
        fd.verify(Net())
    with pytest.raises(ValueError, match=r"pass shape=\(N, C, H, W\)"):
        fd.verify(denoiser())
    with pytest.raises(ValueError, match="churm"):
        fd.verify(denoiser(), SHAPE, churm=3)
    with pytest.raises(ValueError, match="gives no tensors"):
        fd.verify(nn.Identity(), 3)


# ---- the report


def test_the_report() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-3])
    one = error("x", a, b, 1e-3)
    assert (one.largest, one.relative) == (pytest.approx(1e-3, rel=1e-3), pytest.approx(1e-3 / 5**0.5, rel=1e-2))
    assert str(one) == "x 1.0e-03 abs, 4.5e-04 rel <= 1.0e-03"
    assert not error("x", a, b, 1e-4).ok
    assert str(error("x", a, b, 1e-4)).endswith("rel >  1.0e-04")
    assert not error("x", torch.tensor([math.nan]), torch.ones(1), 1.0).ok
    assert not error("x", torch.ones(2), torch.ones(3), 1.0).ok
    assert error("x", torch.zeros(2), torch.zeros(2), 0.0).ok
    assert error("x", a, b).ok
    # nothing compared is nothing verified
    assert not Report("", ()).ok


def test_the_command(
    capsys: pytest.CaptureFixture[str], broken: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTDIFF_BACKEND", raising=False)
    base = ["verify", "--device", "cpu", "--steps", "3"]
    assert main(base) == 0
    out = capsys.readouterr().out
    assert out.startswith("digits: ddim, 3 steps of (2, 1, 8, 8), network prepared, Winograd's convolutions")
    assert (out.count("\n  step "), out.splitlines()[-1]) == (3, "ok")
    assert main([*base, "digits", "--exact", "--guidance", "2", "--solver", "heun", "--n", "1"]) == 0
    assert "heun, 3 steps of (1, 1, 8, 8)" in capsys.readouterr().out
    broken("step_", lambda args, result: args[0].mul_(1 + 1e-4))
    assert main(base) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "NOT ok"
    assert main([*base, "--backend", "reference"]) == 0
    capsys.readouterr()
    fd.save(denoiser(), tmp_path / "shapeless")
    for args, said in (
        ([str(tmp_path / "shapeless")], "--shape C,H,W"),
        (["--shape", "3,x"], "--shape '3,x' is no shape"),
        (["--solver", "dimm"], "dimm"),
        (["nobody"], "'nobody'"),
        (["--n", "0"], "--n 0"),
    ):
        assert main([*base, *args]) == 2
        err = capsys.readouterr().err
        assert (said in err, err.count("\n")) == (True, 1)
    assert main([*base, str(tmp_path / "shapeless"), "--shape", "3,8,8", "--backend", "reference"]) == 0
