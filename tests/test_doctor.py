"""The doctor names every op and backend, and finds the other package that has our import name."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

import fastdiff as fd
from fastdiff.cli import main
from fastdiff.ops import dispatch
from tests.process import python


def installed(folder: Path, name: str, version: str, record: str = "") -> None:
    """A distribution's metadata in `folder`, as pip writes it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(record)


def test_every_op_on_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert {"group_norm_silu", "q_sample", "step_", "time_embed"} <= set(dispatch.ops())
    for op in dispatch.ops():
        told = {name: text for first, name, text in (line for line in lines if len(line) == 3) if first == op}
        assert told == {b: dispatch.state(op, b).removeprefix(f"{op} ") for b in dispatch.BACKENDS}
        assert told["reference"].startswith("runs")
        assert [text for text in told.values() if text.endswith("taken by auto")] == [
            told[next(b for b in dispatch.BACKENDS if told[b].startswith("runs") and "by name" not in told[b])]
        ]


def test_a_backend_by_name_only_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {op: dict(backends) for op, backends in dispatch._table.items()}
    table["q_sample"]["cuda"] = dispatch.Backend(print, lambda: None, lambda *_, **__: None, by_name="never run")
    monkeypatch.setattr(dispatch, "_table", table)
    assert dispatch.state("q_sample", "cuda") == "runs by name only; never run"
    assert dispatch.chosen("q_sample") != "cuda"
    with dispatch.backend("cuda"):
        assert dispatch.chosen("q_sample") == "cuda"
    table["q_sample"]["cuda"] = table["q_sample"]["cuda"]._replace(missing=lambda: "no GPU")
    assert dispatch.state("q_sample", "cuda") == "no GPU; never run"


def test_versions_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert fd.doctor() == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert told["fastdiff"].startswith(fd.__version__)
    assert told["torch"] == torch.__version__
    assert told["threads"].startswith(f"{torch.get_num_threads()} ")
    assert f"{os.cpu_count()} logical cores" in told["cpu"]
    assert {"python", "triton", "numpy", "C++", "nvcc", "OpenMP"} <= set(told)


def test_the_public_name_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert fd.doctor() == 0
    assert "step_" in capsys.readouterr().out


def test_the_compiled_part_is_there_where_it_must_be() -> None:
    if "FASTDIFF_REQUIRE_CPP" not in os.environ:
        pytest.skip("FASTDIFF_REQUIRE_CPP is not set")
    assert dispatch.reason("step_", "cpp") is None
    assert dispatch.reason("q_sample", "cpp") is None


def test_the_other_fastdiff_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(tmp_path, "fastdiff", "0.3.1")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["doctor"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("clash")
    assert "0.3.1" in last
    assert "pip uninstall -y fastdiff fastdiff-engine" in last


@pytest.mark.parametrize("overwritten", [False, True])
def test_an_overwritten_package_is_found(tmp_path: Path, overwritten: bool) -> None:
    ours = Path(fd.__file__)
    shutil.copytree(ours.parent, tmp_path / "fastdiff", ignore=shutil.ignore_patterns("__pycache__", "*.so", "models"))
    digest = base64.urlsafe_b64encode(hashlib.sha256(ours.read_bytes()).digest()).rstrip(b"=").decode()
    installed(tmp_path, "fastdiff-engine", "0.1.0", f"fastdiff/__init__.py,sha256={digest},\n")
    if overwritten:
        (tmp_path / "fastdiff" / "__init__.py").write_text("version = 'theirs'\n")
    done = python("-m", "fastdiff", "doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == int(overwritten), done.stderr
    assert ("has overwritten it" in done.stdout) == overwritten
    assert "step_            reference  runs" in done.stdout


def test_a_reader_that_has_enough_is_no_error() -> None:
    code = "import os, sys; os.close(0); r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r)\n"
    done = python("-c", code + "from fastdiff.cli import main; sys.exit(main(['doctor']))")
    assert (done.returncode, done.stderr) == (141, "")


def test_without_torch_it_still_speaks() -> None:
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
sys.meta_path.insert(0, Missing())
from fastdiff.cli import main
sys.exit(main(["doctor"]))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "torch cannot be imported" in done.stdout
    assert "pip install torch" in done.stdout


def test_a_reason_that_can_be_mended_comes_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {op: dict(backends) for op, backends in dispatch._table.items()}
    table["q_sample"]["cpp"] = dispatch.Backend(print, lambda: "not compiled", lambda *_: None)
    monkeypatch.setattr(dispatch, "_table", table)
    assert fd.doctor() == 0
    told = capsys.readouterr().out
    assert "q_sample         cpp        not compiled" in told
    assert "cpp         fix: install a C++ compiler" in told
