"""What `fd.optimize` captures on a GPU, on a recorder that replays by calling."""

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.formats.diffusers.forward import Call
from fastdiff.formats.graphs import KEPT, Graphs
from tests.sampling.recorder import FakeRecorder, replays

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> fd.UNet:
    torch.manual_seed(0)
    made = fd.UNet(
        in_channels=4, channels=16, mults=(1, 2), blocks=1, attention=(2,), context_channels=8, heads=2,
        condition="features", condition_channels=3,
    ).eval().requires_grad_(False)  # fmt: skip
    for p in made.parameters():
        p.add_(0.05 * torch.randn(p.shape))
    return made


def call(seed: int, size: int = 8, *, control: bool = False, features: bool = True) -> Call:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    cond = {"context": draw(2, 5, 8), "features": draw(2, 3)}
    residuals = None
    if control:
        residuals = [draw(2, 16, size, size) for _ in range(3)] + [draw(2, 32, size // 2, size // 2) for _ in range(2)]
        residuals[2] = draw(2, 16, size // 2, size // 2)
    return Call(draw(2, 4, size, size), torch.tensor([seed, 900]).expand(2), cond, residuals)


def test_a_shape_is_captured_at_its_third_call_and_replayed_from_then_on() -> None:
    FakeRecorder.forget()
    model = net()
    graphs = Graphs(model, FakeRecorder)
    kept = []
    for seed in range(6):
        for size in (8, 16):
            given = call(seed, size)
            got = graphs(given)
            kept.append((got, model(given.x, given.t, given.cond)))
    # results are the caller's own: none was written over
    for got, want in kept:
        assert torch.equal(got, want)
    (only,) = FakeRecorder.all
    assert only.warmed == 4
    assert replays() == [[4, 4]]


def test_control_inputs_are_a_shape_of_their_own_and_changed_weights_are_seen() -> None:
    FakeRecorder.forget()
    model = net()
    graphs = Graphs(model, FakeRecorder)
    for seed in range(5):
        for control in (False, True):
            given = call(seed, control=control)
            assert torch.equal(graphs(given), model(given.x, given.t, given.cond, residuals=given.residuals))
    model.stem.weight.mul_(2.0)
    assert torch.equal(graphs(given), model(given.x, given.t, given.cond, residuals=given.residuals))
    assert replays() == [[3, 4]]


def test_the_oldest_shape_goes() -> None:
    FakeRecorder.forget()
    graphs = Graphs(net(), FakeRecorder)
    for size in range(2, 2 * KEPT + 4, 2):
        for seed in range(3):
            graphs(call(seed, size))
    assert len(graphs._shapes) == KEPT
    (only,) = FakeRecorder.all
    assert (len(only.recordings), len(only.living)) == (KEPT + 1, KEPT)
    graphs.close()
    assert not only.living


def test_gradients_are_never_captured() -> None:
    FakeRecorder.forget()
    model = net()
    graphs = Graphs(model, FakeRecorder)
    given = call(0)
    x = given.x.clone().requires_grad_()
    for _ in range(4):
        graphs(given._replace(x=x)).square().sum().backward()
    assert x.grad.norm() > 0
    assert FakeRecorder.all == []
