"""Every Triton kernel compiled for every target, and what the code must be there: figures, not opinions."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastdiff import row
from fastdiff.ops import jit, normal_triton, q_sample_triton, step_triton, time_embed_triton
from tests.ops import aot

if jit.INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

FEW = ("sm_80", "sm_90")
ONE, LAST = torch.zeros(1, dtype=torch.int64), torch.channels_last
# 2^20 numbers, from where on a thread handles 16
IMAGES, SHAPE = 256, (4, 32, 32)
NUMBERS = IMAGES * 4 * 32 * 32


class Kernel(NamedTuple):
    """A launch, and what is asked of it: bytes a number read and written by 128-bit accesses, instructions a number."""

    launch: Callable[[], list[aot.Launch]]
    read: float
    written: float
    budget: float | None = None
    targets: tuple[str, ...] = FEW


def q_sample(dtype=torch.float32, noise=None, where=None, shape=SHAPE, **given):
    def launch():
        x0, index = torch.zeros(IMAGES, *shape, dtype=dtype), torch.zeros(IMAGES, dtype=torch.int64)
        own = {"seed": ONE, "index": index} if noise is None else {"noise": torch.zeros(x0.shape, dtype=noise)}
        mask = None if where is None else torch.zeros(where, dtype=torch.bool)
        return aot.launches(q_sample_triton.run, x0, index, torch.zeros(10, 2), where=mask, **own, **given)

    return launch


def step(
    dtype=torch.float32, guided=False, variance=None, layout=torch.contiguous_format, pad=0, noise=False, bad=True
):
    def launch():
        x, index = torch.zeros(IMAGES, *SHAPE), torch.zeros(IMAGES, dtype=torch.int64)
        networks, wide = IMAGES * (2 if guided else 1), SHAPE[0] * (2 if variance else 1)
        F = torch.zeros(networks, wide, *SHAPE[1:], dtype=dtype).to(memory_format=layout)
        x_in = torch.zeros(networks, SHAPE[0] + pad, *SHAPE[1:], dtype=dtype).to(memory_format=layout)
        rows = torch.zeros(64, row.COLUMNS)
        return aot.launches(
            *(step_triton.run, x, x_in, torch.zeros(3, *x.shape), F, rows, ONE, index, ONE),
            variance=variance,
            noise=x if noise else None,
            bad=index if bad else None,
        )

    return launch


def normal():
    return aot.launches(normal_triton.run, ONE, torch.zeros(IMAGES, dtype=torch.int64), 0, 0, SHAPE)


def time_embed():
    return aot.launches(time_embed_triton.run, torch.zeros(IMAGES), 4 * 32 * 32)


HALF, EVERY = torch.bfloat16, tuple(aot.TARGETS)
KERNELS = {
    "normal": Kernel(normal, 0, 4, 26, EVERY),
    "q_sample": Kernel(q_sample(), 4, 4, 48, EVERY),
    "q_sample bf16": Kernel(q_sample(HALF), 2, 2, 48),
    "q_sample fp16, eps, v": Kernel(q_sample(torch.float16, eps=True, v=True), 2, 6, 48),
    "q_sample uint8": Kernel(q_sample(torch.uint8), 0, 4, 48),
    "q_sample given noise": Kernel(q_sample(noise=torch.float32, eps=True, v=True), 8, 12, 16),
    "q_sample bf16 given fp32": Kernel(q_sample(HALF, noise=torch.float32), 6, 2, 16),
    "q_sample masked": Kernel(q_sample(where=(1, 1, 32, 32)), 4, 4, 48),
    # history is three loads and a store; x_in is the other store
    "step_": Kernel(step(), 20, 12, 48, EVERY),
    "step_ bf16": Kernel(step(HALF), 18, 10, 48),
    "step_ guided": Kernel(step(guided=True, bad=False), 24, 16, 48),
    "step_ given noise": Kernel(step(noise=True), 24, 12),
    "step_ bf16 guided range": Kernel(step(HALF, guided=True, variance="range"), 22, 12, 64),
    "step_ moment": Kernel(step(variance="moment"), 24, 12, 64),
    "step_ channels_last": Kernel(step(HALF, layout=LAST), 16, 8, 80),
    "step_ channels_last, padded, guided, range": Kernel(step(HALF, True, "range", LAST, 4), 16, 8, 110),
    "time_embed": Kernel(time_embed, 0, 0, 80, EVERY),
}


def often(name, target):
    """Each kernel for one device, those for every device for two, and step_ for every device."""
    return name == "step_" or target == "sm_90" or (target in FEW and KERNELS[name].targets == EVERY)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, t, marks=() if often(name, t) else pytest.mark.slow)
        for name, kernel in KERNELS.items()
        for t in kernel.targets
    ],
)
def test_compiles_to_what_it_should(name, target):
    kernel = KERNELS[name]
    (launch,) = kernel.launch()
    code = aot.compile(launch, target)
    code.check()
    if target not in aot.NVIDIA:
        return
    threads = launch.grid[0] * launch.grid[1] * launch.grid[2] * code.warps * 32
    for opcode, size in (("LDG", kernel.read), ("STG", kernel.written)):
        assert code.accesses(opcode).get(128, 0) * 16 * threads >= size * NUMBERS, code.accesses(opcode)
    if kernel.budget is not None:
        assert code.drawing(NUMBERS) <= kernel.budget
    if name.startswith("step_") and target != "sm_75":
        assert "min.NaN.f32" in code.assembly
        assert "max.NaN.f32" in code.assembly
    if name.startswith("step_") and target == "sm_75":
        # no min.NaN there: as many comparisons with itself as there are numbers
        assert code.count(r"FSETP\.NAN") * threads >= NUMBERS
        assert ".NaN" not in code.assembly


@pytest.mark.parametrize("target", FEW)
def test_images_of_any_size_are_right_though_slower(target):
    """Sizes that 16 does not divide: no vector access may span what is not aligned."""
    (launch,) = q_sample(shape=(3, 7, 5))()
    code = aot.compile(launch, target)
    code.check()
    assert set(code.accesses("STG")) == {32}


@pytest.mark.parametrize("name", ["normal", "q_sample", "step_", "time_embed"])
def test_one_image_where_sizes_of_one_are_constants(name, monkeypatch):
    """torch.compile writes the kernels anew, without do_not_specialize."""
    monkeypatch.setattr(sys.modules[__name__], "IMAGES", 1)
    (launch,) = KERNELS[name].launch()
    plain = triton.jit(launch.kernel.fn)
    aot.compile(launch._replace(kernel=plain), "sm_90").check()


@triton.jit
def _loops(x, y, times, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    total = tl.load(x + i)
    for _ in range(times):
        total = total * total + 1
    tl.store(y + i, total)


def test_the_harness_finds_what_it_looks_for():
    (launch,) = step()()
    starved = aot.compile(launch._replace(options=launch.options | {"maxnreg": 32}), "sm_80")
    with pytest.raises(AssertionError, match="of stack or spill"):
        starved.check()
    with pytest.raises(AssertionError, match="local memory is accessed"):
        starved._replace(stack=0).check()
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        starved._replace(stack=0, sass=(), target="sm_86", shared=100 * 1024).check()
    x = torch.zeros(128)
    (loop,) = aot.launches(lambda: jit.launch(_loops, (1,))(x, x, 5, COUNT=128))
    with pytest.raises(AssertionError, match="a loop"):
        aot.compile(loop, "sm_80").drawing(128)


def test_the_shortest_path_that_draws():
    sass = (
        "ISETP.GE.AND P0, PT, R0, UR4, PT",
        "@P0 EXIT",
        "@!P1 BRA 0x60",
        "MUFU.LG2 R7, R7",
        "FADD R8, R8, -0.5",
        "BRA 0x80",
        "FADD R1, R1, R1",
        "FADD R1, R1, R1",
        "@P2 BRA 0xb0",
        "FADD R1, R1, R1",
        "FADD R1, R1, R1",
        "STG.E.128 desc[UR10][R2.64], R4",
        "EXIT",
    )
    assert aot._shortest(sass, "MUFU.LG2") == 9
    assert aot._shortest(sass, "nothing") == 8
