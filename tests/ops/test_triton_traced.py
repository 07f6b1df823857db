"""Triton kernels in a graph, traced on fake CUDA tensors where there is no GPU: which node, and what it writes to."""

import contextlib
import importlib

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from fastdiff import row
from fastdiff.ops import jit, library
from tests.ops import aot

if jit.INTERPRETED:
    pytest.skip("the interpreter's kernels are in no graph", allow_module_level=True)


@pytest.fixture
def fake():
    """CUDA tensors without memory, and a device to ask for its kind."""
    with aot.driver("sm_90"), FakeTensorMode():
        yield


def traced(op, *args):
    """The kernel nodes of torch.ops.fastdiff.<op>_triton(*args) in Inductor's graph, and the other nodes."""
    if not hasattr(torch.ops.fastdiff, f"{op.rstrip('_')}_triton"):
        library._define(op, "triton", importlib.import_module(library._stem(op, "triton")).run)
    places = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    mutated = [i for i, a in enumerate(library._described[op].schema.split(", ")) if "!" in a]

    def call(*tensors):
        given = list(args)
        for i, tensor in zip(places, tensors, strict=True):
            given[i] = tensor.clone() if i in mutated else tensor
        out = library.registered(op, "triton")(*given)
        return tuple(
            out if isinstance(out, list | tuple) else [out] if out is not None else (given[i] for i in mutated)
        )

    graph = aot_export_joint_simple(call, tuple(args[i] for i in places), trace_joint=False).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    kernels = [node for node in calls if "triton_kernel_wrapper_functional" in str(node.target)]
    return kernels, [str(node.target) for node in calls if node not in kernels]


def whole(*shape, dtype=torch.int64):
    return torch.empty(shape, dtype=dtype, device="cuda")


def real(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def test_q_sample(fake):
    (kernel,), others = traced(
        *("q_sample", real(4, 3, 32, 32), whole(4), real(10, 2), None, whole(1), whole(4)),
        *(real(4, 1, 1, 1, dtype=torch.bool), 0, 2, True, False),
    )
    assert kernel.kwargs["tensors_to_clone"] == ["x_t", "eps"]
    assert kernel.kwargs["grid"] == [(3, 4, 1)]
    assert not any("clone" in name for name in others)


def test_normal(fake):
    (kernel,), _ = traced("normal", whole(1), whole(4), 3, 1, [3, 8, 8])
    assert kernel.kwargs["tensors_to_clone"] == ["z"]


def test_time_embed(fake):
    """The table is made in the graph: a copy from the host would keep it out of CUDA graphs."""
    (kernel,), others = traced("time_embed", real(4), 64, 1e4, False, 0.0, 1.0, None)
    assert kernel.kwargs["tensors_to_clone"] == ["e"]
    assert not any("lift" in name for name in others)
    assert kernel.kwargs["kwargs"]["parts"].meta["val"].device.type == "cuda"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variance", [None, "moment"])
@pytest.mark.parametrize("noise", [False, True])
def test_step(fake, layout, variance, noise):
    """The analysis of what a kernel writes to must find the state and nothing else: the rest would be copied."""
    x, h = real(4, 3, 8, 8), real(3, 4, 3, 8, 8)
    F = real(8, 6 if variance else 3, 8, 8, dtype=torch.bfloat16).to(memory_format=layout)
    x_in = real(8, 3, 8, 8, dtype=torch.bfloat16).to(memory_format=layout)
    (kernel,), others = traced(
        *("step_", x, x_in, h, F, real(64, row.COLUMNS), whole(1), whole(4), whole(1)),
        *(variance, real(4, 3, 8, 8) if noise else None, whole(4)),
    )
    assert kernel.kwargs["tensors_to_clone"] == ["x", "x_in", "h", "bad"]
    assert sum("clone" in name for name in others) == 4


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or contextlib.nullcontext())
    x = torch.zeros(3)
    jit.launch({(4,): lambda *args, **options: seen.append((args, options))}, (4,))(x, 5, COUNT=6)
    assert seen[0] is x
    assert seen[1] == ((x, 5), {"COUNT": 6})
