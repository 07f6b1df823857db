"""ncnn with one image a thread, each by one thread: nothing is split, and nothing waits for another thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from benchmarks.engines.export import Call, Export
from benchmarks.engines.ncnn import PACKAGE, arrays, convert, network

__all__ = ["FORM", "PACKAGE", "SETTINGS", "load"]
FORM = ""  # an export of its own, for one image
SETTINGS = "fp32 storage and arithmetic, Winograd, sgemm and packing on, one image a thread"


def load(export: Export, threads: int) -> Call:
    """The net as a function of torch's tensors."""
    import ncnn

    net, pool = network(convert(export.one(), 1), 1), ThreadPoolExecutor(threads)

    def one(*given: np.ndarray) -> np.ndarray:
        with net.create_extractor() as extractor:
            for i, v in enumerate(given):
                extractor.input(f"in{i}", ncnn.Mat(v))
            failed, y = extractor.extract("out0")
            if failed:
                raise RuntimeError("ncnn gave no output")
            return np.array(y)

    def run(*given: Tensor | None) -> Tensor:
        x, *vectors = arrays(given)
        parts = zip(x, *(v[:, None] for v in vectors), strict=True)
        return torch.from_numpy(np.stack(list(pool.map(lambda part: one(*part), parts))))

    return run
