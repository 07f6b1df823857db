"""fd.load and fd.save: what goes out comes back, and what is broken is named."""

import json

import pytest
import torch

import fastdiff as fd
from fastdiff.formats.load import shipped


@pytest.fixture
def den():
    torch.manual_seed(0)
    net = fd.UNet(in_channels=1, channels=16, mults=(1, 2), blocks=1, classes=4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return fd.Denoiser(
        net, fd.cosine(T=100), "v", sigma_data=0.7, defaults={"clip": 1.0, "steps": 9}, meta={"shape": [1, 8, 8]}
    )


@pytest.mark.parametrize(
    "schedule",
    [
        fd.linear(T=50),
        fd.scaled_linear(),
        fd.cosine(T=None),
        fd.sigmoid(),
        fd.from_betas([0.1, 0.2]),
        fd.vp(),
        fd.edm(),
        fd.flow(),
    ],
    ids=lambda s: f"{s.name} {s.T}",
)
def test_round_trip(den, schedule, tmp_path):
    out = fd.Denoiser(den.net, schedule, "v", sigma_data=0.7, defaults=den.defaults, meta=den.meta)
    fd.save(out, tmp_path / "model")
    back = fd.load(tmp_path / "model")
    assert (back.predicts, back.sigma_data, back.defaults) == ("v", 0.7, den.defaults)
    assert back.meta == {"shape": [1, 8, 8], "name": "model"}
    assert back.schedule.spec == schedule.spec
    assert not back.net.training
    for (name, a), (other, b) in zip(den.net.state_dict().items(), back.net.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_the_same_images_come_out(den, tmp_path):
    fd.save(den, tmp_path / "model")
    args = {"cond": [1, 2], "guidance": fd.cfg(2.0), "seed": 3}
    a, b = (fd.sample(d, (2, 1, 8, 8), **args) for d in (den, fd.load(tmp_path / "model")))
    assert torch.equal(a, b)


def test_half_size_weights(den, tmp_path):
    fd.save(den, tmp_path / "model", dtype=torch.float16)
    back = fd.load(tmp_path / "model")
    assert next(back.net.parameters()).dtype == torch.float32
    for a, b in zip(den.net.parameters(), back.net.parameters(), strict=True):
        assert torch.equal(a.half().float(), b)


def test_what_cannot_be_saved(den, tmp_path):
    with pytest.raises(ValueError, match="the network is a"):
        fd.save(fd.Denoiser(lambda x, t, c: x, fd.cosine()), tmp_path / "model")
    with pytest.raises(ValueError, match="a null condition of your own"):
        fd.save(fd.Denoiser(den.net, den.schedule, "v", null=3), tmp_path / "model")
    mine = fd.schedule(lambda t: 1 - t, lambda t: t)
    with pytest.raises(ValueError, match="made of functions"):
        fd.save(fd.Denoiser(den.net, mine, "v"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_broken_folders(den, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        fd.load("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        fd.load(tmp_path / "empty")
    folder = tmp_path / "model"
    fd.save(den, folder)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-7])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        fd.load(folder)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        fd.load(folder)
    weights.write_bytes(good)
    fd.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["net"]["channels"] = 24
    config["sha256"] = "edited"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not hold a Denoiser"):
        fd.load(folder)


def test_the_shipped_model(tmp_path, monkeypatch):
    assert "digits" in shipped()
    # a folder of images of that name in the working directory does not stand in its way
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    den = fd.load("digits")
    assert den.meta["shape"] == [1, 8, 8]
    assert len(den.meta["classes"]) == 10
    assert sum(p.numel() * 4 for p in den.net.parameters()) <= 2 * 1024**2
