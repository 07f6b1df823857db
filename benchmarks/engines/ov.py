"""OpenVINO: one stream of all threads, fp32 asked for, threads not pinned, since other engines share the process."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.engines.export import Call, Export

PACKAGE, FORM = "openvino", "onnx"
SETTINGS = "LATENCY, INFERENCE_PRECISION_HINT f32, INFERENCE_NUM_THREADS, unpinned"


def load(export: Export, threads: int, precision: str = "f32") -> Call:
    """The compiled model as a function of torch's tensors; precision: the lowest that products may be computed in."""
    import openvino

    core = openvino.Core()
    model = core.compile_model(
        core.read_model(str(export.onnx())),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,
        },
    )
    request = model.create_infer_request()
    names = export.names
    wanted = [name for port in model.inputs for name in names if name in port.get_names()]

    def run(*given: Tensor | None) -> Tensor:
        by_name = {n: v.numpy() for n, v in zip(names, given, strict=False) if v is not None}
        request.infer({n: by_name[n] for n in wanted}, share_inputs=True, share_outputs=True)
        # the request's own memory, which the next call writes to
        return torch.from_numpy(request.get_output_tensor(0).data).clone()

    return run
