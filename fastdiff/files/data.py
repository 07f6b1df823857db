"""Image data sets from what is at hand, uint8 (N, C, H, W): bundled with a package, IDX files, npz, folders of images.

Everything is read into memory. Nothing is downloaded: what is missing is said, with the package that carries it.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

NAMES = ("digits", "fashion-mnist")
FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's and Ubuntu's package dataset-fashion-mnist puts its files."""
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""What counts as an image in a folder; other files, and hidden ones, are passed over."""
_ACCEPTED = f"{', '.join(NAMES)}, an .npz file, an IDX file (...-ubyte[.gz]), a folder with IDX or image files"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Data(NamedTuple):
    """Images uint8 (N, C, H, W), labels int64 (N,) in 0..len(classes)-1 or None, and the names of the classes."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]


def load_data(
    name_or_path: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    broken: Literal["stop", "skip"] = "stop",
    labels: str | os.PathLike[str] | ArrayLike | None = None,
) -> Data:
    """Read a data set by name ("digits", "fashion-mnist"; the latter is its training part) or path.

    A path is an .npz (`arr_0` or `images`: uint8 NHWC, NCHW or NHW; `labels` or `arr_1` if there), an IDX file (labels
    from its sibling ...labels-idx1...), a folder with train-images-idx3-ubyte[.gz], or a folder of images: one
    subfolder a class, in sorted order, or flat without labels. "./digits" is a path, "digits" a name.
    size: cut out the central square and resize it (Lanczos) to size x size. channels: 1 (luma), 3 (RGB, transparent
    pixels over white) or 4 (RGBA); default as stored. broken: what an image file that cannot be read does, "skip" with
    a warning. labels: integers, or an IDX or .npy file of them, in place of the source's own.
    ValueError: one sentence with the file and what is wrong with it.
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size}: expected an integer >= 1, or None to keep the images' own")
    if channels is not None and channels not in _MODES:
        raise ValueError(f"channels={channels}: expected one of {tuple(_MODES)}, or None to keep the images' own")
    if broken not in ("stop", "skip"):
        raise ValueError(f"broken={broken!r}: expected 'stop' or 'skip'")
    path = Path(name_or_path)
    if name_or_path == "digits":
        data = _digits()
    elif name_or_path == "fashion-mnist":
        data = _fashion()
    elif path.is_dir():
        idx = _idx_in(path)
        data = _folder(path, size, channels, broken) if idx is None else _idx_pair(idx)
    elif path.is_file():
        data = _npz(path) if path.suffix.lower() == ".npz" else _idx_pair(path)
    else:
        raise ValueError(f"no data set or file {os.fspath(name_or_path)!r}; accepted: {_ACCEPTED}")
    return _converted(data if labels is None else _labelled(data, labels), size, channels)


def split(data: Data, fraction: float, seed: int) -> tuple[Data, Data]:
    """Two disjoint parts, the first with round(fraction N) images drawn by `seed`, each in the order of `data`.

    The same on every machine and NumPy version (RandomState's streams are frozen). Not stratified.
    """
    n = len(data.images)
    k = round(fraction * n)
    if not 0 < k < n:
        raise ValueError(f"fraction={fraction}: leaves one part of {n} images empty; choose another between 0 and 1")
    order = np.random.RandomState(seed).permutation(n)
    parts = (np.sort(order[:k]), np.sort(order[k:]))
    labels = (None, None) if data.labels is None else (data.labels[parts[0]], data.labels[parts[1]])
    return Data(data.images[parts[0]], labels[0], data.classes), Data(data.images[parts[1]], labels[1], data.classes)


def _digits() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the data set 'digits' comes with scikit-learn: pip install scikit-learn") from error
    source = load_digits()
    # 0..16 to 0..255
    images = np.round(source.images * (255 / 16)).astype(np.uint8)
    return Data(images[:, None], source.target.astype(np.int64), tuple(str(i) for i in range(10)))


def _fashion() -> Data:
    idx = _idx_in(FASHION)
    if idx is None:
        raise ValueError(
            f"'fashion-mnist' is not in {FASHION}; install it (apt install dataset-fashion-mnist) or pass the folder "
            "that holds its train-images-idx3-ubyte.gz"
        )
    return _idx_pair(idx)._replace(classes=FASHION_CLASSES)


def _named(images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> Data:
    """With classes 0, 1, ... as far as the labels go."""
    return Data(images, labels, () if labels is None else tuple(str(i) for i in range(int(labels.max()) + 1)))


def _labelled(data: Data, given: Any) -> Data:
    """With the caller's labels; the class names stay where they cover them."""
    source = "labels"
    if isinstance(given, (str, os.PathLike)):
        source, path = os.fspath(given), Path(given)
        if not path.is_file():
            raise ValueError(f"labels: no file {source!r}; pass an IDX or .npy file, or integers")
        given = _numpy(path)["arr_0"] if path.suffix == ".npy" else _idx(path, 1)
    named = _named(data.images, _checked(given, len(data.images), source))
    return named._replace(classes=data.classes) if len(data.classes) >= len(named.classes) else named


def _checked(given: ArrayLike, n: int, source: str) -> NDArray[np.int64]:
    array = np.asarray(given)
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        raise ValueError(f"{source}: expected {n} class numbers >= 0, one an image, got {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _numpy(path: Path) -> dict[str, NDArray[Any]]:
    """What an .npz holds; an .npy as "arr_0"."""
    try:
        # opened here, because np.load leaves the file open when it is damaged
        with open(path, "rb") as file:
            loaded = np.load(file)
            return {"arr_0": loaded} if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable NumPy file ({error}); make or download it again") from error


def _npz(path: Path) -> Data:
    arrays = _numpy(path)
    images = arrays.get("arr_0", arrays.get("images"))
    if images is None:
        raise ValueError(f"{path} holds {list(arrays)}; expected the images as 'arr_0' or 'images'")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(f"{path}: expected images uint8 NHWC, NCHW or NHW, got {images.dtype} {images.shape}")
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] in _MODES:
        images = images.transpose(0, 3, 1, 2)
    elif images.shape[1] not in _MODES:
        raise ValueError(f"{path}: images {images.shape} have no axis of 1, 3 or 4 channels, last or second")
    labels = arrays.get("labels", arrays.get("arr_1"))
    checked = None if labels is None else _checked(labels, len(images), f"{path}: labels")
    return _named(np.ascontiguousarray(images), checked)


def _idx_in(folder: Path) -> Path | None:
    names = ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx_pair(path: Path) -> Data:
    """An IDX file of images, with the labels from the sibling that is named like it."""
    images = _idx(path, 3)[:, None]
    stem = path.name.removesuffix(".gz").replace("images-idx3", "labels-idx1")
    for sibling in (path.with_name(stem), path.with_name(stem + ".gz")):
        if "labels-idx1" in stem and sibling.is_file():
            return _named(images, _checked(_idx(sibling, 1), len(images), str(sibling)))
    return _named(images, None)


def _idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """IDX: two zero bytes, 8 (unsigned byte), the number of axes, their sizes big-endian, the bytes. Maybe gzipped."""
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    head = 4 + 4 * ndim
    if raw[:4] != bytes((0, 0, 8, ndim)) or len(raw) < head:
        raise ValueError(
            f"{path} is not an IDX file of {'images' if ndim == 3 else 'labels'}: it starts with {raw[:4].hex(' ')!r}, "
            f"not '00 00 08 {ndim:02x}' and {ndim} sizes; accepted: {_ACCEPTED}"
        )
    shape = struct.unpack(f">{ndim}I", raw[4:head])
    expected = math.prod(shape)
    if len(raw) - head != expected or expected == 0:
        raise ValueError(f"{path} holds {len(raw) - head} bytes where {shape} needs {expected}; download it again")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()


def _converted(data: Data, size: int | None, channels: int | None) -> Data:
    _, c, h, w = data.images.shape
    if (size is None or (size == h and size == w)) and channels in (None, c):
        return data
    pillow, _ = _pillow()
    tiles = data.images.transpose(0, 2, 3, 1)
    made = [
        _fitted(pillow, pillow.fromarray(np.ascontiguousarray(t[..., 0] if c == 1 else t)), size, channels)
        for t in tiles
    ]
    return data._replace(images=np.stack(made))


def _folder(root: Path, size: int | None, channels: int | None, broken: str) -> Data:
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    flat = _images_in(root, deep=False)
    if classes and flat:
        raise ValueError(f"{root} has images both in it ({flat[0].name}) and in subfolders; move one kind elsewhere")
    files = [(file, k) for k, name in enumerate(classes) for file in _images_in(root / name, deep=True)]
    files = files or [(file, 0) for file in flat]
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    first = Path()
    for file, k in files:
        try:
            image = _read_image(file, size, channels)
        except ValueError as error:
            if broken == "stop":
                raise
            warnings.warn(f"skipped: {error}", stacklevel=3)
            continue
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{file} has (C, H, W) = {image.shape} where {first} has {images[0].shape}; pass size= or channels="
            )
        first = first if images else file
        images.append(image)
        labels.append(k)
    if not images:
        raise ValueError(f"{root} holds no readable image ({', '.join(SUFFIXES)}); accepted: {_ACCEPTED}")
    return Data(np.stack(images), np.array(labels, np.int64) if classes else None, tuple(classes))


def _images_in(folder: Path, *, deep: bool) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(f for f in found if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file())


def _read_image(file: Path, size: int | None, channels: int | None) -> NDArray[np.uint8]:
    """(C, H, W). ValueError names the file when Pillow cannot read it whole."""
    pillow, exif_transpose = _pillow()
    try:
        with pillow.open(file) as image:
            return _fitted(pillow, exif_transpose(image), size, channels)
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        pillow.DecompressionBombError,
    ) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove it, or pass broken='skip'") from error


def _fitted(pillow: Any, image: Any, size: int | None, channels: int | None) -> NDArray[np.uint8]:
    """A Pillow image as (C, H, W), cut and resized to `size`, in `channels`."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, of no known range")
    if image.mode.startswith("I"):
        # 16 bits: Pillow's own conversion would clip at 255 instead of scaling
        image = pillow.fromarray(np.round(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    grey = image.mode in ("1", "L")
    wanted = _MODES[channels] if channels else "RGBA" if has_alpha else "L" if grey else "RGB"
    if has_alpha and wanted != "RGBA":
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    image = image.convert(wanted)
    if size is not None and image.size != (size, size):
        w, h = image.size
        side, left, top = min(w, h), max(0, w - h) // 2, max(0, h - w) // 2
        image = image.resize((size, size), pillow.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    array = np.asarray(image)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image
        from PIL.ImageOps import exif_transpose
    except ImportError as error:
        raise ImportError("reading or converting images needs the Pillow package: pip install pillow") from error
    return Image, exif_transpose
