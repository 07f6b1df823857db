"""Nets with a context that we write for diffusers: its UNet2DConditionModel computes what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff as fd
from fastdiff.cli import main
from fastdiff.formats.diffusers.write import FILES, check_target, save_diffusers
from fastdiff.nn.unet import UNet
from tests.formats.condition_nets import NETS, inputs, peer
from tests.formats.test_condition import cond_of, far, ours_of
from tests.nn.test_unet import draw, randomise

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"in_channels": 4, "channels": 8, "mults": (1, 2), "blocks": 1, "groups": 4, "context_channels": 24}
OURS: dict[str, dict[str, Any]] = {
    "one head": {"attention": (1,)},
    "channels a head": {"attention": (1, 2), "head_channels": 4, "depth": (1, 2), "eps": 1e-6},
    "no middle": {"attention": (2,), "middle": False, "heads": 2, "asymmetric": True, "scale_shift": True},
    "number": {"attention": (1,), "condition": "number", "time_channels": 24, "flip": False, "shift": 0.5},
    "features": {"attention": (1,), "condition": "features", "condition_channels": 6, "center_input": True},
}


def both_ways(net: UNet, folder: Path, x: torch.Tensor, t: torch.Tensor, cond: Any) -> UNet:
    """Write, compare with what diffusers computes from it, read back and compare the weights bit by bit."""
    save_diffusers(fd.Denoiser(net, fd.scaled_linear()), folder)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    context, labels = cond, None
    if isinstance(cond, dict):
        context = cond["context"]
        (labels,) = (v for kind, v in cond.items() if kind != "context")
    with torch.no_grad():
        want = net(x, t, cond)
        assert far(theirs(x, t, context, class_labels=labels).sample, want) < 1e-5
        assert float(want.norm()) > 0.1
    den = fd.load(folder)
    back = den.net
    assert isinstance(back, UNet)
    assert den.schedule.spec == fd.scaled_linear().spec
    a, b = net.state_dict(), back.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    return back


@pytest.mark.parametrize("name", NETS)
def test_their_nets_go_back(name: str, tmp_path: Path) -> None:
    theirs, call = peer(name), inputs(name)
    net = ours_of(theirs)
    back = both_ways(net, tmp_path, call["sample"], call["timestep"], cond_of(theirs, call))
    assert back.config == net.config


@pytest.mark.parametrize("name", OURS)
def test_our_nets_are_theirs(name: str, tmp_path: Path) -> None:
    net = randomise(UNet(**SMALL | OURS[name])).eval()
    context, kind = draw(2, 7, 24, seed=4), net.config["condition"]
    told = {"number": torch.tensor([0.5, 300.0]), "features": draw(2, 6, seed=3)}.get(kind)
    cond = context if told is None else {"context": context, kind: told}
    both_ways(net, tmp_path, draw(2, 4, 16, 8), torch.tensor([3, 700]), cond)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"middle_attention": False}, "middle_attention=False"),
        ({"middle_groups": 2}, "middle_groups=2 .* accepted: None, which is 4 here"),
        ({"resample_blocks": True}, "resample_blocks=True"),
        ({"learned_variance": True}, "learned_variance=True"),
        ({"max_period": 100.0}, "max_period=100.0"),
    ],
    ids=str,
)
def test_what_a_unet2dconditionmodel_cannot_say(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^diffusers: {said}"):
        save_diffusers(fd.Denoiser(UNet(**SMALL | given), fd.linear()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_convert_says_where_the_net_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    fd.save(fd.Denoiser(UNet(**SMALL), fd.linear()), "mine")
    command = ["convert", "mine", "--out", "theirs", "--to", "diffusers"]
    assert main(command) == 0
    assert 'UNet2DConditionModel.from_pretrained("theirs", subfolder="unet")' in capsys.readouterr().out
    assert main([*command, "--overwrite"]) == 0


def test_no_pipeline_is_named_and_the_folder_is_known_again(tmp_path: Path) -> None:
    den = fd.Denoiser(UNet(**SMALL), fd.linear())
    for _ in range(2):
        save_diffusers(den, tmp_path / "a")
        there = [p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*") if p.is_file()]
        assert sorted(there) == sorted(FILES[1:])
    (tmp_path / "a" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        check_target(tmp_path / "a")
