"""Other people's inference engines for CPUs, run on the weights of a torch network, each at its best setting in fp32.

Shapes and the number of threads are fixed, as they are in a sampler's loop. A package that is not installed is a
sentence in the report: `pip install -c constraints.txt ".[rivals]"`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from typing import NamedTuple

from torch import Tensor

from benchmarks.engines.export import Call, Export

__all__ = ["ENGINES", "INSTEAD", "PARALLEL", "Call", "Engine", "Export", "NotThere", "build", "fits"]

PARALLEL = "ncnn, an image a thread"
"""The faster way to run ncnn on a batch."""

ENGINES = {
    "ONNX Runtime": "benchmarks.engines.ort",
    "OpenVINO": "benchmarks.engines.ov",
    "MNN": "benchmarks.engines.mnn",
    "MNN, smaller Winograd tiles": "benchmarks.engines.mnn_small_tiles",
    "ncnn": "benchmarks.engines.ncnn",
    PARALLEL: "benchmarks.engines.ncnn_images",
}
"""Modules that have PACKAGE, FORM of the export, SETTINGS and `load(export, threads)`."""

INSTEAD = {"MNN, smaller Winograd tiles": "MNN"}
"""Slower settings of an engine, for a network where the fast ones err too much."""


def fits(name: str, images: int, threads: int) -> bool:
    """Whether this way of running an engine means anything for so many images and threads."""
    return name != PARALLEL or 1 < threads <= images


class NotThere(RuntimeError):
    """This engine cannot run this network here; says why."""


class Engine(NamedTuple):
    """An engine that has given its first output."""

    name: str
    """With its version."""
    run: Call
    ready: float
    """Seconds from the torch network to the first output: export, conversion, load and one call."""
    settings: str


def build(name: str, export: Export, threads: int) -> Engine:
    """The engine of this name on an exported network. Raises NotThere."""
    module = importlib.import_module(ENGINES[name])
    # an export that another engine asked for before is counted as if this one had
    begin, shared = time.perf_counter(), export.seconds(module.FORM)
    try:
        version = importlib.metadata.version(module.PACKAGE)
        run: Call = module.load(export, threads)
        first = run(*export.inputs)
    # whatever it is, it is this engine's and not the report's
    except Exception as error:
        raise NotThere(": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])) from error
    seconds = shared + time.perf_counter() - begin
    if not isinstance(first, Tensor) or first.shape != export.expected:
        raise NotThere(f"its output has shape {tuple(first.shape)}, not {tuple(export.expected)}")
    return Engine(f"{name} {version}", run, seconds, module.SETTINGS)
