"""MNN: static shapes, precision high (fp32), its own choice of Winograd, which is on."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.engines.export import Call, Export, converted, python

PACKAGE, FORM = "MNN", "onnx"
SETTINGS = "precision high, power high, memory normal, shape_mutable off, Winograd on"

# the package's `mnnconvert` reports to its makers, and installs what it needs for that
CONVERT = "import MNN, _tools, sys; _tools.mnnconvert(sys.argv)"


HINT = 3
"""Number of WINOGRAD_MEMORY_LEVEL, 0 to 3: the higher, the larger tiles may be. MNN's own choice is 3."""


def load(export: Export, threads: int, level: int | None = None) -> Call:
    """The module as a function of torch's tensors; level: of the hint, None as MNN has it."""
    import MNN.expr as F
    import MNN.nn

    made = export.folder / "net.mnn"
    args = ("-f", "ONNX", "--modelFile", export.onnx(), "--MNNModel", made, "--bizCode", "fastdiff")
    converted(python(CONVERT, *args), made)
    options = {"backend": 0, "numThread": threads, "precision": "high", "memory": "normal", "power": "high"}
    manager = MNN.nn.create_runtime_manager((options,))
    if level is not None:
        manager.set_hint(HINT, level)
    net = MNN.nn.load_module_from_file(
        str(made), list(export.names), ["F"], runtime_manager=manager, shape_mutable=False
    )

    def constant(v: Tensor) -> object:
        if v.is_floating_point():
            return F.const(v.numpy(), list(v.shape), F.NCHW, F.float)
        return F.const(v.int().numpy(), list(v.shape), F.NCHW, F.int)

    def run(*given: Tensor | None) -> Tensor:
        (y,) = net.forward([constant(v) for v in given if v is not None])
        return torch.from_numpy(F.convert(y, F.NCHW).read()).clone()

    return run
