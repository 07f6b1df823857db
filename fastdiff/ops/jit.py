"""Triton kernels: whether they can run here, and how they are launched.

TRITON_INTERPRET=1, set before the process starts, runs them on CPU tensors in Triton's interpreter: slow, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

UNPROVEN = "proved in Triton's interpreter and by compiling it, not yet run on a GPU"


def missing() -> str | None:
    """Why no Triton kernel can run here, None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU here"
    return None


def refuses(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel takes these tensors: where they lie."""
    accepted = "cpu" if INTERPRETED else "cuda"
    for x in tensors:
        if x is not None and x.device.type != accepted:
            return f"the Triton kernels run on {accepted} tensors here, got one on {x.device}"
    return None


def traced() -> bool:
    """Whether a call is put into a graph, or a mode looks at it."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
    """kernel[grid], in the form that torch.compile sees through while it traces. A tensor is the first argument."""
    if traced():
        return torch.library.wrap_triton(kernel)[grid]
    return kernel[grid] if INTERPRETED else functools.partial(_on_its_device, kernel[grid])


def _on_its_device(run: Any, first: Tensor, *args: Any, **options: Any) -> None:
    """Triton launches on the current device, which need not be that of the tensors."""
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        run(first, *args, **options)
