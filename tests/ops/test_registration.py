"""The ops as torch.library knows them: opcheck, fake kernels with true strides, torch.compile without a graph break."""

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff.ops import (
    attention,
    dispatch,
    group_norm_silu,
    inject,
    norm_linear,
    norm_silu_conv,
    normal,
    pack,
    philox,
    q_sample,
    step_,
    time_embed,
)
from tests.ops import describe, sweep
from tests.ops.cases import Case, copied, inputs, run
from tests.ops.describe_all import DESCRIPTIONS, cells_of
from tests.process import python

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]

BACKEND = "cpp"
needs_kernels = pytest.mark.skipif(dispatch.reason("q_sample", BACKEND) is not None, reason="no compiled kernels here")


class Calls(TorchDispatchMode):
    """Records the calls of fastdiff's ops, and those whose fake kernel tells another shape, dtype or stride."""

    def __init__(self):
        super().__init__()
        self.found, self.wrong = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastdiff":
            self.found.append((func, args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fastdiff":
            self.wrong += [f"{func}: {line}" for line in unlike(out, faked(func, args, kwargs or {}))]
        return out


def faked(func, args, kwargs):
    mode = FakeTensorMode()
    convert = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in args]
    given = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    with mode:
        return func(*convert, **given)


def told(v):
    return (tuple(v.shape), v.dtype, tuple(v.stride()))


def unlike(real, fake):
    """Differences of one result, or of a list of them."""
    real, fake = ([] if v is None else [v] if isinstance(v, Tensor) else list(v) for v in (real, fake))
    if len(real) != len(fake):
        return [f"{len(real)} results, told {len(fake)}"]
    # strides of nothing, and over axes of one number, mean nothing
    return [
        f"{told(r)}, told {told(f)}"
        for r, f in zip(real, fake, strict=True)
        if r.shape != f.shape or r.dtype != f.dtype or (r.numel() and effective(r) != effective(f))
    ]


def effective(v):
    return [step for step, size in zip(v.stride(), v.shape, strict=True) if size != 1]


def calls(name, cell):
    with dispatch.backend(BACKEND), Calls() as calls:
        DESCRIPTIONS[name].call(describe.made(DESCRIPTIONS[name], cell))
    return calls


@needs_kernels
@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_fake_kernels_tell_the_true_strides(name, every):
    if not sweep.runs(DESCRIPTIONS[name], BACKEND):
        pytest.skip(f"no {BACKEND} kernel yet")
    seen = 0
    for cell in cells_of(name)[::every]:
        if cell.get("out"):
            continue  # not of the schema
        made = calls(name, cell)
        assert not made.wrong, f"{describe.named(cell)}: {made.wrong}"
        seen += len(made.found)
    assert seen >= 50 / every


def test_a_wrong_fake_is_seen():
    x = torch.zeros(2, 3, 4, 5)
    assert not unlike([x, x], [x, x])
    assert unlike([x], [x.to(memory_format=torch.channels_last)])
    assert unlike([x], [x.half()])
    assert unlike(x, x[:1])
    assert unlike([x], [])


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def checked(func, args, kwargs, utils):
    """opcheck with fresh inputs; those that are floats require grad where the op is differentiable."""
    differentiable = not func._schema.is_mutable and "backward" not in str(func)
    fresh = [v.detach().clone() if isinstance(v, Tensor) else v for v in args]
    if differentiable:
        for v in fresh:
            if isinstance(v, Tensor) and v.is_floating_point() and v.dtype != torch.float16 and v.ndim != 2:
                v.requires_grad_()
    torch.library.opcheck(func, tuple(fresh), kwargs, test_utils=utils)


@needs_kernels
@pytest.mark.parametrize("traced", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_opcheck(traced):
    """On cells with and without options, of several layouts; the backward ops by the calls of the gradients.

    So many calls of each op are also traced as torch.compile does, which takes ten times as long as the rest.
    """
    done = {}
    for name in (name for name in DESCRIPTIONS if sweep.runs(DESCRIPTIONS[name], BACKEND)):
        for cell in list(filter(_checkable, cells_of(name)))[:3]:
            for func, args, kwargs in calls(name, cell).found:
                if done.setdefault(str(func), 0) < 3:
                    traces = done[str(func)] < traced
                    checked(func, args, kwargs, (*QUICK, "test_aot_dispatch_dynamic") if traces else QUICK)
                    done[str(func)] += 1
    every = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastdiff::") and n.endswith(BACKEND)]
    assert set(done) == {n.replace("::", ".") + ".default" for n in every}
    assert min(done.values()) == 3


def _checkable(cell):
    """opcheck compares without NaN and cannot copy what is empty."""
    size = cell.get("shape", cell.get("spec", (1,)))
    return cell.get("regime", "plain") == "plain" and cell.get("t") not in ("nan", "none") and not cell.get("out") and (
        0 not in size[:1] and 0 not in (size[3] if "spec" in cell else size)
    )  # fmt: skip


# torch.compile -------------------------------------------------------------------------------------------------------


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _q_sample(x0):
    table, t = torch.tensor([[0.9, 0.3], [0.4, 0.8]]), torch.tensor([1, 0])
    key, index = philox.seed_tensor(torch.tensor([5])), torch.tensor([3, 4])
    return q_sample(
        x0, t, table, seed=key, index=index, eps=True, v=True, where=torch.tensor([True, False])[:, None, None]
    )


COMPILED = {
    "q_sample": (_q_sample, (2, 3, 5)),
    "group_norm_silu": (
        lambda x: group_norm_silu(x, 2, torch.ones(6), torch.ones(6), x2=x[:, :2], add=x[:, :, 0].repeat(1, 2)[:, :6]),
        (2, 4, 5),
    ),
    "channels last": (
        lambda x: group_norm_silu(x.to(memory_format=torch.channels_last), 2, None, None, scale=x[:, :, 0, 0]),
        (2, 4, 5, 3),
    ),
    "inject": (lambda x: inject(x, add=x[:, :, 0], shift=torch.ones(4), residual=2 * x, act=True), (2, 4, 5)),
    "norm_silu_conv": (
        lambda x: norm_silu_conv(
            x,
            torch.ones(5, 6, 3, 3),
            x[0, 0, 0, :5],
            groups=3,
            x2=x[:, :2],
            scale=x[:, :, 0].flatten(1)[:, :6],
        ),
        (2, 4, 3, 6),
    ),
    "a halving convolution": (lambda x: norm_silu_conv(x, pack(torch.ones(5, 4, 3, 3)), stride=2), (2, 4, 5, 6)),
    "attention": (lambda x: attention(2 * x, 2), (2, 5, 18)),
    "norm_linear": (
        lambda x: norm_linear(2 * x, torch.ones(8, 18), x[0, 0, :8], norm=True, gate=True, residual=x[..., :4]),
        (2, 5, 18),
    ),
    "time_embed": (lambda t: time_embed(t, 7, flip=True, scale=3.0), (5,)),
}


def ops_in(counter):
    return {str(n.target) for graph in counter.graphs for n in graph.graph.nodes if "fastdiff" in str(n.target)}


@needs_kernels
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        pytest.param(name, dynamic, marks=pytest.mark.slow if (i + dynamic) % 2 else ())
        for i, name in enumerate(COMPILED)
        for dynamic in (False, True)
    ],
)
def test_compile(name, dynamic):
    """One graph with the registered op in it, its result and its gradient bit-equal to the eager call's."""
    function, shape = COMPILED[name]
    op = {"channels last": "group_norm_silu", "a halving convolution": "norm_silu_conv"}.get(name, name)
    if BACKEND not in dispatch._table[op]:
        pytest.skip(f"no {BACKEND} kernel yet")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    frames = []
    for seed in (0, 1):
        x, y = drawn(*shape, seed=seed).requires_grad_(), drawn(*shape, seed=seed).requires_grad_()
        with dispatch.backend(BACKEND):
            wanted, got = function(x), compiled(y)
        pairs = list(zip(*((v,) if isinstance(v, Tensor) else v for v in (wanted, got)), strict=True))
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)
        sum(a.square().sum() for a, _ in pairs).backward()
        sum(b.square().sum() for _, b in pairs).backward()
        assert torch.equal(x.grad, y.grad)
        frames.append(counter.frame_count)
    # a call with dynamic sizes may be traced twice; the second one finds it done
    assert frames[0] == frames[1] <= 1 + dynamic
    assert ops_in(counter) == {f"fastdiff.{op}_{BACKEND}.default"} or ops_in(counter) == {f"fastdiff.{op}_{BACKEND}"}


FIRST = """
import torch
from fastdiff.ops import group_norm_silu, time_embed

def f(x, t):
    return group_norm_silu(x, 2, None, None) + time_embed(t, 4)[:, :, None]

x, t = torch.randn(3, 4, 5, 1), torch.arange(3)
with torch.no_grad():
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(x[..., 0], t)
    assert torch.equal(compiled, f(x[..., 0], t))
"""


def test_compiling_is_the_first_thing_that_a_process_does():
    """Kernels are then imported, and their table of functions changed, while dynamo traces."""
    done = python("-c", FIRST)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_kernels
@pytest.mark.filterwarnings("ignore:Using .torch.compile.module")
def test_a_compiled_function_under_a_dispatch_mode():
    """It runs eagerly there, and dynamo looks at what it calls: not at launchers, whose addresses are not constants."""
    torch._dynamo.reset()

    def f(x, t):
        return group_norm_silu(x, 2, None, None) + time_embed(t, 4)[:, :, None, None]

    compiled = torch.compile(f, backend="aot_eager")
    for seed in range(3):
        x, t = drawn(3, 4, 5, 2, seed=seed), torch.arange(3)
        with torch.no_grad():
            wanted = f(x, t)
            assert torch.equal(compiled(x, t), wanted)
            with Calls():
                assert torch.equal(compiled(x, t), wanted)  # a warning that dynamo cannot trace them is an error here
            assert torch.equal(compiled(x, t), wanted)


@needs_kernels
def test_compile_of_what_has_no_gradient():
    key, index = philox.seed_tensor(5), torch.arange(3)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def both(x, x_in, h, F, rows, k, index, seed):
        step_(x, x_in, h, F, rows, k, index, seed)
        return x + normal(key, index, 7, 3, tuple(x.shape[1:]))

    args = inputs(Case(guided=True, columns=("A", "B0", "B1", "S", "Q")))
    first = ("x", "x_in", "h", "F", "rows", "k", "index", "seed")
    wanted = copied(args)
    with dispatch.backend(BACKEND):
        run(step_, wanted)
        y = both(*(args[name] for name in first))
        assert torch.equal(y, wanted["x"] + normal(key, args["index"], 7, 3, tuple(y.shape[1:])))
    for name in ("x", "x_in", "h"):
        assert torch.equal(args[name].nan_to_num(), wanted[name].nan_to_num())
    assert {name.split(".")[1] for name in ops_in(counter)} == {f"step_{BACKEND}", f"normal_{BACKEND}"}
    assert index.tolist() == [0, 1, 2]


def training_step(net, x, t):
    loss = (net(x, t) - x).square().mean()
    return loss, torch.autograd.grad(loss, list(net.parameters()))


def small():
    torch.manual_seed(0)
    net = fd.UNet(in_channels=2, channels=8, mults=(1, 2), blocks=1, attention=(2,), groups=4, scale_shift=True)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return net


@needs_kernels
@pytest.mark.parametrize("channels_last", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_training_step(channels_last):
    """Forward and backward of a U-Net in one graph, on the kernels, with the eager step's loss and gradients."""
    if not all(BACKEND in dispatch._table[op] for op in ("group_norm_silu", "time_embed")):
        pytest.skip(f"no {BACKEND} kernels yet")
    torch._dynamo.reset()
    net = small()
    rival = copy.deepcopy(net)
    x, t = drawn(2, 2, 8, 8), torch.tensor([3.0, 400.0])
    if channels_last:
        net, rival, x = (v.to(memory_format=torch.channels_last) for v in (net, rival, x))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with dispatch.backend(BACKEND):
        loss, gradients = training_step(rival, x, t)
        got_loss, got = training_step(compiled, x, t)
    assert abs(loss - got_loss) <= 1e-6 * abs(loss)
    for a, b in zip(gradients, got, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-7
    assert counter.frame_count == 1
    assert {name.split(".")[1] for name in ops_in(counter)} == {f"group_norm_silu_{BACKEND}", f"time_embed_{BACKEND}"}


@needs_kernels
@pytest.mark.slow
def test_a_training_step_through_inductor():
    torch._dynamo.reset()
    net, x, t = small(), drawn(2, 2, 8, 8), torch.tensor([3.0, 400.0])
    rival = copy.deepcopy(net)
    with dispatch.backend(BACKEND):
        loss, gradients = training_step(rival, x, t)
        got_loss, got = training_step(torch.compile(net, fullgraph=True), x, t)
    assert abs(loss - got_loss) <= 1e-5 * abs(loss)
    for a, b in zip(gradients, got, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6
