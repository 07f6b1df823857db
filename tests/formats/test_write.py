"""Folders that we write for diffusers: diffusers computes from them what we do, and we read back what was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.cli import main
from fastdiff.files import atomic
from fastdiff.formats.diffusers.convert import convert
from fastdiff.formats.diffusers.write import FILES, save_diffusers, unet_config
from fastdiff.formats.diffusers.write_schedule import scheduler_config
from fastdiff.nn.unet import UNet
from tests.formats.test_diffusers import NETS, far, inputs, peer
from tests.nn import prepared
from tests.nn.test_unet import draw, randomise

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # its schedulers call NumPy in a way that NumPy 2 warns of
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
]

SMALL = {"channels": 8, "mults": (1, 2), "blocks": 1, "groups": 4}
NULL = {"null_class": False}
# nets of our own, in all that a UNet2DModel can say
OURS: dict[str, dict[str, Any]] = {
    "ddpm": prepared.KINDS["ddpm"][0],
    "adm": prepared.KINDS["adm"][0] | NULL,
    "odd": prepared.KINDS["odd"][0],
    "no middle": {"middle": False, "attention": (1,), "head_channels": 8},
    "no attention in the middle": {"middle_attention": False, "attention": (1, 2), "head_channels": 4},
    "heads": {"heads": 4, "attention": (2,)},
    "one head each": {"heads": 1, "attention": (1, 2)},
    "number": {"condition": "number", "center_input": True},
    "vector": {"condition": "vector", "time_channels": 24, "flip": False, "shift": 0.5},
    "a norm of its own in the middle": {"scale_shift": True, "middle_groups": 2, "middle_divisor": 1.5, "dropout": 0.1},
    "one level": {"mults": (1,), "attention": (1,), "conv_resample": False, "resample_blocks": False},
    "blocks": {"resample_blocks": True, "mults": (1, 2, 2), "attention": (2,), "blocks": 2, "eps": 1e-6},
    "two outputs": {"learned_variance": True, "out_channels": 3},
    "groups by themselves": {"groups": None, "channels": 24},
}


def ours(name: str) -> UNet:
    return randomise(UNet(**SMALL | OURS[name])).eval()


def call(net: UNet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    c = net.config
    cond = {"number": torch.tensor([0.5, 300.0]), "vector": draw(2, net.time.linear2.out_features, seed=3)}
    labels = None if net.classes is None else torch.tensor([0, net.classes - 1 + c["null_class"]])
    return draw(2, net.in_channels, 16, 8), torch.tensor([3, 700]), cond.get(c["condition"], labels)


def both_ways(net: UNet, folder: Path, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> UNet:
    """Write, compare with what diffusers computes from it, read back and compare the weights bit by bit."""
    save_diffusers(fd.Denoiser(net, fd.linear()), folder)
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    with torch.no_grad():
        want, got = net(x, t, cond), theirs(x, t, cond).sample
    assert far(got, want) < 1e-5
    assert float(want.norm()) > 0.1
    back = fd.load(folder).net
    assert isinstance(back, UNet)
    a, b = net.state_dict(), back.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    return back


@pytest.mark.parametrize("name", NETS)
def test_their_nets_go_back(name: str, tmp_path: Path) -> None:
    theirs = peer(name)
    net = convert(dict(theirs.config), theirs.state_dict()).eval()
    back = both_ways(net, tmp_path, *inputs(theirs))
    # where there is no middle, it has no attention
    nothing = {} if net.config["middle"] else {"middle_attention": False}
    assert back.config == net.config | nothing
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[n], p) for n, p in theirs.state_dict().items())


@pytest.mark.parametrize("name", OURS)
def test_our_nets_are_theirs(name: str, tmp_path: Path) -> None:
    net = ours(name)
    both_ways(net, tmp_path, *call(net))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"dims": 3}, "dims=3"),
        ({"classes": 4}, "null_class=True cannot be said: its num_class_embeds=5 .* null class"),
        ({"time_scale": 1000.0}, "time_scale=1000.0"),
        ({"max_period": 1000.0}, "max_period=1000.0"),
        ({"conv_resample": False}, "conv_resample=False"),
        ({"mults": (2, 1), "groups": 8}, "mults=.*as wide as the first level"),
        ({"heads": 2, "attention": (1, 2)}, r"heads=2.*these have \[4, 8\]"),
        ({"middle_groups": 0}, "middle_groups=0"),
    ],
    ids=str,
)
def test_what_a_unet2dmodel_cannot_say(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    den = fd.Denoiser(UNet(**SMALL | config), fd.linear())
    with pytest.raises(ValueError, match=f"^diffusers: {said}"):
        save_diffusers(den, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_keyword_that_we_know_nothing_of_is_refused() -> None:
    net = UNet(**SMALL)
    net.config["time_scale"] = 7
    with pytest.raises(ValueError, match="time_scale=7"):
        unet_config(net)


def test_the_null_class_as_one_class_more(tmp_path: Path) -> None:
    net = randomise(UNet(**SMALL, classes=4)).eval()
    save_diffusers(fd.Denoiser(net, fd.linear()), tmp_path, null_label=True)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, t = draw(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert far(theirs(x, t, torch.tensor([4, 4])).sample, net(x, t)) < 1e-5
        assert far(theirs(x, t, torch.tensor([4, 1])).sample, net(x, t)) > 1e-3
    back = fd.load(tmp_path).net
    assert (back.config["classes"], back.config["null_class"]) == (5, False)


# ---- the scheduler

NET = {"channels": 8, "mults": (1,), "blocks": 1, "attention": (), "middle": False}


def said(schedule: Any, predicts: str = "eps", **defaults: Any) -> dict[str, Any]:
    return scheduler_config(fd.Denoiser(lambda x, t, c: x, schedule, predicts, defaults=defaults))


@pytest.mark.parametrize(
    "schedule",
    [
        *(fd.linear(), fd.linear(40, 1e-3, 0.03), fd.scaled_linear(), fd.cosine(300), fd.cosine(200, s=0.02)),
        *(fd.sigmoid(), fd.from_betas([0.1, 0.2, 0.15])),
        fd.schedule(lambda t: np.exp(-0.01 * (t + 1)), lambda t: np.sqrt(-np.expm1(-0.02 * (t + 1))), T=30),
    ],
    ids=lambda s: f"{s.name} {s.T}",
)
def test_schedules(schedule: Any, tmp_path: Path) -> None:
    save_diffusers(fd.Denoiser(UNet(**NET), schedule, "v"), tmp_path)
    t = np.arange(float(schedule.T))
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    bar = np.cumprod(1 - theirs.betas.double().numpy())
    # their betas are float32
    np.testing.assert_allclose(bar, schedule.alpha(t) ** 2, rtol=3e-5)
    back = fd.load(tmp_path)
    assert (back.schedule.T, back.predicts) == (schedule.T, "v")
    np.testing.assert_allclose(back.schedule.alpha(t), schedule.alpha(t), rtol=1e-12)
    np.testing.assert_allclose(back.schedule.sigma(t), schedule.sigma(t), rtol=1e-12)
    if schedule.name in ("linear", "scaled_linear", "cosine") and schedule.T != 200:
        assert back.schedule.spec == schedule.spec


DEFAULTS: list[tuple[str, dict[str, Any]]] = [
    ("eps", {"solver": "ddim", "spacing": "leading", "final": "first", "clip": 0.7, "steps_offset": 1}),
    ("v", {"solver": "ddim", "spacing": "linspace", "final": "zero", "clip": None}),
    ("eps", {"solver": "ddpm", "spacing": "leading", "clip": 1.0, "options": {"variance": "beta"}}),
    ("x0", {"solver": "ddpm", "spacing": "trailing", "clip": None, "options": {"variance": "beta_tilde"}}),
    ("eps+range", {"solver": "ddpm", "spacing": "leading", "clip": 2.0, "options": {"variance": "learned_range"}}),
    ("eps", {"solver": "dpmpp_2m", "spacing": "trailing"}),
    ("eps+range", {"solver": "dpmpp_2m", "spacing": "linspace"}),
    ("v", {"solver": "euler", "spacing": "trailing", "final": "first"}),
    ("eps", {"solver": "heun", "spacing": "linspace", "clip": 1.0}),
]


@pytest.mark.parametrize(("predicts", "defaults"), DEFAULTS, ids=str)
def test_defaults(predicts: str, defaults: dict[str, Any], tmp_path: Path) -> None:
    """Written, loaded and written again by diffusers, read: as they were."""
    net = UNet(**NET, learned_variance=predicts.endswith("+range"))
    save_diffusers(fd.Denoiser(net, fd.linear(), predicts, defaults=defaults | {"steps": 20}), tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe.scheduler).__name__.lower().startswith(defaults["solver"].replace("pp_2m", "solver"))
    for folder in (tmp_path, tmp_path / "again"):
        if folder != tmp_path:
            pipe.save_pretrained(folder)
        back = fd.load(folder)
        assert back.predicts == predicts
        assert {key: back.defaults.get(key) for key in defaults} == {
            key: value if key != "options" else back.defaults["options"] | value for key, value in defaults.items()
        }


def test_what_is_left_open(tmp_path: Path) -> None:
    assert said(fd.linear()) == {
        **{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"},
        **{"beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon", "timestep_spacing": "trailing"},
        **{"clip_sample": False, "set_alpha_to_one": True},
    }
    assert said(fd.linear(), "eps+range")["_class_name"] == "DDPMScheduler"


@pytest.mark.parametrize(
    ("schedule", "predicts", "defaults", "named"),
    [
        (fd.vp(), "eps", {}, "schedule='vp'"),
        (fd.edm(), "edm", {}, "predicts='edm'"),
        (fd.edm(), "eps", {}, "schedule='edm'"),
        (fd.linear(), "score", {}, "predicts='score'"),
        (fd.linear(), "flow+range", {}, r"predicts='flow\+range'"),
        (fd.linear(), "eps+range", {"solver": "ddim"}, r"predicts='eps\+range'"),
        (fd.linear(), "eps+range", {"solver": "ddpm", "options": {"variance": "beta"}}, "variance='beta'"),
        (fd.linear(), "eps", {"solver": "dpmpp_3m_sde"}, "solver='dpmpp_3m_sde'"),
        (fd.linear(), "eps", {"spacing": "karras"}, "spacing='karras'"),
        (fd.linear(), "eps", {"solver": "euler", "clip": 1.0}, "clip=1.0"),
        (fd.linear(), "eps", {"solver": "heun", "final": "first"}, "final='first'"),
        (fd.linear(), "eps", {"options": {"eta": 0.5}}, "eta=0.5"),
        (fd.linear(), "eps", {"clip": 1.0, "options": {"clipped_direction": True}}, "clipped_direction=True"),
        (fd.linear(), "eps", {"solver": "euler", "options": {"churn": 3}}, "churn=3"),
        (fd.linear(), "eps", {"denoise": True}, "denoise=True"),
        (
            fd.schedule(lambda t: 1 - (t + 1) / 9, lambda t: np.sqrt(1 - (1 - (t + 1) / 9) ** 2), T=9),
            "v",
            {},
            "schedule=",
        ),
    ],
    ids=str,
)
def test_what_a_scheduler_cannot_say(schedule: Any, predicts: str, defaults: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^diffusers: {named}.* is not supported; accepted: "):
        said(schedule, predicts, **defaults)


# ---- the folder


def test_only_what_a_file_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the network is a function"):
        save_diffusers(fd.Denoiser(lambda x, t, c: x, fd.linear()), tmp_path / "new")
    with pytest.raises(ValueError, match="a null condition of your own"):
        save_diffusers(fd.Denoiser(UNet(**NET), fd.linear(), null=3), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_else_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    den = fd.Denoiser(UNet(**NET), fd.linear())
    folder = tmp_path / "a" / "b"
    save_diffusers(den, folder)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == sorted(FILES)
    # the mode of the weights is that of any other new file
    assert len({(folder / name).stat().st_mode for name in FILES}) == 1
    before = (folder / FILES[2]).read_bytes()
    save_diffusers(den, folder, dtype=torch.float16)
    assert len((folder / FILES[2]).read_bytes()) < 0.6 * len(before)
    assert fd.load(folder).dtype == torch.float32
    # a crash while writing leaves the old one
    half = (folder / FILES[2]).read_bytes()
    monkeypatch.setattr("fastdiff.formats.diffusers.write.sync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        save_diffusers(den, folder)
    assert (folder / FILES[2]).read_bytes() == half
    assert [p.name for p in folder.parent.iterdir()] == ["b"]
    monkeypatch.setattr("fastdiff.formats.diffusers.write.sync", atomic.sync)
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").touch()
    with pytest.raises(ValueError, match=r"is no folder that this wrote, it holds vae/config\.json"):
        save_diffusers(den, folder)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        save_diffusers(den, tmp_path / "file")


# ---- fastdiff convert


def test_convert_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "digits", "--out", "theirs", "--to", "diffusers", "--null-label"]) == 0
    line = capsys.readouterr().out
    assert line == ('theirs: 0.40 M parameters in 1.6 MB, predicts v; DiffusionPipeline.from_pretrained("theirs")\n')
    pipe = diffusers.DDPMPipeline.from_pretrained("theirs")
    den = fd.load("digits")
    x, t, cond = draw(3, 1, 8, 8), torch.tensor([3, 700, 20]), torch.tensor([1, 9, 10])
    with torch.no_grad():
        assert far(pipe.unet(x, t, cond).sample, den.net(x, t, cond)) < 1e-5
    assert main(["convert", "theirs", "--out", "mine"]) == 0
    assert main(["convert", "mine", "--out", "half", "--dtype", "float16"]) == 0
    mine, half = fd.load("mine"), fd.load("half")
    assert mine.meta == {"name": "theirs", "shape": [1, 8, 8]}
    for a, b, c in zip(den.net.parameters(), mine.net.parameters(), half.net.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.half().float(), c)


def test_convert_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    (Path("mine") / "thesis.tex").touch()
    fd.save(fd.Denoiser(UNet(**NET, dims=1), fd.linear()), "line")
    for args, part in (
        ([], "SOURCE is missing"),
        (["digits"], "--out is missing"),
        (["digits", "--out", "mine"], "no checkpoint"),
        (["digits", "--out", "mine", "--to", "diffusers", "--overwrite"], "thesis.tex"),
        (["nobody", "--out", "new"], "no folder 'nobody'"),
        (["digits", "--out", "new", "--to", "diffusers"], "--null-label"),
        (["line", "--out", "new", "--to", "diffusers"], "dims=1"),
    ):
        assert main(["convert", *args]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("fastdiff convert: ")
        assert (part in err, err.count("\n"), out) == (True, 1, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["line", "mine"]
    for to in ("ours", "diffusers"):
        command = ["convert", "digits", "--out", to, "--to", to, "--null-label"]
        assert main(command) == 0
        before = json.loads(next(Path(to).rglob("config.json")).read_text())
        assert main(command) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert main([*command, "--overwrite", "--dtype", "float16"]) == 0
        assert to == "diffusers" or json.loads((Path(to) / "config.json").read_text())["files"] != before["files"]
