"""Data sets: exact pixels and labels from every source, and one sentence for what is damaged."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdiff.files import data as module
from fastdiff.files.data import Data, load_data, split
from fastdiff.files.images import save_images, save_npz

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def batch(n: int = 5, c: int = 3, h: int = 4, w: int = 6, seed: int = 0) -> Bytes:
    return np.random.RandomState(seed).randint(0, 256, (n, c, h, w)).astype(np.uint8)


def assert_same(found: np.ndarray[Any, Any] | None, expected: np.ndarray[Any, Any]) -> None:
    assert found is not None
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def idx(array: Bytes) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def picture(path: Path, image: Bytes) -> None:
    """One (C, H, W) image to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))).save(path)


def test_digits() -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    data = load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    table = [round(255 / 16 * v) for v in range(17)]
    assert_same(data.images, np.array(table, np.uint8)[source.images.astype(int)][:, None])
    assert_same(data.labels, source.target.astype(np.int64))
    assert data.classes == tuple("0123456789")
    assert data.labels is not None
    # one row of pixels and the count of each class, so that another version of the data is noticed
    assert np.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_digits_without_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_data("digits")


def test_fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FASHION", tmp_path)
    with pytest.raises(ValueError, match=r"apt install dataset-fashion-mnist.*pass the folder"):
        load_data("fashion-mnist")
    x, y = batch(12, 1, 28, 28), np.arange(12, dtype=np.uint8) % 7
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x[:, 0])))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y)))
    data = load_data("fashion-mnist")
    assert_same(data.images, x)
    assert_same(data.labels, y.astype(np.int64))
    assert len(data.classes) == 10
    assert data.classes[:2] == ("T-shirt/top", "Trouser")


@pytest.mark.parametrize("gz", [True, False])
def test_idx(tmp_path: Path, gz: bool) -> None:
    x, y = batch(9, 1, 5, 7), np.array([2, 0, 1, 1, 3, 0, 0, 2, 1], np.uint8)
    pack, end = (gzip.compress, ".gz") if gz else (bytes, "")
    file = tmp_path / f"train-images-idx3-ubyte{end}"
    file.write_bytes(pack(idx(x[:, 0])))
    bare = load_data(file)
    assert_same(bare.images, x)
    assert bare.labels is None
    assert bare.classes == ()
    (tmp_path / f"train-labels-idx1-ubyte{end}").write_bytes(pack(idx(y)))
    for source in (file, str(file), tmp_path):
        data = load_data(source)
        assert_same(data.images, x)
        assert_same(data.labels, y.astype(np.int64))
        assert data.classes == ("0", "1", "2", "3")
    assert data.images.flags.writeable


def test_idx_damaged(tmp_path: Path) -> None:
    whole = idx(batch(9, 1, 5, 7)[:, 0])
    file = tmp_path / "train-images-idx3-ubyte"
    packed = gzip.compress(whole)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 4
    cases = [
        (whole[:-1], r"holds 314 bytes where \(9, 5, 7\) needs 315"),
        (whole + b"x", r"holds 316 bytes where \(9, 5, 7\) needs 315"),
        (whole[:10], "is not an IDX file"),
        (b"", "is not an IDX file"),
        (b"\x00\x00\x0d\x03" + whole[4:], "it starts with '00 00 0d 03', not '00 00 08 03'"),
        (idx(np.zeros(9, np.uint8)), "it starts with '00 00 08 01'"),
        (idx(np.zeros((0, 5, 7), np.uint8)), r"\(0, 5, 7\) needs 0"),
        (packed[:-20], "is damaged"),
        (bytes(flipped), "is damaged"),
        (b"\xff" * 100, "it starts with 'ff ff ff ff'"),
    ]
    for content, says in cases:
        file.write_bytes(content)
        for source in (file, tmp_path):
            with pytest.raises(ValueError, match=says) as caught:
                load_data(source)
            assert str(file) in str(caught.value)
            assert "\n" not in str(caught.value)
    file.write_bytes(whole)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(8, np.uint8)))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte: expected 9 class numbers"):
        load_data(file)


@pytest.mark.parametrize("c", [1, 3, 4])
def test_npz(tmp_path: Path, c: int) -> None:
    x, y = batch(6, c), np.array([0, 2, 1, 1, 0, 2])
    save_npz(x, tmp_path / "ours.npz", labels=y)
    np.savez(tmp_path / "adm.npz", x.transpose(0, 2, 3, 1), y)
    np.savez(tmp_path / "nchw.npz", images=x, labels=y.astype(np.int32))
    for name in ("ours", "adm", "nchw"):
        data = load_data(tmp_path / f"{name}.npz")
        assert_same(data.images, x)
        assert_same(data.labels, y.astype(np.int64))
        assert data.classes == ("0", "1", "2")
        assert data.images.flags.c_contiguous
    np.savez(tmp_path / "bare.npz", images=x[:, 0])
    assert_same(load_data(tmp_path / "bare.npz").images, np.ascontiguousarray(x[:, :1]))
    assert load_data(tmp_path / "bare.npz").labels is None


def test_npz_bad(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    x = batch(6)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": x}, r"holds \['data'\]; expected the images as 'arr_0' or 'images'"),
        ({"images": x / 255}, "expected images uint8 NHWC, NCHW or NHW, got float64"),
        ({"images": x[0, 0]}, r"got uint8 \(4, 6\)"),
        ({"images": x[:0]}, r"got uint8 \(0, 3, 4, 6\)"),
        ({"images": x[:, :2]}, "have no axis of 1, 3 or 4 channels"),
        ({"images": x, "labels": np.zeros(5, int)}, "labels: expected 6 class numbers"),
        ({"images": x, "labels": np.zeros(6)}, "labels: expected 6 class numbers"),
        ({"images": x, "labels": np.full(6, -1)}, "labels: expected 6 class numbers"),
        ({"images": np.array([None] * 6)}, "is not a readable NumPy file"),
    ]
    for arrays, says in cases:
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=says) as caught:
            load_data(file)
        assert str(file) in str(caught.value)
    save_npz(x, file)
    whole = bytearray(file.read_bytes())
    whole[300] ^= 1
    for content in (bytes(whole), bytes(whole[:200]), b"no zip"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz is not a readable NumPy file"):
            load_data(file)


def test_labels_of_the_caller(tmp_path: Path) -> None:
    x, y = batch(6), np.array([0, 2, 1, 1, 0, 2])
    save_npz(x, tmp_path / "x.npz")
    (tmp_path / "y-idx1").write_bytes(idx(y.astype(np.uint8)))
    np.save(tmp_path / "y.npy", y)
    for labels in (y, y.tolist(), tmp_path / "y-idx1", str(tmp_path / "y.npy")):
        data = load_data(tmp_path / "x.npz", labels=labels)
        assert_same(data.labels, y.astype(np.int64))
        assert data.classes == ("0", "1", "2")
    digits = load_data("digits", labels=np.full(1797, 3))
    assert digits.classes == tuple("0123456789")
    assert digits.labels is not None
    assert (digits.labels == 3).all()
    with pytest.raises(ValueError, match="labels: expected 6 class numbers"):
        load_data(tmp_path / "x.npz", labels=[1, 2])
    with pytest.raises(ValueError, match="labels: no file"):
        load_data(tmp_path / "x.npz", labels=tmp_path / "none.npy")
    (tmp_path / "y.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"y\.npy is not a readable NumPy file"):
        load_data(tmp_path / "x.npz", labels=tmp_path / "y.npy")


@pytest.mark.parametrize("c", [1, 3, 4])
def test_flat_folder(tmp_path: Path, c: int) -> None:
    x = batch(11, c)
    save_images(x, tmp_path)
    (tmp_path / "notes.txt").write_text("passed over")
    (tmp_path / ".hidden.png").write_text("passed over")
    data = load_data(tmp_path)
    assert_same(data.images, x)
    assert data.labels is None
    assert data.classes == ()


def test_class_folders(tmp_path: Path) -> None:
    x = batch(6)
    for i, name in enumerate(["zebra/2.png", "ant/b.PNG", "zebra/1.bmp", "ant/deep/a.png", "cat 7/x.png", "ant/c.tif"]):
        picture(tmp_path / name, x[i])
    (tmp_path / "cat 7" / "readme").write_text("passed over")
    data = load_data(tmp_path)
    assert data.classes == ("ant", "cat 7", "zebra")
    assert_same(data.images, x[[1, 5, 3, 4, 2, 0]])
    assert_same(data.labels, np.array([0, 0, 0, 1, 2, 2]))
    picture(tmp_path / "stray.png", x[0])
    with pytest.raises(ValueError, match=r"images both in it \(stray\.png\) and in subfolders"):
        load_data(tmp_path)


def test_broken_file(tmp_path: Path) -> None:
    x = batch(4, 3, 30, 30)
    for i in range(4):
        picture(tmp_path / f"{i % 2}" / f"{i}.png", x[i])
    good = (tmp_path / "1" / "1.png").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for content in (good[:-100], bytes(flipped), b"", b"no image", good[:20]):
        (tmp_path / "1" / "1.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"1/1\.png cannot be read .*; remove it, or pass broken='skip'"):
            load_data(tmp_path)
        with pytest.warns(UserWarning, match=r"skipped: .*1/1\.png") as caught:
            data = load_data(tmp_path, broken="skip")
        assert [w.filename for w in caught] == [__file__]
        assert_same(data.images, x[[0, 2, 3]])
        assert_same(data.labels, np.array([0, 0, 1]))
        assert data.classes == ("0", "1")


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no readable image"):
        load_data(tmp_path)
    (tmp_path / "a.png").write_text("x")
    with (
        pytest.warns(UserWarning, match=r"a\.png"),
        pytest.raises(ValueError, match="holds no readable image"),
    ):
        load_data(tmp_path, broken="skip")


def test_odd_sizes_and_channels(tmp_path: Path) -> None:
    x = batch(3, 3, 4, 6)
    picture(tmp_path / "0.png", x[0])
    picture(tmp_path / "1.png", x[1])
    picture(tmp_path / "2.png", x[2, :, :, :4])
    says = r"2\.png has \(C, H, W\) = \(%s\) where .*0\.png has \(3, 4, 6\); pass size= or channels="
    with pytest.raises(ValueError, match=says % "3, 4, 4"):
        load_data(tmp_path)
    picture(tmp_path / "2.png", x[2, :1])
    with pytest.raises(ValueError, match=says % "1, 4, 6"):
        load_data(tmp_path)
    assert_same(load_data(tmp_path, channels=3).images, np.stack([x[0], x[1], x[2, :1].repeat(3, 0)]))


def test_size_cuts_the_middle(tmp_path: Path) -> None:
    x = batch(2, 3, 4, 6)
    save_images(x, tmp_path / "wide")
    save_images(x.transpose(0, 1, 3, 2), tmp_path / "tall")
    assert_same(load_data(tmp_path / "wide", size=4).images, np.ascontiguousarray(x[..., 1:5]))
    assert_same(load_data(tmp_path / "tall", size=4).images, np.ascontiguousarray(x.transpose(0, 1, 3, 2)[:, :, 1:5]))
    save_npz(x, tmp_path / "x.npz")
    assert_same(load_data(tmp_path / "x.npz", size=4).images, np.ascontiguousarray(x[..., 1:5]))


def test_size_resizes_without_aliasing(tmp_path: Path) -> None:
    # a checkerboard finer than the new pixels must become its mean; nearest neighbours would give 0 or 255
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    save_images(np.stack([board[None]]), tmp_path / "x")
    small = load_data(tmp_path / "x", size=8).images
    assert small.shape == (1, 1, 8, 8)
    assert np.abs(small.astype(int) - 127.5).max() <= 3
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8) * 4, (64, 64))
    save_images(ramp[None, None].copy(), tmp_path / "y")
    # the mean of each block of 8 columns, away from the borders
    got = load_data(tmp_path / "y", size=8).images[0, 0, 4, 1:-1]
    assert np.abs(got - ramp[0].reshape(8, 8).mean(1)[1:-1]).max() <= 1


def test_channels(tmp_path: Path) -> None:
    x = batch(2, 3)
    save_images(x, tmp_path / "rgb")
    luma = x.astype(float).transpose(0, 2, 3, 1) @ [0.299, 0.587, 0.114]
    grey = load_data(tmp_path / "rgb", channels=1).images
    assert grey.shape == (2, 1, 4, 6)
    assert np.abs(grey[:, 0] - luma).max() <= 1
    with_alpha = load_data(tmp_path / "rgb", channels=4).images
    assert_same(with_alpha, np.concatenate([x, np.full((2, 1, 4, 6), 255, np.uint8)], 1))
    digits = load_data("digits", channels=3)
    assert_same(digits.images, load_data("digits").images.repeat(3, 1))
    # transparent pixels over white
    rgba = batch(2, 4)
    save_images(rgba, tmp_path / "rgba")
    alpha = rgba[:, 3:] / 255
    over = rgba[:, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(load_data(tmp_path / "rgba", channels=3).images - over).max() <= 1


def test_kinds_of_files(tmp_path: Path) -> None:
    deep = (np.arange(24).reshape(4, 6) * 2849).clip(0, 65535).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert_same(load_data(tmp_path).images[0, 0], np.round(deep / 257).astype(np.uint8))
    (tmp_path / "a.png").unlink()
    rgb = batch(1, 3)[0]
    palette = Image.fromarray(rgb.transpose(1, 2, 0)).quantize(24)
    palette.save(tmp_path / "a.png")
    assert_same(
        load_data(tmp_path).images[0], np.ascontiguousarray(np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    )
    (tmp_path / "a.png").unlink()
    Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "a.png")
    assert_same(load_data(tmp_path).images[0, 0], np.eye(4, dtype=np.uint8) * 255)
    (tmp_path / "a.png").unlink()
    Image.fromarray(np.eye(4, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif cannot be read \(floating-point pixels"):
        load_data(tmp_path)
    (tmp_path / "a.tif").unlink()
    # a camera's rotation: 6 means that the file must be turned by 90 degrees clockwise
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=exif)
    assert load_data(tmp_path).images.shape == (1, 3, 6, 4)


def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"no data set or file 'mnits'; accepted: digits, fashion-mnist, an \.npz file"
    ):
        load_data("mnits")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"size": 0}, "size=0"),
        ({"channels": 2}, r"channels=2: expected one of \(1, 3, 4\)"),
        ({"broken": "ignore"}, "broken='ignore': expected 'stop' or 'skip'"),
    ]
    for options, says in cases:
        with pytest.raises(ValueError, match=says):
            load_data("digits", **options)
    # the name wins over a folder, "./" asks for the folder
    monkeypatch.chdir(tmp_path)
    x = batch(2)
    save_images(x, "digits")
    assert len(load_data("digits").images) == 1797
    assert_same(load_data("./digits").images, x)
    assert_same(load_data(tmp_path / "digits").images, x)


def test_split() -> None:
    x = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    data = Data(x, np.arange(40) % 3, ("a", "b", "c"))
    train, test = split(data, 0.75, 0)
    assert len(train.images) == 30
    for part in (train, test):
        order = part.images.ravel()
        assert (np.diff(order.astype(int)) > 0).all()
        assert_same(part.labels, order.astype(np.int64) % 3)
        assert part.classes == data.classes
    assert sorted([*train.images.ravel(), *test.images.ravel()]) == list(range(40))
    # frozen: a split that moves between versions would leak test images into training
    assert test.images.ravel().tolist() == [0, 3, 6, 9, 19, 21, 23, 24, 31, 38]
    assert split(data, 0.75, 1)[1].images.ravel().tolist() != test.images.ravel().tolist()
    assert split(data._replace(labels=None), 0.75, 0)[0].labels is None
    for fraction in (0, 1, -0.5, 2, 0.001):
        with pytest.raises(ValueError, match="fraction="):
            split(data, fraction, 0)


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(batch(2), tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        load_data(tmp_path)
    assert load_data("digits").images.shape == (1797, 1, 8, 8)
