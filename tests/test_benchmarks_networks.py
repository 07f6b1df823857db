"""The report of networks and loops as it runs: what it measures, checks, leaves out and writes."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdiff.ops import dispatch
from tests.process import environment
from tests.sampling.recorder import FakeRecorder

ROOT = Path(__file__).resolve().parents[1]

needs_cpp = pytest.mark.skipif(dispatch.reason("step_", "cpp") is not None, reason="needs the C++ kernels")


@pytest.fixture(autouse=True)
def _path(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(ROOT))


def tiny():
    from benchmarks.models import SMALL

    unet = {"channels": 8, "mults": (1, 2), "blocks": 1, "groups": 4, "attention": (2,), "classes": 3}
    more = {"null_class": False, "learned_variance": True, "scale_shift": True, "resample_blocks": True}
    return SMALL._replace(name="tiny", size=8, unet=unet | more, diffusers=None)


def test_what_takes_too_long_is_ended():
    from benchmarks.rows import within

    with pytest.raises(TimeoutError, match="not ready after 0 s"), within(0.2):
        time.sleep(5)
    with within(1.0):
        pass
    time.sleep(1.2)


def run(section, monkeypatch, rows, backends=("cpp",), seconds=600.0, timing=0.1):
    from benchmarks import nets, networks

    monkeypatch.setattr(nets, "recorder_of", lambda device: FakeRecorder)
    task = networks.Task(section, "cpu", backends, seconds, smoke=True, plan=rows)
    monkeypatch.setattr(networks.Task, "timing", timing)
    # as long as a report of networks this small; files of a GPU report have the true one
    monkeypatch.setattr(networks, "copy_bandwidth", lambda *_, **__: 1e10)
    saved = []
    record = networks.report(task, {"device": "a CPU"}, lambda record: saved.append(json.dumps(record)))
    assert json.loads(saved[-1]) == json.loads(json.dumps(record))
    return record


@needs_cpp
@pytest.mark.parametrize("section", ["unet", "sampler"])
def test_a_report(section, monkeypatch):
    from benchmarks import markdown
    from benchmarks.budget import Row

    rows = [Row(tiny(), 5, detail=True), Row(tiny(), 1)]
    # on a CPU the reference looks at the row, which no graph can
    backends = ("cpp", "reference") if section == "unet" else ("cpp",)
    record = run(section, monkeypatch, rows, backends)
    assert [row["title"] for row in record["rows"]] == ["tiny, batch 5", "tiny, batch 1"]
    assert record["left_out"] == {}
    for row, batch in zip(record["rows"], (5, 1), strict=True):
        found = row["variants"]
        assert set(row["absent"]) == {"diffusers"}
        way = "CUDA graph" if section == "unet" else "fd.graph"
        ours = {f"{net} ({backend}), {way}" for net in ("fd.UNet", "prepared") for backend in backends}
        assert {*ours, "plain torch, eager, NCHW"} < set(found)
        rivals = {name for name in found if not found[name]["ours"]}
        assert row["against"] == min(rivals, key=lambda name: found[name]["median"])
        for variant in found.values():
            assert variant["median"] == statistics.median(variant["seconds"])
            assert variant["image_steps"] == batch / variant["median"]
            assert variant["flops"] == pytest.approx(row["flop"] * variant["image_steps"])
            pairs = zip(found[row["against"]]["seconds"], variant["seconds"], strict=True)
            assert variant["faster"] == statistics.median(a / b for a, b in pairs)
            assert variant["error"] <= 1e-5
        assert found[f"prepared (cpp), {way}"]["graph_bytes"] == FakeRecorder.size
    outside = record["rows"][0]["outside"]
    assert (outside["ours"]["share"] < 1) if section == "sampler" else (outside == {})
    text = markdown.text(record)
    assert text.count("### ") == 2
    assert "Not compared with TensorRT" in text


@needs_cpp
# the compiler's own, at its first import
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_variant_that_is_wrong_or_fails_costs_itself(monkeypatch):
    from benchmarks import variants
    from benchmarks.budget import Row

    call, compiler = variants._call, torch.compile

    def wrong(setting, *, backend, **given):
        ready = call(setting, backend=backend, **given)
        return ready._replace(run=lambda steps: 1.01 * ready.run(steps)) if backend == "reference" else ready

    def fails(f, **given):
        if "mode" in given:
            raise MemoryError("no room\nfor this")
        return compiler(f, backend="eager", **given)

    monkeypatch.setattr(variants, "_call", wrong)
    monkeypatch.setattr(torch, "compile", fails)
    row = Row(tiny(), 2, ("torch.compile", "torch.compile max-autotune"))
    (found,) = run("unet", monkeypatch, [row], backends=("cpp", "reference"))["rows"]
    assert found["absent"]["plain torch, torch.compile max-autotune"] == "MemoryError: no room"
    assert found["absent"]["fd.UNet (reference), CUDA graph"].startswith("AssertionError: wrong: error 1.0e-02 against")
    assert {"plain torch, torch.compile", "fd.UNet (cpp), CUDA graph"} < set(found["variants"])


@needs_cpp
def test_what_does_not_fit_is_said(monkeypatch):
    from benchmarks.budget import Cold, Row
    from benchmarks.variants import OURS

    rows = [Row(tiny(), 2, ("torch.compile", OURS)), Row(tiny()._replace(weight=100.0), 1), Cold(tiny(), "ours")]
    record = run("sampler", monkeypatch, rows, seconds=40.0, timing=0.3)
    (row,) = record["rows"]
    late = {name for name, why in row["absent"].items() if why == "left out: time"}
    # what rests upon something left out is left out with it
    ways = ("fd.compiled", "fd.graph(step=fd.compiled)")
    ours = {f"{net} (cpp), {way}" for net in ("fd.UNet", "prepared") for way in ways}
    assert late == {*ours, "plain torch, torch.compile"}
    assert record["left_out"] == {"tiny, batch 1": "left out: time"}
    assert record["cold"] == {"tiny, cold start, ours": "left out: time"}


def test_a_lost_device_ends_the_report(monkeypatch):
    from benchmarks import networks
    from benchmarks.budget import Row
    from benchmarks.rows import DeviceLost

    def lost(*_, **__):
        raise DeviceLost("an illegal memory access")

    monkeypatch.setattr(networks, "measure", lost)
    record = run("unet", monkeypatch, [Row(tiny(), 2), Row(tiny(), 1)])
    assert record["rows"] == []
    assert record["left_out"] == {"tiny, batch 2": "the device was lost: an illegal memory access"}


@needs_cpp
def test_tactics_are_taken_away_one_by_one(monkeypatch):
    from benchmarks import nets
    from benchmarks.budget import Row

    (row,) = run("unet", monkeypatch, [Row(tiny(), 2, ablation=True)])["rows"]
    # what is lossy is not among them
    on = [name for name, value in nets.DEVICE._asdict().items() if value]
    assert list(row["variants"]) == ["prepared", *(f"prepared without {name}" for name in on)]
    assert "fp8" not in on
    assert row["against"] == "prepared"
    assert row["variants"]["prepared"]["faster"] == 1.0


def test_memory_and_kernels_of_a_gpu(monkeypatch):
    from benchmarks import probes
    from benchmarks.variants import Ready

    now, high, log = 100, 0, []

    def take(steps):
        nonlocal high
        high = now + 30
        log.extend([True] * (7 + 3 * steps))
        return torch.zeros(1)

    fakes = {
        "synchronize": lambda: None,
        "empty_cache": lambda: log.append("emptied"),
        "memory_allocated": lambda: now,
        "memory_reserved": lambda: 4096,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: high,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            log.clear()
            return self

        def __exit__(self, *_):
            device = torch.autograd.DeviceType
            self.kept = [SimpleNamespace(device_type=kind) for kind in [device.CUDA] * len(log) + [device.CPU] * 9]

        def events(self):
            return self.kept

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert probes.peak("cuda", lambda: take(1)) == 30
    assert probes.held("cuda") == 4096
    assert probes.kernels("cuda", Ready(take)) == 3.0
    probes.settle("cuda")
    assert log[-1] == "emptied"


def test_the_first_image_of_a_new_process():
    from benchmarks import cold

    parts = cold.measure("ours", "small 32x32", "cpu", "auto", timeout=120)
    order = [parts[name] for name in ("imported", "network", "first image", "second image")]
    assert order == sorted(order)
    with pytest.raises(RuntimeError, match="KeyError: 'no such model'"):
        cold.measure("ours", "no such model", "cpu", "auto", timeout=120)
    with pytest.raises(RuntimeError, match="no result after 0 seconds"):
        cold.measure("ours", "small 32x32", "cpu", "auto", timeout=0.01)


def command(*args, **variables):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "run.py"), *args],
        env=os.environ | environment(OMP_NUM_THREADS="1", **variables),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("section", [pytest.param("unet", marks=pytest.mark.slow), "sampler"])
def test_a_quick_report_on_a_cpu(section, tmp_path, monkeypatch):
    from benchmarks import run

    args = [section, "--device", "cpu", "--quick", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run.py", *args])
    assert run.main() == 0
    record = json.loads((tmp_path / f"{section}.json").read_text())
    assert {"unet": 2, "sampler": 6}[section] == len(record["cases"])
    assert all(case["difference"] <= 1e-4 for case in record["cases"])


def test_only_what_there_is(tmp_path, monkeypatch, capsys):
    from benchmarks import run

    args = ["ops", "--quick", "--rounds", "1", "--only", "no such case", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run.py", *args])
    assert run.main() == 2
    said = capsys.readouterr().err
    assert "--only 'no such case': no case of ops has it in its title; there are: q_sample (" in said
    assert not list(tmp_path.iterdir())


def test_files_of_a_gpu_report(tmp_path, monkeypatch):
    from benchmarks import nets, networks, run

    monkeypatch.setattr(nets, "recorder_of", lambda device: FakeRecorder)
    monkeypatch.setattr(networks.Task, "timing", 0.1)
    args = run.parsed(["unet", "--quick", "--only", "batch 1"])
    run.on_gpu("unet", args, tmp_path)
    run.on_gpu("unet", run.parsed(["unet", "--quick", "--only", "batch 4"]), tmp_path)
    record = json.loads((tmp_path / "unet.json").read_text())
    assert [row["title"] for row in record["rows"]] == ["small 32x32, batch 1", "small 32x32, batch 4"]
    assert (tmp_path / "unet.md").read_text().count("### small 32x32") == 2
    with pytest.raises(run.NothingFound, match="there are: DDPM-CIFAR10, batch 256; DDPM-CIFAR10, batch 1;"):
        run.on_gpu("unet", run.parsed(["unet", "--only", "no such row"]), tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, torch sees none here")
@pytest.mark.parametrize("section", ["unet", "sampler"])
def test_a_short_report_on_a_gpu(section, tmp_path):
    args = ("--device", "cuda", "--smoke", "--budget", "75", "--only", "DDPM-CIFAR10, batch 256")
    done = command(section, *args, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"{section}.json").read_text())
    row = record["rows"][0]
    assert any(v["ours"] for v in row["variants"].values()), row["absent"]
    assert any(not v["ours"] for v in row["variants"].values()), row["absent"]
    wrong = {name: why for name, why in row["absent"].items() if "left out: time" not in why and name != "diffusers"}
    assert not wrong
    counted = [kernels for kernels in row["kernels"].values() if kernels != "left out: time"]
    assert counted
    assert min(counted) > 0
    assert max(v["graph_bytes"] for v in row["variants"].values()) > 0
    assert all(v["call_bytes"] > 0 for name, v in row["variants"].items() if "eager" in name)


@needs_cpp
@pytest.mark.parametrize("features", [False, True])
def test_a_row_of_a_network_with_a_context(features, monkeypatch):
    """Stable Diffusion's and SDXL's as a GPU's report has them: diffusers' live class is the rival."""
    from benchmarks.budget import Row
    from benchmarks.models import SD_SMALL, _latent

    more = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12} if features else {}
    model = _latent("with a context", 8, {**SD_SMALL.diffusers, **more})
    record = run("unet", monkeypatch, [Row(model, 2)])
    assert record["left_out"] == {}
    (row,) = record["rows"]
    assert row["absent"] == {}
    assert any("diffusers" in name for name in row["variants"])
