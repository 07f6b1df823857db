"""`UNet.time_table`: the projections that forward makes, and forward from a line of them."""

import pytest
import torch

from fastdiff.nn.layers import ResBlock, TableRow
from fastdiff.nn.unet import UNet
from tests.nn.other_nets import draw, far, randomise

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"channels": 8, "mults": (1, 2), "blocks": 1, "groups": 4, "head_channels": 4}
KINDS = {
    "ddpm": {},
    "adm": {"scale_shift": True, "resample_blocks": True, "classes": 3},
    "number": {"condition": "number"},
    "vector": {"condition": "vector"},
}


def make(kind: str) -> tuple[UNet, torch.Tensor, torch.Tensor | None]:
    """(net, t (3,), cond (3, ...))"""
    net, t = randomise(UNet(**SMALL, **KINDS[kind])), torch.tensor([999, 7, 400])
    conds = {"adm": torch.tensor([0, 3, 2]), "number": torch.tensor([1.0, 5.0, 30.0]), "vector": draw(3, 32)}
    return net, t, conds.get(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_what_forward_projects(kind: str) -> None:
    net, t, cond = make(kind)
    made: list[torch.Tensor] = []
    blocks = [m for m in net.modules() if isinstance(m, ResBlock)]
    for block in blocks:
        block.time.register_forward_hook(lambda m, args, e: made.append(e))
    net(draw(3, 3, 4, 4), t, cond)
    table = net.time_table(t, cond)
    assert len(made) == len(blocks)
    assert far(table, torch.cat(made, 1)) < 1e-6
    assert [b.columns for b in blocks] == [b.columns for b in net.res_blocks()]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_from_a_line(kind: str) -> None:
    net, t, cond = make(kind)
    x, table = draw(3, 3, 4, 4), net.time_table(t, cond)
    assert far(net(x, None, table_row=table), net(x, t, cond)) < 1e-6
    for k in range(3):
        line = table.index_select(0, torch.tensor([k]))
        same = None if cond is None else cond[k].expand(3, *cond.shape[1:])
        assert far(net(x, None, table_row=line), net(x, t[k], same)) < 1e-6
    half = draw(2, 3, 4, 4)
    at = torch.tensor([2, 0])
    assert (
        far(net(half, None, table_row=table.index_select(0, at)), net(half, t[at], None if cond is None else cond[at]))
        < 1e-6
    )


def test_gradients_go_through_the_table() -> None:
    net, t, cond = make("adm")
    x = draw(3, 3, 4, 4)
    wanted = torch.autograd.grad(net(x, t, cond).sum(), list(net.parameters()))
    got = torch.autograd.grad(net(x, None, table_row=net.time_table(t, cond)).sum(), list(net.parameters()))
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() <= 1e-5 * w.norm() + 1e-6


def test_a_line_is_read_by_a_device_counter_in_one_graph() -> None:
    net, t, _ = make("ddpm")
    x, k = draw(2, 3, 4, 4), torch.tensor([0])
    with torch.no_grad():
        table = net.time_table(t)
        step = torch.compile(
            lambda x, k: net(x, None, table_row=table.index_select(0, k)), fullgraph=True, backend="aot_eager"
        )
        for i in range(3):
            assert far(step(x, k), net(x, t[i])) < 1e-6
            k += 1


def test_wrong_lines_are_named() -> None:
    net, t, _ = make("ddpm")
    x, table = draw(2, 3, 4, 4), net.time_table(t)
    with pytest.raises(ValueError, match=rf"table_row has shape \(3, {net.columns}\); .* \(2, {net.columns}\)"):
        net(x, None, table_row=table)
    with pytest.raises(ValueError, match="table_row has shape"):
        net(x, None, table_row=table[0])
    with pytest.raises(ValueError, match="t is None; pass a time, or table_row="):
        net(x, None)
    lone = ResBlock(8, 8, dims=2, time_channels=4, groups=2)
    with pytest.raises(ValueError, match="emb is a TableRow"):
        lone(draw(1, 8, 4, 4), TableRow(table[0]))
