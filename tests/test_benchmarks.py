"""The report: it runs, checks before it times, computes what it says, and skips what is not installed with a reason."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.process import environment

ROOT = Path(__file__).resolve().parents[1]

WITHOUT = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "tyro"):
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Block())
sys.argv = ["run.py", *sys.argv[1:]]
sys.path.insert(0, {folder!r})
runpy.run_path({run!r}, run_name="__main__")
"""


def test_the_report_runs_without_diffusers_and_tyro(tmp_path):
    code = WITHOUT.format(folder=str(ROOT / "benchmarks"), run=str(ROOT / "benchmarks" / "run.py"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "ops", "--quick", "--rounds", "3", "--threads", "1", "--out", str(tmp_path)],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "ops.json").read_text())
    assert record["machine"]["threads"] == 1
    for case in record["cases"]:
        ours = case["ours"]
        rounds = case["seconds"]
        assert all(len(v) == 3 and min(v) > 0 for v in rounds.values())
        for name, ratio in case["ratio"].items():
            pairs = sorted(a / b for a, b in zip(rounds[name], rounds[ours], strict=True))
            assert ratio == pairs[1]
        assert case["best_rival"] == min(r for name, r in case["ratio"].items() if name not in case["also"])
        if case["title"].startswith(("q_sample", "step_")):
            assert case["difference"] <= 2e-6
            assert any("diffusers" in name for name in case["skipped"])
    text = (tmp_path / "ops.md").read_text()
    assert "not there: No module named diffusers" in text
    assert text.count("### ") == len(record["cases"])
    measured = {case["title"].split()[0] for case in record["cases"]}
    assert measured == {"q_sample", "step_", "time_embed", "group_norm_silu", "norm_silu_conv"}


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.timing

    return benchmarks.timing


@pytest.fixture
def together(timing):
    from benchmarks.case import together

    return together


def test_variants_are_timed_in_turn(timing):
    calls = []
    variants = {"a": lambda: calls.append("a"), "b": [lambda: calls.append("b"), lambda: calls.append("c")]}
    taken = timing.interleaved(variants, rounds=4, floor=0)
    assert "".join(calls).endswith("abababab")
    assert "bcbc" in "".join(calls)
    assert [len(v) for v in taken.values()] == [4, 4]
    assert timing.ratio({"x": [2.0, 4.0, 9.0], "y": [1.0, 4.0, 3.0]}, "x", "y") == 2.0


class Device:
    """Stands for a GPU: a call takes the milliseconds it says, also when a graph replays it."""

    def __init__(self, monkeypatch):
        self.now, self.captured, self.mode, self.log = 0.0, None, 0, []
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            calls = ()

            def replay(self):
                for call in self.calls:
                    call()

        @contextlib.contextmanager
        def graph(made):
            device.captured = []
            yield
            made.calls, device.captured = device.captured, None

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "synchronize": lambda: None,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50 << 20),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, name, milliseconds, waits=False):
        def run():
            if waits and self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.captured is not None:
                self.captured.append(run)
                return
            self.now += milliseconds
            self.log.append(name)

        return run


def test_a_gpu_replays_graphs_that_go_round_the_buffers(timing, monkeypatch):
    device = Device(monkeypatch)
    variants = {
        "round": [device.call(str(i), 2.0) for i in range(3)],
        "one": device.call("x", 0.5),
        "waits": device.call("w", 4.0, waits=True),
    }
    taken = timing.interleaved(variants, rounds=5, floor=0, device="cuda", graphs=True)
    assert {name: set(v) for name, v in taken.items()} == {"round": {2e-3}, "one": {5e-4}, "waits": {4e-3}}
    # what waits for the device is called once a round, the others come from graphs of 21 and 20 launches
    assert "".join(device.log).endswith(("012" * 7 + "x" * 20 + "w") * 5)
    assert device.mode == 0

    device.log.clear()
    timing.interleaved(variants, rounds=5, floor=0, device="cuda")
    assert "".join(device.log).endswith("0xw" * 5)
    # 12 ms hold two graphs of four launches of 0.5 ms each, rounded up
    monkeypatch.setattr(timing, "LAUNCHES", 4)
    device.log.clear()
    timing.interleaved({"one": variants["one"]}, rounds=1, floor=3.1e-3, device="cuda", graphs=True)
    assert len(device.log) == 2 + 1 + 4 + 8


def test_rows_larger_than_the_cache_get_four_times_as_much(timing, monkeypatch):
    Device(monkeypatch)
    megabytes = [1, 50, 51, 199, 200, 800]
    assert [timing.buffers("cuda:0", m << 20) for m in megabytes] == [1, 1, 4, 2, 1, 1]
    assert timing.buffers("cpu", 1 << 30) == 1


def case_of(name, backend, worst):
    from benchmarks.case import Case

    return Case(name, f"ours ({backend})", {f"ours ({backend})": print, "rival": len}, lambda: worst)


def test_backends_are_variants_of_one_case(together):
    def cases(backend, worst):
        yield case_of("first", backend, worst)
        if backend == "cuda":
            raise dispatch.BackendUnavailable("no second one")
        yield case_of("second", backend, None)

    from fastdiff.ops import dispatch

    first, second = together({"triton": cases("triton", 1e-7), "cuda": cases("cuda", 3e-7)})
    assert list(first.variants) == ["ours (triton)", "rival", "ours (cuda)"]
    assert (first.ours, first.also, first.check()) == ("ours (triton)", ("ours (cuda)",), 3e-7)
    assert (second.title, second.also, second.check()) == ("second", (), None)


def test_other_kernels_of_ours_are_no_rivals(timing):
    from benchmarks import run

    case = case_of("x", "triton", 1e-7)._replace(
        variants={"ours (triton)": lambda: sum(range(9000)), "ours (cuda)": int, "rival": lambda: sum(range(90000))},
        also=("ours (cuda)",),
        bytes_moved=1 << 28,
    )
    result = run.measure(case, 3, "cpu", graphs=False)
    assert result["best_rival"] == result["ratio"]["rival"] > 1 > result["ratio"]["ours (cuda)"]
    result["median"] = {"ours (triton)": 1e-3, "ours (cuda)": 2e-3, "rival": 4e-3}
    text = run.lines(result, copy=2**39)
    assert "| **ours (triton)** | **1000.0 us** | 268.4 GB/s, 49 % of copy |" in text
    assert f"| ours (cuda) | 2000.0 us | {result['ratio']['ours (cuda)']:.2f}x, 134.2 GB/s, 24 % of copy |" in text
    assert f"| rival | 4000.0 us | {result['ratio']['rival']:.2f}x |" in text


def test_no_gpu_is_a_sentence(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "run.py"), "ops", "--device", "cuda", "--out", str(tmp_path)],
        env=os.environ | environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "torch sees no GPU here" in done.stderr
    assert "Traceback" not in done.stderr
