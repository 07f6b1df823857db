"""The compiled CUDA kernels, `fastdiff._cuda`: here or not."""

from __future__ import annotations

COMPILED_ONLY = "compiled only: it has not run on a GPU yet"


def missing() -> str | None:
    """Why the CUDA kernels cannot run here, None when they can."""
    return "fastdiff._cuda was not built when fastdiff was installed"
