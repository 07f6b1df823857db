"""`fd.patch` on modules of all kinds: the same numbers and gradients, the fusions counted, and taken back exactly."""

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff.nn.known import norm_act
from tests.nn import other_nets as other
from tests.nn.other_nets import MODELS, draw, far, randomise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_and_gradients(name: str, calls: list[bool]) -> None:
    make, ops, fused = MODELS[name]
    net = randomise(make())
    if name == "decorated":
        fused, ops = 2, 4  # super() runs as it is written
    twin = copy.deepcopy(net)
    patched = fd.patch(net)
    x, x2 = draw(2, 8, 6, 5).requires_grad_(), draw(2, 8, 6, 5).requires_grad_()
    y, y2 = net(x), twin(x2)
    assert (len(calls), sum(calls)) == (ops, fused)
    assert far(y, y2) < 1e-6
    dy = draw(*y.shape, seed=2)
    y.backward(dy)
    y2.backward(dy)
    assert far(x.grad, x2.grad) < 1e-5
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert far(p.grad, q.grad) < 1e-5
    patched.undo()
    assert [type(m) for m in net.modules()] == [type(m) for m in twin.modules()]
    assert torch.equal(net(x), y2)
    assert all(m.__dict__.keys() == n.__dict__.keys() for m, n in zip(net.modules(), twin.modules(), strict=True))


def test_objects_parameters_and_keys_stay() -> None:
    net = randomise(other.Blocks(other.ResBlock(True), other.ResBlock(False))).eval()
    modules, state, names = list(net.modules()), net.state_dict(), dict(net.named_parameters())
    with fd.patch(net) as inside:
        assert inside is net
        assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
        assert all(p is names[n] for n, p in net.named_parameters())
        assert list(net.state_dict()) == list(state)
        assert not any(m.training for m in net.modules())
        assert sum(isinstance(m, nn.GroupNorm) for m in net.modules()) == 4
        assert all(isinstance(m, fd.nn.GroupNorm) for m in net.modules() if isinstance(m, nn.GroupNorm))
        assert [type(m).__name__ for m in net.modules()].count("ResBlock") == 2
        assert isinstance(net[0], other.ResBlock)
        net.double()
    assert not any(isinstance(m, fd.nn.GroupNorm) for m in net.modules())
    assert net[0].in_layers[0].weight.dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_copies_are_patched_too(copied: Callable[[nn.Module], nn.Module], calls: list[bool]) -> None:
    net = randomise(other.Pair())
    patched = fd.patch(net)
    twin, x = copied(net), draw(1, 8, 4, 4)
    y = net(x)
    calls.clear()
    with torch.no_grad():
        assert torch.equal(twin(x), y)
    assert calls == [True]
    patched.undo()
    calls.clear()
    twin(x)
    assert type(twin) is not other.Pair
    assert len(calls) == (copied is not copy.copy)  # a shallow copy has the very norm that was put back


def test_saved_whole_and_replicated(calls: list[bool]) -> None:
    net = randomise(other.Pair())
    fd.patch(net)
    file, x = io.BytesIO(), draw(1, 8, 4, 4)
    torch.save(net, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), net(x))
    replica = net._replicate_for_data_parallel()
    replica.norm, replica.act, replica.conv = nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 1)
    randomise(replica.conv)
    calls.clear()
    plain = replica.conv(nn.functional.silu(replica.norm(x)))
    assert far(replica(x), plain) < 1e-6  # its own children, not those of the model it comes from
    assert calls == []


def test_hooks_see_what_they_saw(calls: list[bool]) -> None:
    net, x = randomise(other.Pair()), draw(1, 8, 4, 4)
    wanted = net.norm(x)
    seen: list[torch.Tensor] = []
    fd.patch(net)
    handle = net.norm.register_forward_hook(lambda m, args, y: seen.append(y))
    net(x)
    assert far(seen[0], wanted) < 1e-6
    assert calls == [False]
    handle.remove()
    for register in (net.norm.register_forward_pre_hook, net.act.register_forward_pre_hook):
        handle = register(lambda m, args: (args[0] + 1,))
        calls.clear()
        net(x)
        assert calls == [False]
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: None)
    calls.clear()
    net(x)
    handle.remove()
    net(x)
    assert calls == [False, True]


def test_a_norm_that_is_left_and_a_table() -> None:
    hooked = nn.GroupNorm(2, 8)
    hooked.forward = hooked.forward
    net = nn.ModuleDict(
        {"pair": other.Pair(), "odd": other.Pair(other.Odd(2, 8)), "own": hooked, "alone": nn.GroupNorm(1, 8)}
    )
    patched = fd.patch(net)
    assert patched.left == {
        "odd.norm": "Odd has a forward of its own",
        "own": "its forward was replaced on the module",
    }
    assert type(net["odd"].norm) is other.Odd
    assert [tuple(n) for n in patched.norms] == [
        ("pair.norm", 4, 8, "SiLU in Pair.forward"),
        ("alone", 1, 8, ""),
    ]
    assert str(patched).splitlines() == [
        "ModuleDict: 2 GroupNorm replaced, 1 with the SiLU behind it",
        "  pair.norm      4 x 8  SiLU in Pair.forward",
        "  alone          1 x 8  no SiLU found",
        "  odd.norm        left  Odd has a forward of its own",
        "  own             left  its forward was replaced on the module",
    ]
    assert repr(patched) == "Patched(ModuleDict, 2 norms, 2 left)"


def test_twice_is_once() -> None:
    net, x = randomise(other.Pair()), draw(1, 8, 4, 4)
    want = net(x)
    first = fd.patch(net)
    kinds = [type(m) for m in net.modules()]
    second = fd.patch(net)
    assert (second.norms, second.left) == ([], {})
    assert [type(m) for m in net.modules()] == kinds
    second.undo()
    assert [type(m) for m in net.modules()] == kinds
    first.undo()
    first.undo()
    assert torch.equal(net(x), want)


def test_one_norm_in_two_places(calls: list[bool]) -> None:
    shared = nn.GroupNorm(2, 8)
    net = randomise(nn.ModuleList([other.Pair(shared), other.Pair(shared), nn.Sequential(nn.SiLU(), shared)]))
    twin, x = copy.deepcopy(net), draw(1, 8, 4, 4)
    assert len(fd.patch(net).norms) == 1
    for ours, theirs in zip(net, twin, strict=True):
        assert far(ours(x), theirs(x)) < 1e-6
    assert calls == [True, True, False]


def test_results_leave_and_inputs_change() -> None:
    net = randomise(other.Last())
    twin, x = copy.deepcopy(net), draw(1, 8, 4, 4)
    fd.patch(net)
    for guard in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with guard():
            for y, want in zip(net(x), twin(x), strict=True):
                assert type(y) is torch.Tensor
                assert far(y, want) < 1e-6


def test_undo_says_what_was_changed_later() -> None:
    net = other.Pair()
    patched = fd.patch(net)
    torch.nn.utils.parametrize.register_parametrization(net.norm, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="cannot undo a GroupNorm, now ParametrizedGroupNorm"):
        patched.undo()
    assert type(net) is other.Pair
    torch.nn.utils.parametrize.remove_parametrizations(net.norm, "weight")
    patched.undo()
    assert type(net.norm) is nn.GroupNorm


def test_a_parametrized_norm_is_patched(calls: list[bool]) -> None:
    net, x = randomise(other.Pair()), draw(1, 8, 4, 4)
    torch.nn.utils.parametrize.register_parametrization(net.norm, "weight", nn.Softplus())
    want = net(x)
    with fd.patch(net):
        assert far(net(x), want) < 1e-6
    assert calls == [True]
    assert torch.equal(net(x), want)


def test_a_source_that_is_not_what_runs(calls: list[bool]) -> None:
    names: dict[str, Any] = {"Pair": other.Pair}
    exec("class Unread(Pair):\n    def forward(self, x):\n        return self.act(self.norm(x))", names)
    net, x = randomise(names["Unread"]()), draw(1, 8, 4, 4)
    want = net(x)
    [norm] = fd.patch(net).norms
    assert norm.fused == ""
    assert far(net(x), want) < 1e-6
    assert calls == [False]


def test_only_modules() -> None:
    with pytest.raises(TypeError, match=r"model is a dict; pass the torch.nn.Module"):
        fd.patch({})


def test_a_pair_is_fused_only_as_what_it_is(calls: list[bool]) -> None:
    class Shifted(fd.nn.GroupNorm):
        def forward(self, input: torch.Tensor, **given: Any) -> torch.Tensor:
            return super().forward(input, **given) + 1

    x = draw(1, 8, 4, 4)
    for norm in (fd.nn.GroupNorm(2, 8, act="silu"), Shifted(2, 8), nn.GroupNorm(2, 8), nn.Identity()):
        assert torch.equal(norm_act(nn.SiLU(), norm, x), nn.functional.silu(norm(x)))
    assert not any(calls[2:])
    assert far(norm_act(nn.ReLU(), fd.nn.GroupNorm(2, 8), x), nn.functional.relu(nn.GroupNorm(2, 8)(x))) < 1e-6


def test_a_file_that_was_edited_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[bool]) -> None:
    """The source on disk says norm, then SiLU; what runs does not."""
    text = (
        "from tests.nn.other_nets import Pair\n\n\nclass Edited(Pair):\n    def forward(self, x):\n        return {}\n"
    )
    file = tmp_path / "edited_module.py"
    file.write_text(text.format("self.act(self.norm(x) + 1)"))
    monkeypatch.syspath_prepend(tmp_path)
    net, x = randomise(importlib.import_module("edited_module").Edited()), draw(1, 8, 4, 4)
    want = net(x)
    file.write_text(text.format("self.act(self.norm(x))"))
    fd.patch(net)
    assert far(net(x), want) < 1e-6
    assert calls == [False]
