"""ncnn through pnnx: all of its fast paths (Winograd, packing, sgemm) but those of 16 and 8 bits; one call a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines.export import Call, Export, converted

PACKAGE, FORM = "ncnn", "torchscript"
SETTINGS = "fp32 storage and arithmetic, Winograd, sgemm and packing on, the batch in one call"

NARROW = (
    "use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage",
    "use_int8_packed", "use_int8_storage", "use_int8_arithmetic",
)  # fmt: skip
"""Options that are off: less than fp32."""

VECTOR = 233
"""ncnn's "no axis of a Mat is the batch's"."""


def convert(export: Export, images: int) -> Path:
    """The .param for a batch of so many images; its .bin lies beside it."""
    import pnnx

    shapes = [f"[{','.join(map(str, (images, *v.shape[1:])))}]" + ("i64" if i == 2 else "")
              for i, v in enumerate(export.inputs)]  # fmt: skip
    made = export.folder / f"net{images}.ncnn.param"
    kept = {"pnnxparam": "p.param", "pnnxbin": "p.bin", "pnnxpy": "p.py", "pnnxonnx": "p.onnx", "ncnnpy": "n.py"}
    command = [pnnx.EXEC_PATH, str(export.torchscript()), f"inputshape={','.join(shapes)}", "fp16=0"]
    command += [f"{name}={value}" for name, value in kept.items()]
    return converted([*command, f"ncnnparam={made.name}", f"ncnnbin={made.with_suffix('.bin').name}"], made)


def network(path: Path, threads: int) -> Any:
    """The loaded net. Raises RuntimeError where ncnn does not know an operation of it."""
    import ncnn

    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = threads
    for name in NARROW:
        setattr(net.opt, name, False)
    if net.load_param(str(path)) != 0 or net.load_model(str(path.with_suffix(".bin"))) != 0:
        raise RuntimeError("ncnn has no layer for an operation of this network")
    return net


def arrays(given: tuple[Tensor | None, ...]) -> list[Any]:
    """x, t and cond as NumPy's arrays, of the types that ncnn has."""
    x, t, *cond = given
    assert x is not None
    assert t is not None
    return [x.numpy(), t.float().numpy(), *(c.int().numpy() for c in cond if c is not None)]


def load(export: Export, threads: int) -> Call:
    """The net as a function of torch's tensors."""
    import ncnn

    net = network(convert(export, len(export.inputs[0])), threads)

    def run(*given: Tensor | None) -> Tensor:
        x, *vectors = arrays(given)
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(x, batch_index=0))
            for i, v in enumerate(vectors, 1):
                extractor.input(f"in{i}", ncnn.Mat(v, batch_index=VECTOR))
            failed, y = extractor.extract("out0")
            if failed:
                raise RuntimeError("ncnn gave no output")
            # the extractor's memory goes with it
            return torch.from_numpy(y.numpy(batch_index=0)).clone()

    return run
