"""The compiled CUDA kernels, `fastdiff._cuda`: here or not, and how they are called.

Kernels take addresses, sizes, a device's number and a stream. Their caller has checked shapes, dtypes and devices.
Importing them needs no driver; the CUDA runtime inside is first called when a kernel is launched.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

COMPILED_ONLY = "compiled only: it has not run on a GPU yet"

CAPABILITY = (8, 0)
"""The oldest devices that the kernels are written for."""


def _load() -> tuple[Any, str | None]:
    try:
        from fastdiff import _cuda
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            return None, "fastdiff._cuda was not built when fastdiff was installed"
        return None, f"fastdiff._cuda does not load: {error}"
    return _cuda, None


kernels, _missing = _load()


def missing() -> str | None:
    """Why the CUDA kernels cannot run here, None when they can."""
    if _missing is not None:
        return _missing
    if not torch.cuda.is_available():
        return "fastdiff._cuda was built, but torch sees no GPU here"
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if max(found) < CAPABILITY:
        newest = ".".join(map(str, max(found)))
        return f"the CUDA kernels need a GPU of compute capability 8.0 or newer, the newest here has {newest}"
    return None


def refuses(*tensors: Tensor | None) -> str | None:
    """Why no CUDA kernel takes these tensors: where they lie."""
    for x in tensors:
        if x is not None and x.device.type != "cuda":
            return f"the CUDA kernels run on cuda tensors, got one on {x.device}"
    return None


def queue(x: Tensor) -> tuple[int, int]:
    """The device of x and torch's current stream on it, as numbers."""
    index = x.device.index
    return index, torch.cuda.current_stream(index).cuda_stream


@functools.cache
def device(index: int) -> Any:
    """What plans need to know of a device."""
    return kernels.device(index)
