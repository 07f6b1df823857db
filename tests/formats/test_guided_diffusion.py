"""`fd.optimize` on networks built like guided-diffusion's."""

from typing import Any

import pytest
import torch
from torch import nn

import fastdiff as fd
from tests.formats.guided_net import peer

pytestmark = pytest.mark.usefixtures("one_thread")

NETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adm": {"scale_shift": True, "updown": True, "head_channels": 16, "classes": 5, "attention": (1, 2)},
    "legacy heads": {"heads": 4, "mult": (1, 2, 2), "attention": (2, 4)},
    "new order": {"heads": 2, "new": True, "blocks": 2},
    "no convolutions": {"conv": False, "mult": (2, 1)},
}


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", NETS)
def test_nets_agree(name: str) -> None:
    net = peer(**NETS[name])
    fast = fd.optimize(net)
    assert fast.original is net
    labels = {"y": torch.tensor([4, 1])} if net.num_classes else {}
    with torch.no_grad():
        for size, t in ((16, [3, 981]), (8, [500, 0])):
            x = torch.randn(2, 3, size, 2 * size, generator=torch.Generator().manual_seed(1))
            want = net(x, torch.tensor(t), **labels)
            assert far(fast(x, torch.tensor(t), **labels), want) < 1e-5
        net.out[2].weight.mul_(2.0)
        assert far(fast(x, torch.tensor(t), **labels), want) > 0.1
    assert fast.fastdiff._reason is None


def test_a_fork_that_computes_something_else_is_patched() -> None:
    net = peer(odd=1.01)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 981])
    with torch.no_grad():
        want = net(x, t)
        with pytest.warns(UserWarning, match=r"computes something else; its norms are fused in place"):
            fast = fd.optimize(net)
        assert fast is net
        assert far(fast(x, t), want) < 1e-5


def test_other_modules_of_that_name_are_patched() -> None:
    class UNetModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    net = UNetModel()
    assert fd.optimize(net) is net


def test_modes_and_labels_stay_as_they_are() -> None:
    net = peer(classes=5).train()
    net.middle_block.eval()
    fast = fd.optimize(net)
    assert net.training
    assert not net.middle_block.training
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 981])
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match=r"the call has labels where the model has no classes, or none where it has"),
    ):
        fast(x, t)
