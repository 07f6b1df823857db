"""The report: it runs, checks before it times, computes what it says, and skips what is not installed with a reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        assert case["best_rival"] == min(case["ratio"].values())
        assert case["difference"] <= 2e-6
        assert any("diffusers" in name for name in case["skipped"])
    text = (tmp_path / "ops.md").read_text()
    assert "not there: No module named diffusers" in text
    assert text.count("### ") == len(record["cases"]) == 6


def test_variants_are_timed_in_turn():
    sys.path.append(str(ROOT))
    try:
        from benchmarks.timing import interleaved, ratio
    finally:
        sys.path.remove(str(ROOT))
    calls = []
    taken = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, floor=0)
    assert "".join(calls).endswith("abababab")
    assert [len(v) for v in taken.values()] == [4, 4]
    assert ratio({"x": [2.0, 4.0, 9.0], "y": [1.0, 4.0, 3.0]}, "x", "y") == 2.0


def test_no_gpu_is_a_sentence(tmp_path):
    import torch

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
