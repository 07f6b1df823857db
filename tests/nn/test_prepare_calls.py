"""What each tactic takes out of the calls of a prepared net, seen by a dispatch mode."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.nn import packed
from fastdiff.nn.layers import ResBlock
from fastdiff.nn.prepare import Tactics, prepare
from fastdiff.ops.inject import inject
from tests.nn.prepared import TACTICS, inputs, make

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Calls(TorchDispatchMode):
    """names: how often each op was called; convolutions: arguments; moved: ops whose result lies otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.convolutions: list[tuple[Any, ...]] = []
        self.moved: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names[name] += 1
        if name == "convolution":
            self.convolutions.append(args)
        images = [a for a in args if isinstance(a, Tensor) and a.ndim in FORMS]
        if isinstance(y, Tensor) and images and y.ndim == images[0].ndim and not views(y, images[0]):
            self.moved += [name] * (lies(y) != lies(images[0]))
        return y


def views(y: Tensor, x: Tensor) -> bool:
    return y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def lies(x: Tensor) -> str:
    """How x lies; "both" where nobody can tell."""
    plain, last = x.is_contiguous(), x.is_contiguous(memory_format=FORMS[x.ndim])
    return {(True, True): "both", (True, False): "plain", (False, True): "last"}.get((plain, last), "neither")


def calls(kind: str, tactics: Tactics | None) -> Calls:
    """Of a call without a table, of the net itself where tactics is None."""
    net, (x, t, cond) = make(kind).requires_grad_(False), inputs(kind)
    fast = net if tactics is None else prepare(net, tactics=tactics)
    with torch.no_grad(), Calls() as seen:
        fast(x, t, cond)
    return seen


def blocks(kind: str) -> list[ResBlock]:
    return make(kind).res_blocks()


def test_without_tactics_the_calls_are_the_nets() -> None:
    for kind in ("ddpm", "adm"):
        assert calls(kind, TACTICS["none"]).names == calls(kind, None).names


# torch's own 1x1 convolution of volumes loses the layout on CPUs; `all` does not call it
@pytest.mark.parametrize(
    ("kind", "tactics"),
    [("ddpm", "channels_last"), ("ddpm", "all"), ("adm", "channels_last"), ("adm", "all"), ("volume", "all")],
)
def test_channels_last_moves_the_image_only(kind: str, tactics: str) -> None:
    before, seen = calls(kind, None), calls(kind, TACTICS[tactics])
    assert seen.moved == ["_to_copy"]
    assert seen.names["_to_copy"] == before.names["_to_copy"] + 1
    assert seen.names["clone"] == seen.names["copy_"] == seen.names["contiguous"] == 0
    for x, weight, *_ in seen.convolutions:
        assert "plain" not in (lies(x), lies(weight))


@pytest.mark.parametrize("kind", ["ddpm", "adm"])
def test_bias_in_norm_takes_it_from_the_first_convolution(kind: str) -> None:
    without = [c for c in calls(kind, TACTICS["bias_in_norm"]).convolutions if c[2] is None]
    assert len(without) == len(blocks(kind))
    assert not [c for c in calls(kind, None).convolutions if c[2] is None]


@pytest.mark.parametrize("kind", ["ddpm", "adm", "line"])
def test_bias_in_residual_is_in_one_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[Tensor] = []
    monkeypatch.setattr(packed, "inject", lambda h, **given: passes.append(h) or inject(h, **given))
    seen = calls(kind, TACTICS["bias_in_residual"])
    shortcuts = [b for b in blocks(kind) if b.shortcut is not None]
    assert sum(c[2] is None for c in seen.convolutions) == len(blocks(kind)) + len(shortcuts)
    assert len(passes) == len(blocks(kind))


@pytest.mark.parametrize("kind", ["ddpm", "adm", "line"])
def test_split_shortcut_concatenates_nothing(kind: str) -> None:
    before, seen = calls(kind, None), calls(kind, TACTICS["split_shortcut"])
    split = [b for b in blocks(kind) if b.shortcut is not None]
    # the norm of both does it inside its op
    assert before.names["cat"] - seen.names["cat"] == len(make(kind).up)
    assert len(before.convolutions) - len(seen.convolutions) == len(split)


def test_split_shortcut_adds_to_the_first_product() -> None:
    seen = calls("ddpm", TACTICS["split_shortcut"]._replace(channels_last=True))
    assert seen.names["addmm_"] == len(make("ddpm").up)
    assert seen.names["cat"] == calls("ddpm", TACTICS["split_shortcut"]).names["cat"]


@pytest.mark.parametrize(("kind", "left"), [("ddpm", 0), ("adm", 1), ("line", 0), ("volume", 0)])
def test_fold_upsample_repeats_nothing(kind: str, left: int) -> None:
    def repeats(seen: Calls) -> int:
        return sum(n for name, n in seen.names.items() if name.startswith("upsample"))

    seen = calls(kind, TACTICS["fold_upsample"])
    assert repeats(calls(kind, None)) == left + 1
    # what is left is beside ADM's convolutions, in the shortcut
    assert repeats(seen) == left
    assert sum(c[6] for c in seen.convolutions) == 1


@pytest.mark.parametrize("kind", ["ddpm", "adm"])
def test_time_product_is_one(kind: str) -> None:
    before, seen = calls(kind, None), calls(kind, TACTICS["time_product"])
    assert before.names["addmm"] - seen.names["addmm"] == len(blocks(kind)) - 1
    assert seen.names["cat"] == before.names["cat"]
