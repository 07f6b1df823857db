"""Checkpoints: what is written comes back bit for bit, damage is found, a crash leaves the old or the new one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.files import atomic, checkpoint
from fastdiff.files.checkpoint import read_folder, write_folder
from tests.process import environment

CONFIG = {"predicts": "v", "net": {"channels": 8, "mults": [1, 2]}, "beta": 1e-05, "note": "häh", "none": None}


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model": {"a.weight": torch.randn(3, 5, generator=g), "b": torch.randn(7, generator=g).bfloat16()},
        "ema": {"a.weight": torch.randn(3, 5, generator=g), "step": torch.tensor(seed)},
    }


def assert_same(found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    assert {k: set(v) for k, v in found.items()} == {k: set(v) for k, v in expected.items()}
    for stem, named in expected.items():
        for name, tensor in named.items():
            assert found[stem][name].dtype == tensor.dtype, name
            assert torch.equal(found[stem][name], tensor), name


def hidden(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


def test_round_trip(tmp_path: Path) -> None:
    every = {
        str(t): torch.arange(6).reshape(2, 3).to(t)
        for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    }
    write_folder(tmp_path / "deep" / "er" / "ckpt", CONFIG, {"model": every, "empty": {"none": torch.zeros(0, 3)}})
    config, found = read_folder(tmp_path / "deep" / "er" / "ckpt")
    assert config == CONFIG
    assert_same(found, {"model": every, "empty": {"none": torch.zeros(0, 3)}})
    assert sorted(p.name for p in (tmp_path / "deep/er/ckpt").iterdir()) == [
        "config.json", "empty.safetensors", "model.safetensors",
    ]  # fmt: skip
    assert hidden(tmp_path / "deep" / "er") == []


def test_config_carries_sizes_and_hashes(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors())
    document = json.loads((tmp_path / "c/config.json").read_text())
    assert document["format"] == 1
    for name in ("model.safetensors", "ema.safetensors"):
        data = (tmp_path / "c" / name).read_bytes()
        assert document["files"][name] == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_folder(tmp_path / name, CONFIG, tensors())
    for file in ("config.json", "model.safetensors", "ema.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    given = {
        "tied_1": base, "tied_2": base, "row": base[1], "columns": base[:, ::2], "transposed": base.t(),
        "expanded": torch.tensor([3.0]).expand(4), "channels_last": torch.arange(24.0).reshape(1, 2, 3, 4).to(
            memory_format=torch.channels_last), "negative": torch.complex(base, base).conj().imag,
        "parameter": torch.nn.Parameter(base + 1),
    }  # fmt: skip
    write_folder(tmp_path / "c", {}, {"model": given})
    _, found = read_folder(tmp_path / "c")
    assert_same(found, {"model": {k: v.detach() for k, v in given.items()}})


def test_changing_what_was_read_leaves_the_file(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", {}, tensors())
    before = (tmp_path / "c/model.safetensors").read_bytes()
    _, found = read_folder(tmp_path / "c")
    found["model"]["a.weight"].zero_()
    assert (tmp_path / "c/model.safetensors").read_bytes() == before
    assert_same(read_folder(tmp_path / "c")[1], tensors())


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_flipped_bit_is_found(tmp_path: Path, file: str) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors())
    path = tmp_path / "c" / file
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 400):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{path} ")):
            read_folder(tmp_path / "c")
    path.write_bytes(whole)
    assert_same(read_folder(tmp_path / "c")[1], tensors())


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-3]), "bytes where config.json says"),
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes where config.json says"),
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x01"), "SHA-256 is not the one"),
        ("ema.safetensors", lambda p: p.unlink(), "is missing"),
        ("config.json", lambda p: p.unlink(), "is missing"),
        ("config.json", lambda p: p.write_text("{"), "is not JSON"),
        ("config.json", lambda p: p.write_bytes(b""), "is not JSON"),
        ("config.json", lambda p: p.write_bytes(b"\xff\xfe\x00"), "is not JSON"),
        ("config.json", lambda p: p.write_text('{"_class_name": "UNet2DModel"}'), "not, or no longer, the config"),
        ("config.json", lambda p: p.write_text("[1]"), "not, or no longer, the config"),
        ("config.json", lambda p: p.write_text(p.read_text().replace("1e-05", "1E-05")), "its own SHA-256"),
        ("config.json", lambda p: p.write_text(p.read_text().replace('"v"', '"x"')), "its own SHA-256"),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, file: str, damage: Any, says: str) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors())
    damage(tmp_path / "c" / file)
    with pytest.raises(ValueError, match=says) as caught:
        read_folder(tmp_path / "c")
    assert str(tmp_path / "c" / file) in str(caught.value)
    assert "restore" in str(caught.value)
    assert "\n" not in str(caught.value)


def rewritten(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))


def test_config_edited_on_purpose(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors())
    file = tmp_path / "c/config.json"
    rewritten(file, predicts="eps", sha256="edited")
    assert read_folder(tmp_path / "c")[0] == {**CONFIG, "predicts": "eps"}
    entries: list[Any] = [{"../c/model.safetensors": {}}, {"model.safetensors": {"size": 3}}, {"m": None}, [1]]
    for files in entries:
        rewritten(file, files=files)
        with pytest.raises(ValueError, match="bad entry"):
            read_folder(tmp_path / "c")
    rewritten(file, format=2)
    with pytest.raises(ValueError, match="upgrade fastdiff"):
        read_folder(tmp_path / "c")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing there; check the path"):
        read_folder(tmp_path / "c")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, not a checkpoint folder"):
        read_folder(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="nothing there"):
        read_folder(tmp_path / "file" / "c")


def test_what_is_not_ours_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("x")
    with pytest.raises(ValueError, match="not one of our checkpoints"):
        write_folder(folder, CONFIG, tensors())
    (folder / "config.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(ValueError, match="not one of our checkpoints"):
        write_folder(folder, CONFIG, tensors())
    with pytest.raises(ValueError, match="is a file"):
        write_folder(folder / "chapter.tex", CONFIG, tensors())
    assert sorted(p.name for p in folder.iterdir()) == ["chapter.tex", "config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis"]


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "c", tmp_path / "file" / "deep" / "c"):
        with pytest.raises(OSError, match=f"{path}: checkpoint not written: .*file is a file, not a folder") as caught:
            write_folder(path, CONFIG, tensors())
        assert caught.value.errno == errno.ENOTDIR


def test_full_disk_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors(1))

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(OSError, match="c: checkpoint not written: No space left on device") as caught:
        write_folder(tmp_path / "c", CONFIG, tensors(2))
    assert caught.value.errno == errno.ENOSPC
    assert_same(read_folder(tmp_path / "c")[1], tensors(1))
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("config", "named", "error", "says"),
    [
        ({"files": 1}, {}, ValueError, "'files' is the checkpoint's own"),
        ({"sha256": 1}, {}, ValueError, "'sha256' is the checkpoint's own"),
        ({"x": float("nan")}, {}, ValueError, "JSON cannot carry it"),
        ({"x": {1, 2}}, {}, ValueError, "JSON cannot carry it"),
        ({"x": {1: 2, "1": 3}}, {}, ValueError, "a key is there as a number and as a string"),
        ({}, {"../model": {}}, ValueError, "'../model' cannot be a file name"),
        ({}, {".model": {}}, ValueError, "'.model' cannot be a file name"),
        ({}, {"model": {"a": 3}}, TypeError, "expected a torch.Tensor, got int"),
        ({}, {"model": {"a": torch.zeros(2, device="meta")}}, ValueError, "a dense tensor with data"),
        ({}, {"model": {"a": torch.zeros(2, dtype=torch.complex128)}}, ValueError, "cannot store the dtype"),
    ],
)
def test_what_cannot_be_stored(tmp_path: Path, config: Any, named: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        write_folder(tmp_path / "c", config, named)
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_folder(folder, CONFIG, tensors(1))
    folder.chmod(0o700)
    (folder / "samples" / "deep").mkdir(parents=True)
    (folder / "samples" / "deep" / "grid.png").write_bytes(b"png")
    (folder / "link").symlink_to("samples")
    with open(folder / "train.log", "w") as log:
        log.write("one\n")
        log.flush()
        new = {"model": tensors(2)["model"]}
        write_folder(folder, CONFIG, new)
        log.write("two\n")
    # ema is of the old checkpoint, so it went; the log goes on in the same file
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "link", "model.safetensors", "samples", "train.log",
    ]  # fmt: skip
    assert (folder / "train.log").read_text() == "one\ntwo\n"
    assert (folder / "link" / "deep" / "grid.png").read_bytes() == b"png"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert_same(read_folder(folder)[1], new)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors())
    (tmp_path / "plain").write_text("")
    expected = (tmp_path / "plain").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "c").iterdir()} == {expected}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors(1))
    (tmp_path / "latest").symlink_to("c")
    write_folder(tmp_path / "latest", CONFIG, tensors(2))
    assert (tmp_path / "latest").is_symlink()
    assert_same(read_folder(tmp_path / "c")[1], tensors(2))


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write_folder(tmp_path / "c", CONFIG, tensors())
    assert_same(read_folder(tmp_path / "c")[1], tensors())


class Crash(BaseException):
    """The machine stops: from here on nothing is written or removed."""


STEPS = ((os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "chmod"), (os, "link"), (shutil, "rmtree"))


def crash_at(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The n-th change of the disk, and all after it, raise instead."""
    count = iter(range(10**6))

    def stopping(real: Any) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            if next(count) >= n:
                raise Crash
            return real(*args, **options)

        return step

    for module, name in (*STEPS, (atomic, "_exchange")):
        monkeypatch.setattr(module, name, stopping(getattr(module, name)))


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", [True, False])
def test_crash_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    outcomes = []
    for n in range(100):
        root = tmp_path / str(n)
        root.mkdir()
        path = root / "c"
        if existing:
            write_folder(path, {"at": 1}, tensors(1))
            (path / "log").write_text("kept")
        with monkeypatch.context() as patch:
            crash_at(patch, n)
            try:
                write_folder(path, {"at": 2}, tensors(2))
                finished = True
            except Crash:
                finished = False
        try:
            config, found = read_folder(path)
        except FileNotFoundError:
            assert not existing
            outcomes.append(0)
        else:
            assert_same(found, tensors(config["at"]))
            outcomes.append(config["at"])
        # the next write recovers, keeps the user's file and leaves nothing behind
        write_folder(path, {"at": 3}, tensors(3))
        assert_same(read_folder(path)[1], tensors(3))
        assert hidden(root) == []
        assert not existing or (path / "log").read_text() == "kept"
        if finished:
            break
    old = 1 if existing else 0
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {old, 2}
    assert outcomes.count(old) > 5


def test_path_is_never_missing_where_the_system_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two names")
    write_folder(tmp_path / "c", CONFIG, tensors(1))
    for n in range(100):
        with monkeypatch.context() as patch:
            crash_at(patch, n)
            with contextlib.suppress(Crash):
                write_folder(tmp_path / "c", CONFIG, tensors(2))
                break
        assert (tmp_path / "c" / "config.json").is_file(), n
    assert n > 5


def test_failed_rename_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors(1))
    real = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".fastdiff-new-" in str(source) and target == tmp_path / "c":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    with pytest.raises(OSError, match="not written: Input/output error"):
        write_folder(tmp_path / "c", CONFIG, tensors(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    assert_same(read_folder(tmp_path / "c")[1], tensors(1))


def test_even_putting_it_back_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors(1))
    real = os.rename

    def failing(source: Path, target: Path) -> None:
        if target == tmp_path / "c":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        patch.setattr(atomic, "_exchange", lambda a, b: False)
        with pytest.raises(OSError, match="not written: Input/output error"):
            write_folder(tmp_path / "c", CONFIG, tensors(2))
    assert hidden(tmp_path) == [".c.fastdiff-old"]
    assert_same(read_folder(tmp_path / "c")[1], tensors(1))
    write_folder(tmp_path / "c", CONFIG, tensors(3))
    assert_same(read_folder(tmp_path / "c")[1], tensors(3))
    assert hidden(tmp_path) == []


def test_all_is_on_disk_before_and_after_the_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors(1))
    done: list[int | str] = []
    fsync, swap = os.fsync, atomic._swap

    def noted(handle: int) -> None:
        done.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(atomic, "_swap", lambda new, path: (done.append("swap"), swap(new, path)))  # type: ignore[func-returns-value]
    write_folder(tmp_path / "c", CONFIG, tensors(2))
    parts = [tmp_path / "c" / name for name in ("model.safetensors", "ema.safetensors", "config.json")]
    inodes = [path.stat().st_ino for path in (*parts, tmp_path / "c", tmp_path)]
    assert done == [*inodes[:4], "swap", inodes[4]]


@pytest.mark.parametrize("exchange", [True, False])
def test_reading_while_another_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    path = tmp_path / "c"
    write_folder(path, {"at": 0}, tensors(0))
    seen: set[int] = set()
    failures: list[BaseException] = []
    done = threading.Event()

    def reader() -> None:
        try:
            while not done.is_set():
                config, found = read_folder(path)
                assert_same(found, tensors(config["at"]))
                seen.add(config["at"])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    for at in range(1, 26):
        write_folder(path, {"at": at}, tensors(at))
    done.set()
    thread.join()
    assert not failures, failures
    assert len(seen) > 1


WRITER = """
import sys, torch
from fastdiff.files.checkpoint import write_folder
at = 0
while True:
    at += 1
    write_folder(sys.argv[1], {"at": at}, {"model": {"w": torch.full((5000,), float(at))}})
    print(at, flush=True)
"""


def test_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment()
    ) as writer:  # fmt: skip
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(random.randrange(3, 30))][-1]
        writer.send_signal(signal.SIGKILL)
        said = max([said, *map(int, writer.stdout.read().split())])
    config, found = read_folder(path)
    assert config["at"] in (said, said + 1)
    assert torch.equal(found["model"]["w"], torch.full((5000,), float(config["at"])))
    write_folder(path, {"at": 0}, tensors())
    assert hidden(tmp_path) == []


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "c", CONFIG, tensors())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        write_folder(tmp_path / "d", CONFIG, tensors())
    with pytest.raises(ImportError, match="pip install safetensors"):
        read_folder(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
