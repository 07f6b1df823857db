"""ONNX Runtime: all graph optimisations (NCHWc layout, fused SiLU), threads that spin, as is its default."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.engines.export import Call, Export

PACKAGE, FORM = "onnxruntime", "onnx"
SETTINGS = "fp32, ORT_ENABLE_ALL, intra_op_num_threads, spinning"


def load(export: Export, threads: int) -> Call:
    """The session as a function of torch's tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(export.onnx()), options, providers=["CPUExecutionProvider"])
    # an input that does nothing is not in the graph
    names, wanted = export.names, {given.name for given in session.get_inputs()}

    def run(*given: Tensor | None) -> Tensor:
        feed = {n: v.numpy() for n, v in zip(names, given, strict=False) if v is not None and n in wanted}
        return torch.from_numpy(session.run(None, feed)[0])

    return run
