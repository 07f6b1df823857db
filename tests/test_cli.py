"""The command line as its user meets it: what it writes, what it says of a mistake, what it costs to start."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.cli import COMMANDS, main, train as cli_train
from fastdiff.files.images import read_meta, to_uint8
from fastdiff.nn import PreparedUNet, own
from fastdiff.ops import native
from tests.process import python

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with ten named classes and random weights, in a checkpoint folder."""
    torch.manual_seed(0)
    net = fd.UNet(in_channels=1, channels=8, mults=(1,), blocks=1, attention=(), middle=False, classes=10)
    torch.nn.init.normal_(net.out.weight, std=0.1)
    meta = {"name": "tiny", "shape": list(SHAPE), "classes": [f"class {i}" for i in range(10)]}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    fd.save(fd.Denoiser(net, fd.cosine(), predicts="v", defaults={"clip": 1.0}, meta=meta), folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without classes."""
    torch.manual_seed(1)
    net = fd.UNet(in_channels=1, channels=8, mults=(1,), blocks=1, attention=(), middle=False)
    folder = tmp_path_factory.mktemp("models") / "plain"
    fd.save(fd.Denoiser(net, fd.linear(), predicts="eps", meta={"shape": list(SHAPE)}), folder)
    return folder


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTDIFF_TRACEBACK", raising=False)
    monkeypatch.delenv("FASTDIFF_BACKEND", raising=False)
    # networks this small are slower on two threads, much slower on a busy machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sample(model: Path, *args: str) -> int:
    return main(["sample", "--model", str(model), "--steps", "4", "--no-progress", "--device", "cpu", *args])


def refused(capsys: pytest.CaptureFixture[str], code: int, command: str, *said: str) -> str:
    """Exit code 2 and one sentence on stderr, in which all of `said` appears; nothing on stdout."""
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith(f"fastdiff {command}: ")
    assert err.count("\n") == 1
    for part in said:
        assert part in err
    return err


def files() -> list[str]:
    return sorted(str(p) for p in Path().rglob("*"))


# ---- start


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"], ["--version"], ["nonsense"], ["sample", "--help"]])
def test_help_imports_neither_torch_nor_numpy(args: list[str]) -> None:
    allowed = "tyro" if args[:1] == ["sample"] else "nothing"
    code = (
        "import sys\nfrom fastdiff.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"heavy = [m for m in ('torch', 'numpy', 'tyro', 'tqdm', 'PIL') if m in sys.modules and m != {allowed!r}]\n"
        "print('HEAVY', heavy)"
    )
    done = python("-c", code, *args)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout + done.stderr


def test_help_is_there_in_a_third_of_a_second() -> None:
    best = 9.0
    for _ in range(5):
        start = time.perf_counter()
        done = python("-m", "fastdiff", "--help")
        best = min(best, time.perf_counter() - start)
        assert done.returncode == 0
    assert best <= 0.3


def test_top_level(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["-h"]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(text.count(f"\n  {name} ") == 3 for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdiff {fd.__version__}\n"
    assert main(["smaple"]) == 2
    assert "'smaple'" in (err := capsys.readouterr().err)
    assert ", ".join(COMMANDS) in err


def test_python_m_is_the_command() -> None:
    done = python("-m", "fastdiff", "--version")
    assert (done.returncode, done.stdout) == (0, f"fastdiff {fd.__version__}\n")
    assert python("-m", "fastdiff", "smaple").returncode == 2


def test_sample_help_names_every_option() -> None:
    done = python("-m", "fastdiff", "sample", "--help", COLUMNS="200")
    names = "model out n class solver steps spacing eta guidance clip seed batch device dtype backend run progress"
    assert all(f"--{name} " in done.stdout or f"--{name}," in done.stdout for name in names.split())
    assert "--no-progress" in done.stdout
    assert "2.0 for a model with classes" in done.stdout


def test_option_errors_of_the_parser_exit_with_2() -> None:
    done = python("-m", "fastdiff", "sample", "--dtype", "float8")
    assert done.returncode == 2
    assert "bfloat16" in done.stderr
    assert "Traceback" not in done.stderr


# ---- sample


def test_grid_holds_what_sample_gives(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    assert sample(model, "--n", "20", "--seed", "5") == 0
    den = fd.load(model)
    x = fd.sample(den, (20, *SHAPE), steps=4, seed=5, cond=torch.arange(20) % 10, guidance=fd.cfg(2.0))
    u = to_uint8(x).numpy()
    with Image.open("samples.png") as image:
        grid = np.asarray(image)
    # ten columns, two rows, each image enlarged 8 times with 2 pixels between
    assert grid.shape == (2 * 66 + 2, 10 * 66 + 2)
    for i in range(20):
        top, left = 2 + 66 * (i // 10), 2 + 66 * (i % 10)
        assert np.abs(grid[top : top + 64 : 8, left : left + 64 : 8].astype(int) - u[i, 0]).max() <= 1
    meta = read_meta("samples.png")
    assert (meta["model"], meta["seed"], meta["solver"], meta["steps"], meta["guidance"]) == ("tiny", 5, "ddim", 4, 2.0)
    assert meta["fastdiff"] == fd.__version__
    assert meta["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for part in ("samples.png: 20 images", "images/s", "ddim, 4 steps", "step_ on "):
        assert part in said


def test_folder_and_npz_hold_the_same_images(model: Path) -> None:
    from PIL import Image

    assert sample(model, "--n", "5", "--class", "3,class 7", "--out", "folder") == 0
    assert sample(model, "--n", "5", "--class", "3,class 7", "--out", "a.npz") == 0
    with np.load("a.npz") as stored:
        images, labels = stored["arr_0"], stored["labels"]
    assert images.dtype == np.uint8
    assert images.shape == (5, 8, 8, 1)
    assert labels.tolist() == [3, 7, 3, 7, 3]
    for i, path in enumerate(sorted(Path("folder").iterdir())):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), images[i, :, :, 0])
        assert (read_meta(path)["index"], read_meta(path)["label"]) == (i, labels[i])


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "dpmpp_3m_sde"])
def test_any_batch_gives_the_same_images(model: Path, solver: str) -> None:
    for batch in ("1", "3", "64"):
        assert sample(model, "--n", "7", "--solver", solver, "--batch", batch, "--out", f"{batch}.npz") == 0
    one, three, all_ = (np.load(f"{b}.npz")["arr_0"].astype(int) for b in (1, 3, 64))
    assert np.abs(one - all_).max() <= 1
    assert np.abs(three - all_).max() <= 1
    assert np.abs(all_[1:] - all_[:-1]).max() > 50


def test_options_reach_the_sampler(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(fast: fd.Sampler, solver: object = None, **options: object) -> torch.Tensor:
        seen.update(options, solver=solver, run=fast.run, backend=fd.ops.dispatch.asked(), dtype=fast.den.dtype)
        return torch.zeros(*options["shape"])  # type: ignore[misc]

    monkeypatch.setattr(fd.Sampler, "__call__", spy)
    chosen = "--n 3 --class 4 --solver ddim --eta 0.5 --spacing leading --clip 2 --seed 9 --guidance 3 --run eager"
    assert sample(model, *chosen.split(), "--dtype", "bfloat16", "--backend", "reference", "--out", "a.npz") == 0
    assert seen["shape"] == (3, *SHAPE)
    assert (seen["solver"], seen["steps"], seen["spacing"], seen["eta"]) == ("ddim", 4, "leading", 0.5)
    assert (seen["clip"], seen["seed"], seen["guidance"].w, seen["run"]) == (2.0, 9, 3.0, fd.eager)
    assert seen["cond"].tolist() == [4, 4, 4]
    assert seen["index"].tolist() == [0, 1, 2]
    assert (seen["backend"], seen["dtype"]) == ("reference", torch.bfloat16)


def test_a_model_without_classes(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(plain, "--n", "3", "--out", "a.npz") == 0
    capsys.readouterr()
    x = fd.sample(fd.load(plain), (3, *SHAPE), steps=4)
    with np.load("a.npz") as stored:
        assert list(stored) == ["arr_0"]
        assert np.abs(stored["arr_0"].transpose(0, 3, 1, 2).astype(int) - to_uint8(x).numpy()).max() <= 1
    refused(capsys, sample(plain, "--class", "3"), "sample", "--class 3", "without classes")
    refused(capsys, sample(plain, "--guidance", "3"), "sample", "--guidance 3", "no classes")


def test_the_default_is_ten_columns_of_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--no-progress"]) == 0
    meta = read_meta("samples.png")
    assert meta["label"] == [i % 10 for i in range(64)]
    assert meta["guidance"] == 2.0
    assert "samples.png: 64 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "winograd"),
    [([], True), (["--exact"], False), (["--dtype", "bfloat16"], None), (["--backend", "reference"], None)],
)
def test_a_cpu_samples_from_a_prepared_network(
    model: Path, args: list[str], winograd: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With convolutions of our own unless they are to be exact; winograd=None: with the network as it is."""
    seen: list[fd.Denoiser] = []
    call = fd.Sampler.__call__

    def spy(fast: fd.Sampler, *given: object, **options: object) -> torch.Tensor:
        seen.append(fast.den)
        return call(fast, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fd.Sampler, "__call__", spy)
    assert sample(model, "--n", "2", "--steps", "2", "--out", "a.npz", *args) == 0
    (den,) = seen
    assert type(den.net) is (fd.UNet if winograd is None else PreparedUNet)
    assert own.has(getattr(den.net, "net", den.net)) == (bool(winograd) and native.missing() is None)


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--solver", "dimm"], ["--solver 'dimm'", "ddim", "ddpm", "euler", "heun", "dpmpp_2m", "dpmpp_3m_sde"]),
        (["--class", "12"], ["--class '12'", "0 to 9", "class 3"]),
        (["--class", "3,horse"], ["--class 'horse'", "0 to 9"]),
        (["--class", "3,,4"], ["--class ''"]),
        (["--steps", "-3"], ["--steps -3", "1 or more"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--n", "-1"], ["--n -1", "1 or more"]),
        (["--n", "0"], ["--n 0"]),
        (["--batch", "-2"], ["--batch -2"]),
        (["--batch", "0"], ["--batch 0"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--eta", "-0.5"], ["--eta -0.5"]),
        (["--eta", "nan"], ["--eta nan"]),
        (["--clip", "-1"], ["--clip -1"]),
        (["--guidance", "nan"], ["--guidance nan"]),
        (["--spacing", "wide"], ["wide", "trailing"]),
        (["--solver", "dpmpp_2m", "--eta", "0.5"], ["eta"]),
        (["--device", "tpu"], ["--device 'tpu'", "cpu, cuda"]),
        (["--device", "cuda:99"], ["--device cuda:99", "CUDA"]),
        (["--out", "a.jpg"], ["a.jpg", ".png"]),
        (["--out", "missing/a.png"], ["missing", "does not exist"]),
        (["--out", "/proc/a.png"], ["/proc", "cannot write"]),
        (["--model", "nobody"], ["'nobody'", "digits"]),
    ],
)
def test_a_mistake_is_one_sentence(
    model: Path, args: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, sample(model, *args), "sample", *said)
    assert files() == []


def test_the_output_is_checked_before_the_work(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fd, "sample", lambda *_, **__: pytest.fail("sampled before the output was checked"))
    refused(capsys, sample(model, "--out", "missing/a.png"), "sample", "missing")
    Path("file").write_text("mine")
    refused(capsys, sample(model, "--out", "file"), "sample", "file is a file")
    assert Path("file").read_text() == "mine"


def test_a_damaged_checkpoint_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (model / "model.safetensors").read_bytes()
    config = (model / "config.json").read_bytes()
    for name, weights in (("cut", whole[:-100]), ("flipped", whole[:-1] + bytes([whole[-1] ^ 1]))):
        Path(name).mkdir()
        (Path(name) / "config.json").write_bytes(config)
        (Path(name) / "model.safetensors").write_bytes(weights)
        refused(capsys, sample(Path(name)), "sample", name, "model.safetensors")
    Path("empty").mkdir()
    refused(capsys, sample(Path("empty")), "sample", "empty", "config.json")
    assert not Path("samples.png").exists()


def test_nan_in_the_network_names_image_row_and_time(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    den = fd.load(model)
    with torch.no_grad():
        den.net.out.bias.fill_(float("nan"))
    fd.save(den, "broken")
    err = refused(capsys, sample(Path("broken"), "--n", "3"), "sample", "image 0", "row 0", "t = 999")
    assert "4 of" not in err
    assert not Path("samples.png").exists()


def test_a_backend_that_cannot_run_says_why(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, sample(model, "--backend", "cuda"), "sample", "cuda", "doctor")
    assert files() == []


def test_the_traceback_is_there_for_developers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="dimm"):
        sample(model, "--solver", "dimm")


def test_our_own_mistakes_are_not_hidden(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(fd, "load", broken)
    with pytest.raises(AssertionError, match="ours"):
        sample(model)


def test_interrupted(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fd.Sampler, "__call__", interrupted)
    assert sample(model) == 130
    assert capsys.readouterr().err.strip() == "fastdiff sample: interrupted"
    assert files() == []


# ---- train

TINY = ["--channels", "8", "--mults", "1", "--blocks", "1", "--batch", "32", "--no-progress", "--device", "cpu"]


def train(*args: str) -> int:
    return main(["train", *TINY, *args])


def test_train_learns_and_writes_a_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, averaged = fd.fit, []

    def spy(*args: object, **options: object) -> Iterator[object]:
        for step in fit(*args, **options):
            averaged[:] = [step.ema]
            yield step

    monkeypatch.setattr(fd, "fit", spy)
    monkeypatch.setattr(cli_train, "LOG_EVERY", 20)
    assert train("--out", "run/digits", "--steps", "70", "--seed", "3", "--lr", "0.01") == 0
    said = capsys.readouterr().out
    assert "run/digits: 70 steps" in said
    log = [json.loads(line) for line in Path("run/digits/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [20, 40, 60, 70]
    # the loss of a network that gives 0 is E v^2, about 0.9
    assert log[-1]["loss"] < 0.75 * log[0]["loss"]
    den = fd.load("run/digits")
    assert (den.meta["shape"], len(den.meta["classes"]), den.predicts) == ([1, 8, 8], 10, "v")
    written = den.net.state_dict()
    assert all(torch.equal(written[name], value) for name, value in averaged[0].net.state_dict().items())
    assert Path("run/digits/samples.png").stat().st_size > 1000
    assert sample(Path("run/digits"), "--n", "2", "--class", "9") == 0
    assert read_meta("samples.png")["model"] == "digits"


def test_train_replaces_nothing_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--out", "run", "--steps", "2") == 0
    before = (Path("run") / "config.json").read_bytes()
    capsys.readouterr()
    refused(capsys, train("--out", "run", "--steps", "2", "--seed", "1"), "train", "run", "--overwrite")
    assert (Path("run") / "config.json").read_bytes() == before
    assert train("--out", "run", "--steps", "2", "--seed", "1", "--overwrite") == 0
    assert (Path("run") / "config.json").read_bytes() != before
    Path("mine").mkdir()
    (Path("mine") / "thesis.tex").write_text("mine")
    capsys.readouterr()
    for args in ([], ["--overwrite"]):
        refused(capsys, train("--out", "mine", "--steps", "2", *args), "train", "mine", "no checkpoint")
    assert [p.name for p in Path("mine").iterdir()] == ["thesis.tex"]


def test_train_without_labels(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--no-labels --schedule linear --predicts eps --steps 2 --out run"
    assert train(*options.split()) == 0
    den = fd.load("run")
    assert (den.schedule.name, den.predicts, den.meta["classes"], den.net.config["classes"]) == (
        "linear",
        "eps",
        [],
        None,
    )
    capsys.readouterr()
    refused(capsys, sample(Path("run"), "--class", "1"), "sample", "without classes")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], ["--out is missing"]),
        (["--out", "run", "--steps", "0"], ["--steps 0"]),
        (["--out", "run", "--batch", "-1"], ["--batch -1"]),
        (["--out", "run", "--lr", "-1"], ["lr=-1"]),
        (["--out", "run", "--ema", "2"], ["ema=2"]),
        (["--out", "run", "--drop", "2"], ["drop=2"]),
        (["--out", "run", "--mults", "1,x"], ["--mults '1,x'"]),
        (["--out", "run", "--mults", "1,1,1,1,1"], ["--mults", "8x8", "16"]),
        (["--out", "run", "--data", "nothing-there"], ["nothing-there"]),
        (["--out", "run", "--device", "cuda:99"], ["cuda:99"]),
        (["--out", "/proc/run"], ["/proc"]),
    ],
)
def test_mistakes_in_training(args: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, train(*args), "train", *said)
    assert files() == []


def test_a_broken_image_is_named_or_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (Path("pets") / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(Path("pets") / name / f"{i}.png")
    bad = Path("pets") / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    options = ["--data", "pets", "--out", "run", "--steps", "2"]
    refused(capsys, train(*options), "train", "1.png", "skip")
    assert not Path("run").exists()
    assert train(*options, "--broken", "skip") == 0
    assert "1.png" in capsys.readouterr().err
    assert fd.load("run").meta["classes"] == ["cat", "dog"]


def test_a_loss_that_diverges_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def diverging(den: fd.Denoiser, *_: object, **__: object) -> object:
        from fastdiff.training.fit import Step

        return (Step(i, torch.tensor(float("nan")), den) for i in range(60))

    monkeypatch.setattr(fd, "fit", diverging)
    refused(capsys, train("--out", "run", "--steps", "60"), "train", "step 49", "--lr")
    assert files() == []
