"""Images out: the bytes of every conversion, the pixels of a grid, metadata that comes back, no half files."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.files import images
from fastdiff.files.atomic import replace_file
from fastdiff.files.images import (
    check_output,
    from_uint8,
    grid,
    read_meta,
    save_grid,
    save_images,
    save_npz,
    to_uint8,
)

ALL = np.arange(256, dtype=np.uint8)


def batch(n: int = 5, c: int = 3, h: int = 4, w: int = 6, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.RandomState(seed).randint(0, 256, (n, c, h, w)).astype(np.uint8)


def test_every_byte_comes_back() -> None:
    assert to_uint8(from_uint8(ALL)).tobytes() == ALL.tobytes()
    assert from_uint8(ALL).dtype == np.float32
    tensor = torch.from_numpy(ALL)
    assert torch.equal(to_uint8(from_uint8(tensor)), tensor)
    assert torch.equal(to_uint8(from_uint8(tensor).double()), tensor)
    assert from_uint8(tensor).numpy().tobytes() == from_uint8(ALL).tobytes()
    assert np.abs(from_uint8(ALL) - (ALL / 127.5 - 1)).max() <= 2**-24
    assert (from_uint8(ALL)[0], from_uint8(ALL)[255]) == (-1, 1)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_to_uint8_rounds_and_clips(kind: Callable[[list[float]], Any]) -> None:
    # x = 0 is the one exact half, 127.5, and goes to the even side
    cases = {
        -1.0: 0, 1.0: 255, 0.0: 128, -7.0: 0, 3.0: 255, float("inf"): 255, float("-inf"): 0,
        0.49 / 127.5 - 1: 0, 0.51 / 127.5 - 1: 1, 254.49 / 127.5 - 1: 254, 254.51 / 127.5 - 1: 255, 0.2: 153,
    }  # fmt: skip
    assert to_uint8(kind(list(cases))).tolist() == list(cases.values())


def test_array_and_tensor_give_the_same_bytes() -> None:
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert to_uint8(x).numpy().tobytes() == to_uint8(x.numpy()).tobytes()
    assert torch.equal(to_uint8(x.half()), to_uint8(x.half().float()))
    assert to_uint8(x.half().numpy()).tobytes() == to_uint8(x.half().float().numpy()).tobytes()


def test_conversions_refuse() -> None:
    nans: list[Any] = [torch.tensor([0.0, float("nan")]), np.array([0.0, float("nan")])]
    for bad in nans:
        with pytest.raises(ValueError, match=r"x has 1 NaN among 2 values"):
            to_uint8(bad)
    integers: list[Any] = [torch.zeros(2, dtype=torch.int64), np.zeros(2, np.int64)]
    for bad in integers:
        with pytest.raises(ValueError, match=r"expected floating point in \[-1, 1\], got .*int64"):
            to_uint8(bad)
        with pytest.raises(ValueError, match=r"expected uint8, got .*int64"):
            from_uint8(bad)


@pytest.mark.parametrize("c", [1, 3, 4])
@pytest.mark.parametrize(("columns", "pad", "scale"), [(2, 2, 1), (3, 0, 2), (5, 1, 3), (9, 2, 1), (1, 3, 1)])
def test_grid_pixels(c: int, columns: int, pad: int, scale: int) -> None:
    x = batch(5, c)
    out = grid(x, columns, pad, scale)
    across = min(columns, 5)
    down = -(-5 // across)
    assert out.shape == (down * (4 * scale + pad) + pad, across * (6 * scale + pad) + pad, c)
    left_over = np.ones(out.shape, bool)
    for i, y, z in itertools.product(range(5), range(4 * scale), range(6 * scale)):
        r, s = pad + i // across * (4 * scale + pad) + y, pad + i % across * (6 * scale + pad) + z
        assert out[r, s].tolist() == x[i, :, y // scale, z // scale].tolist()
        left_over[r, s] = False
    assert (out[left_over] == 255).all()


def test_grid_defaults() -> None:
    # 5 images: 3 columns, 2 rows; 8 high becomes 64, 100 high stays
    assert grid(batch(5, 1, 8, 8)).shape == (2 * 66 + 2, 3 * 66 + 2, 1)
    assert grid(batch(4, 1, 100, 20)).shape == (2 * 102 + 2, 2 * 22 + 2, 1)
    assert grid(batch(1, 1, 33, 33)).shape == (66 + 4, 66 + 4, 1)
    for name, given in (("columns", {"columns": 0}), ("pad", {"pad": -1}), ("scale", {"scale": 0})):
        with pytest.raises(ValueError, match=rf"{name}=.*expected an integer"):
            grid(batch(), **given)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 2, 4, 4), (0, 3, 4, 4), (2, 4, 4, 3), (2, 5, 4, 4)])
def test_shapes_that_are_no_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    if shape == (2, 4, 4, 3):
        assert grid(np.zeros(shape, np.uint8), scale=1).shape[2] == 4
        return
    for save in (save_grid, save_npz):
        with pytest.raises(ValueError, match=r"expected \(N, C, H, W\)"):
            save(torch.zeros(shape), tmp_path / ("x.png" if save is save_grid else "x.npz"))
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\)"):
        save_images(torch.zeros(shape), tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("c", [1, 3, 4])
def test_save_grid(tmp_path: Path, c: int) -> None:
    x = batch(5, c)
    meta = {"seed": 3, "model": "häh", "versions": {"torch": "2"}, "labels": [1, 2], "w": 1.5, "none": None}
    save_grid(from_uint8(torch.from_numpy(x)), tmp_path / "g.png", columns=2, scale=2, meta=meta)
    with Image.open(tmp_path / "g.png") as image:
        assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[c]
        expected = grid(x, 2, scale=2)
        assert np.asarray(image).tobytes() == expected.tobytes()
        assert image.size == (expected.shape[1], expected.shape[0])
        assert json.loads(image.info["fastdiff"]) == meta
    assert read_meta(tmp_path / "g.png") == meta
    save_grid(x, tmp_path / "u.PNG", columns=2, scale=2, meta=meta)
    assert (tmp_path / "u.PNG").read_bytes() == (tmp_path / "g.png").read_bytes()


def test_save_images(tmp_path: Path) -> None:
    x = batch(3, 3)
    paths = save_images(x, tmp_path / "out", start=7, meta={"seed": np.int64(5), "w": torch.tensor(1.5)})
    assert [p.name for p in paths] == ["000007.png", "000008.png", "000009.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [p.name for p in paths]
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            assert np.asarray(image).transpose(2, 0, 1).tobytes() == x[i].tobytes()
        assert read_meta(path) == {"seed": 5, "w": 1.5, "index": 7 + i}
    more = save_images(x[:2], tmp_path / "out", start=10, meta=[{"label": 4}, {"label": 6}])
    assert [read_meta(p) for p in more] == [{"label": 4}, {"label": 6}]
    assert paths[0].exists()
    assert [read_meta(p) for p in save_images(x[:1], tmp_path / "out", meta={})] == [{"index": 0}]


def test_save_images_same_bytes_again(tmp_path: Path) -> None:
    for name in "ab":
        save_images(batch(2, 1), tmp_path / name, meta={"b": 1, "a": 2})
    for file in ("000000.png", "000001.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_save_images_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta: 1 dicts for 2 images"):
        save_images(batch(2), tmp_path / "out", meta=[{}])
    with pytest.raises(ValueError, match="start=-1"):
        save_images(batch(2), tmp_path / "out", start=-1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="JSON cannot carry a set"):
        save_images(batch(2), tmp_path / "out", meta={"x": {1}})
    assert list((tmp_path / "out").iterdir()) == []


def test_read_meta_errors(tmp_path: Path) -> None:
    save_grid(batch(), tmp_path / "g.png")
    with pytest.raises(ValueError, match=r"g\.png carries no fastdiff metadata"):
        read_meta(tmp_path / "g.png")
    (tmp_path / "g.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"g\.png is not a readable PNG"):
        read_meta(tmp_path / "g.png")
    with pytest.raises(FileNotFoundError, match="none"):
        read_meta(tmp_path / "none.png")


def test_save_npz(tmp_path: Path) -> None:
    x = batch(5, 3)
    save_npz(from_uint8(torch.from_numpy(x)), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_0"].shape == (5, 4, 6, 3)
        assert file["arr_0"].tobytes() == np.ascontiguousarray(x.transpose(0, 2, 3, 1)).tobytes()
    save_npz(x, tmp_path / "y.npz", labels=torch.tensor([3, 1, 4, 1, 5], dtype=torch.int32))
    with np.load(tmp_path / "y.npz") as file:
        assert file["labels"].dtype == np.int64
        assert file["labels"].tolist() == [3, 1, 4, 1, 5]
    save_npz(x, tmp_path / "z.npz", labels=np.array([3, 1, 4, 1, 5]))
    assert (tmp_path / "y.npz").read_bytes() == (tmp_path / "z.npz").read_bytes()
    for bad in (np.zeros(4, int), np.zeros(5), np.zeros((5, 1), int)):
        with pytest.raises(ValueError, match="labels: expected 5 integers"):
            save_npz(x, tmp_path / "no.npz", labels=bad)
    assert not (tmp_path / "no.npz").exists()


def test_suffixes_are_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_images", lambda x: pytest.fail("worked first"))
    with pytest.raises(ValueError, match=r"a name that ends in \.png, got .*g\.jpg"):
        save_grid(batch(), tmp_path / "g.jpg")
    with pytest.raises(ValueError, match=r"a name that ends in \.npz, got .*g\.npy"):
        save_npz(batch(), tmp_path / "g.npy")


def test_check_output(tmp_path: Path) -> None:
    (tmp_path / "with.dot").mkdir()
    (tmp_path / "file").write_text("x")
    assert check_output(tmp_path / "a.png") == "png"
    assert check_output(tmp_path / "a.PNG") == "png"
    assert check_output(tmp_path / "a.npz") == "npz"
    assert check_output(tmp_path / "new") == "folder"
    assert check_output(tmp_path / "with.dot") == "folder"
    assert check_output(tmp_path) == "folder"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "with.dot"]
    with pytest.raises(ValueError, match=r"suffix '.jpg' is unknown; end it in .png or .npz"):
        check_output(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match=r"its parent .*none does not exist"):
        check_output(tmp_path / "none" / "a.png")
    with pytest.raises(NotADirectoryError, match=r"its parent .*file is not a folder"):
        check_output(tmp_path / "file" / "a.png")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_output(tmp_path / "file")


def test_check_output_tries_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(dir: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(PermissionError, match=r"a\.png: cannot write to .* \(Permission denied\); choose another path"):
        check_output(tmp_path / "a.png")


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for path in (tmp_path / "a.png", tmp_path / "new"):
        with pytest.raises(ImportError, match="pip install pillow"):
            check_output(path)
    assert check_output(tmp_path / "a.npz") == "npz"
    with pytest.raises(ImportError, match="pip install pillow"):
        save_grid(batch(), tmp_path / "a.png")
    save_npz(batch(), tmp_path / "a.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    saves: list[tuple[str, Callable[[Any], Any]]] = [
        ("g.png", lambda x: save_grid(x, tmp_path / "g.png")),
        ("000000.png", lambda x: save_images(x[:1], tmp_path)),
        ("x.npz", lambda x: save_npz(x, tmp_path / "x.npz")),
    ]

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    @contextlib.contextmanager
    def full_file(path: Path, **options: Any) -> Iterator[Any]:
        with replace_file(path, **options) as out:
            out.write(b"half")
            out.flush()
            full()
            yield out

    for name, save in saves:
        save(batch(seed=0))
        old = (tmp_path / name).read_bytes()
        with monkeypatch.context() as patch:
            if step == "write":
                patch.setattr(images, "replace_file", full_file)
            else:
                patch.setattr(os, step, full)
            # numbered images do not wait for the disk
            waits = step != "fsync" or name != "000000.png"
            with pytest.raises(OSError, match=f"{name}: not written: No space left") if waits else nullcontext():
                save(batch(seed=1 if waits else 0))
        assert (tmp_path / name).read_bytes() == old
        save(batch(seed=1))
        assert (tmp_path / name).read_bytes() != old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000.png", "g.png", "x.npz"]


def test_the_data_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def step(*args: Any) -> None:
            calls.append(name)
            real(*args)

        return step

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    save_npz(batch(), tmp_path / "x.npz")
    save_grid(batch(), tmp_path / "x.png")
    assert calls == ["fsync", "replace"] * 2


def test_errors_name_the_file_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"file/x\.npz: not written: Not a directory"):
        save_npz(batch(), tmp_path / "file" / "x.npz")
    with pytest.raises(FileNotFoundError, match=r"none/g\.png: not written: No such file"):
        save_grid(batch(), tmp_path / "none" / "g.png")


def test_npz_reads_as_a_plain_zip(tmp_path: Path) -> None:
    save_npz(batch(), tmp_path / "x.npz")
    with np.load(io.BytesIO((tmp_path / "x.npz").read_bytes())) as file:
        assert file["arr_0"].flags.c_contiguous
