"""Images out: tensors in [-1, 1] to uint8, grids, numbered PNG files that say how they were made, npz for metrics.

    x = u / 127.5 - 1,    u = round(127.5 (x + 1)) clipped to 0..255

Every file appears whole or not at all.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastdiff.files.atomic import replace_file

if TYPE_CHECKING:
    from torch import Tensor

Bytes = NDArray[np.uint8]
CHANNELS = (1, 3, 4)
"""Grey, RGB, RGBA: what a PNG holds."""
KEY = "fastdiff"
"""The PNG text chunk that carries the metadata, as JSON."""
GAP = 255
"""The grey level between the images of a grid; alpha is 255 there too."""


@overload
def to_uint8(x: Tensor) -> Tensor: ...
@overload
def to_uint8(x: NDArray[np.floating[Any]]) -> Bytes: ...
def to_uint8(x: Any) -> Any:
    """u = round(127.5 (x + 1)) clipped to 0..255, halves to even. A tensor gives a tensor, an array an array.

    Half precision is computed in float32. ValueError: NaN, which has no colour, or x that is not floating point.
    """
    if isinstance(x, np.ndarray):
        if not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"x: expected floating point in [-1, 1], got {x.dtype}; uint8 needs no conversion")
        if np.isnan(x).any():
            raise ValueError(f"x has {int(np.isnan(x).sum())} NaN among {x.size} values; check the sampler's output")
        y = x.astype(np.result_type(x.dtype, np.float32), copy=False)
        return np.clip(np.round(127.5 * (y + 1)), 0, 255).astype(np.uint8)
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating point in [-1, 1], got {x.dtype}; uint8 needs no conversion")
    x = x.detach()
    if x.isnan().any():
        raise ValueError(f"x has {int(x.isnan().sum())} NaN among {x.numel()} values; check the sampler's output")
    x = x if x.element_size() == 8 else x.float()
    return (127.5 * (x + 1)).round().clamp(0, 255).byte()


@overload
def from_uint8(u: Tensor) -> Tensor: ...
@overload
def from_uint8(u: Bytes) -> NDArray[np.float32]: ...
def from_uint8(u: Any) -> Any:
    """x = u / 127.5 - 1, float32. A tensor gives a tensor, an array an array."""
    if isinstance(u, np.ndarray):
        if u.dtype != np.uint8:
            raise ValueError(f"u: expected uint8, got {u.dtype}; pass the image's bytes")
        return u.astype(np.float32) / np.float32(127.5) - np.float32(1)
    if str(u.dtype) != "torch.uint8":
        raise ValueError(f"u: expected uint8, got {u.dtype}; pass the image's bytes")
    return u.float() / 127.5 - 1


def grid(images: Bytes, columns: int | None = None, pad: int = 2, scale: int | None = None) -> Bytes:
    """Lay uint8 images (N, C, H, W) out row by row as one (H', W', C) image, `pad` pixels between and around them.

    Each image is enlarged `scale` times, pixel by pixel; default: enough to be at least 64 pixels high. Columns: by
    default ceil(sqrt(N)). Gaps and empty places are white.
    """
    images = _images(images)
    n, c, h, w = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    scale = max(1, math.ceil(64 / h)) if scale is None else scale
    for name, value, least in (("columns", columns, 1), ("pad", pad, 0), ("scale", scale, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: expected an integer >= {least}")
    columns = min(columns, n)
    tiles = images.transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    down, right = h * scale + pad, w * scale + pad
    out = np.full((math.ceil(n / columns) * down + pad, columns * right + pad, c), GAP, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = pad + i // columns * down, pad + i % columns * right
        out[top : top + h * scale, left : left + w * scale] = tile
    return out


def check_output(path: str | os.PathLike[str]) -> Literal["png", "npz", "folder"]:
    """What `path` will be: a PNG, an npz, or (no suffix) a folder of PNGs. Call it before sampling, not after.

    ValueError: another suffix. FileNotFoundError, NotADirectoryError, OSError: the place cannot be written to.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    kind: Literal["png", "npz", "folder"]
    if path.is_dir() or not suffix:
        kind = "folder"
    elif suffix in (".png", ".npz"):
        kind = "png" if suffix == ".png" else "npz"
    else:
        raise ValueError(f"{path}: the suffix {path.suffix!r} is unknown; end it in .png or .npz, or name a folder")
    place = path if path.is_dir() else path.parent
    if kind == "folder" and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; end the path in .png or .npz, or name a folder")
    if not place.is_dir():
        kinds = (NotADirectoryError, "is not a folder") if place.exists() else (FileNotFoundError, "does not exist")
        raise kinds[0](f"{path}: its parent {place} {kinds[1]}; choose another path or make the folder first")
    try:
        # trying is the only test that knows about read-only disks, quotas and access lists
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise OSError(
            error.errno, f"{path}: cannot write to {place} ({error.strerror}); choose another path"
        ) from error
    if kind != "npz":
        _pillow()
    return kind


def save_grid(
    x: Tensor | NDArray[Any],
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    scale: int | None = None,
    meta: dict[str, Any] | None = None,
) -> None:
    """Write images (N, C, H, W), floats in [-1, 1] or uint8 with 1, 3 or 4 channels, as one PNG (see `grid`)."""
    _check_suffix(path, ".png")
    _save_png(grid(_images(x), columns, scale=scale), Path(path), meta)


def save_images(
    x: Tensor | NDArray[Any],
    folder: str | os.PathLike[str],
    *,
    start: int = 0,
    meta: Sequence[dict[str, Any]] | dict[str, Any] | None = None,
) -> list[Path]:
    """Write images (N, C, H, W) as `000000.png`, ... in `folder` (made if missing), numbered from `start`.

    meta: one dict for each image, or one for all, to which each image's "index" (its number) is added.
    Returns the paths. A killed process leaves whole files only; the disk is not waited for, so a power cut can lose the
    last seconds' files.
    """
    images = _images(x)
    if start < 0:
        raise ValueError(f"start={start}: expected an integer >= 0")
    if meta is None or isinstance(meta, dict):
        metas: list[dict[str, Any] | None] = [
            None if meta is None else {**meta, "index": start + i} for i in range(len(images))
        ]
    else:
        metas = list(meta)
    if len(metas) != len(images):
        raise ValueError(f"meta: {len(metas)} dicts for {len(images)} images; pass one for each, or a single dict")
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{start + i:06d}.png" for i in range(len(images))]
    for image, path, one in zip(images, paths, metas, strict=True):
        _save_png(image.transpose(1, 2, 0), path, one, durable=False)
    return paths


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save_images` or `save_grid` put into a PNG. ValueError: not a PNG, or one without any."""
    try:
        with _pillow().open(path) as image:
            text = image.info.get(KEY)
        found = None if text is None else json.loads(text)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a readable PNG ({error}); check the path") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} carries no {KEY} metadata; only files written by fastdiff do")
    return found


def save_npz(
    x: Tensor | NDArray[Any], path: str | os.PathLike[str], labels: Tensor | NDArray[Any] | None = None
) -> None:
    """Write images (N, C, H, W) as `arr_0`, uint8 (N, H, W, C), as ADM's evaluation reads it, and `labels` int64."""
    _check_suffix(path, ".npz")
    pixels = np.ascontiguousarray(_images(x).transpose(0, 2, 3, 1))
    given = None if labels is None else _array(labels)
    if given is not None and (given.shape != pixels.shape[:1] or not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"labels: expected {len(pixels)} integers, one an image, got {given.dtype} {given.shape}")
    with replace_file(Path(path)) as out:
        if given is None:
            np.savez(out, arr_0=pixels)
        else:
            np.savez(out, arr_0=pixels, labels=given.astype(np.int64))


def _array(x: Any) -> NDArray[Any]:
    return x if isinstance(x, np.ndarray) else np.asarray(x.detach().cpu())


def _images(x: Any) -> Bytes:
    """(N, C, H, W) as uint8 on the host; refuses what a PNG cannot hold."""
    shape = tuple(x.shape)
    if len(shape) != 4 or shape[1] not in CHANNELS or 0 in shape:
        raise ValueError(f"images: expected (N, C, H, W), N >= 1 and C one of {CHANNELS}, got {shape}; reshape them")
    if str(x.dtype) in ("uint8", "torch.uint8"):
        return _array(x)
    return _array(to_uint8(x))


def _check_suffix(path: str | os.PathLike[str], suffix: str) -> None:
    if Path(path).suffix.lower() != suffix:
        raise ValueError(f"path: expected a name that ends in {suffix}, got {os.fspath(path)!r}; rename it")


def _save_png(image: Bytes, path: Path, meta: dict[str, Any] | None, *, durable: bool = True) -> None:
    """(H, W, C), encoded in memory first, so that the file appears whole."""
    pillow = _pillow()
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if meta is not None:
        info.add_text(KEY, json.dumps(meta, sort_keys=True, default=_number))
    encoded = io.BytesIO()
    pillow.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image)).save(
        encoded, format="PNG", pnginfo=info
    )
    with replace_file(path, durable=durable) as out:
        out.write(encoded.getbuffer())


def _number(value: Any) -> Any:
    """NumPy and torch scalars in the metadata (a label, a seed) as Python numbers."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"meta: JSON cannot carry a {type(value).__name__}; use numbers, strings, lists and dicts")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("PNG files need the Pillow package: pip install pillow") from error
    return Image
