"""The Triton kernels of group_norm_silu and inject without a GPU: cut to size, compiled ahead of time, traced.

Their numbers are interpreted_group_norm.py's.
"""

import itertools
import re
from typing import NamedTuple

import pytest
import torch

from fastdiff.ops import group_norm_tiles as tiles

pytest.importorskip("triton")

from fastdiff.ops import group_norm_silu_triton, inject_triton, jit, library
from tests.ops import aot
from tests.ops.describe import FLOATS
from tests.ops.test_triton_traced import fake, real, traced  # noqa: F401

if jit.INTERPRETED:
    pytest.skip("compiles, so not under TRITON_INTERPRET=1", allow_module_level=True)


# (N, C, P), groups, channels_last, bytes an element, backward: the tiles on an H100; * in one pass
CHOSEN = {
    ((256, 128, 1024), 32, False, 2, False): "4x1024 *",
    ((256, 128, 1024), 32, True, 2, False): "16x1024 *",
    ((256, 128, 1024), 32, True, 2, True): "8x1024 *",
    ((256, 256, 256), 32, True, 2, False): "16x256 *",
    ((64, 768, 64), 32, True, 2, False): "64x64 *",
    ((64, 384, 1024), 32, False, 2, False): "16x1024 *",
    ((64, 384, 1024), 32, False, 4, True): "4x1024",
    ((64, 384, 1024), 32, True, 2, False): "64x64",
    # one image leaves an H100 idle, unless it is small
    ((1, 320, 4096), 32, False, 2, False): "1x4096",
    ((1, 320, 1024), 32, False, 2, False): "4x1024",
    ((1, 1280, 64), 32, False, 2, False): "64x64 *",
    ((1, 128, 65536), 32, True, 2, False): "64x64",
    # 24 x 24 and 48 x 48 pixels
    ((8, 384, 576), 32, False, 2, False): "16x1024 *",
    ((8, 384, 2304), 32, False, 2, False): "8x512",
    ((2, 96, 49), 32, True, 4, False): "32x64 *",
}


@pytest.mark.parametrize(("given", "wanted"), CHOSEN.items(), ids=str)
def test_the_table_of_choices(given, wanted):
    size, groups, last, bytes_, backward = given
    got = tiles.choose(*size, groups, last, bytes_, 132, backward)
    assert f"{got.block_c}x{got.block_p}" + " *" * got.one_pass == wanted


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_tiles_cover_any_tensor(last, backward):
    sizes = itertools.product((1, 3, 64), (1, 6, 30, 320, 1920), (1, 49, 64, 2304, 65536, 2**24), (2, 4), (20, 132))
    for n, channels, pixels, size, processors in sizes:
        for groups in (1, 2, channels):
            if channels % groups:
                continue
            plan = tiles.choose(n, channels, pixels, groups, last, size, processors, backward)
            group = channels // groups
            assert plan.warps in (1, 2, 4, 8, 16)
            if plan.one_pass:
                assert plan.block_c >= plan.slab
                assert plan.slab % group == 0
                assert plan.block_p >= pixels
                assert not last or plan.slab == channels or plan.slab * size % 16 == 0
            else:
                assert (plan.splits - 1) * plan.steps * plan.block_p < pixels <= plan.splits * plan.steps * plan.block_p
                assert plan.block_c * plan.block_p <= tiles.TILE
                assert plan.steps <= tiles.STEPS
                # offsets within a tile have 32 bits
                assert plan.block_c * pixels < 2**31 or last or plan.block_c == 1
                # one image fills the device, if it has tiles enough
                work = n * tiles.blocks(channels, plan.block_c) * tiles.blocks(pixels, plan.block_p)
                done = n * tiles.blocks(channels, plan.block_c) * plan.splits
                assert done >= min(work, tiles.BLOCKS * processors) / 2


class Shape(NamedTuple):
    size: tuple[int, ...]
    groups: int
    second: int = 0  # channels of x2


ONE_PASS = Shape((64, 128, 32, 32), 32)
SEAM = Shape((64, 640, 16, 16), 32, 320)
SPLIT = Shape((32, 320, 64, 64), 32)
WIDE = Shape((16, 384, 48, 48), 32, 192)

# thread-instructions that an H100 issues while it moves a byte: 3.35e13 / 3.0e12
A_BYTE = 11.1


def launches(shape, dtype, last, op):
    """What a call launches; every small tensor is given, (N, C) where it may be."""
    n, channels = shape.size[:2]

    def image(c):
        x = torch.empty((n, c, *shape.size[2:]), dtype=dtype, device="meta")
        return x.to(memory_format=torch.channels_last) if last else x

    def numbers(*size):
        return torch.empty(size, device="meta")

    each = dict.fromkeys(("add", "scale", "shift"), numbers(n, channels))
    if op == "inject":
        return aot.launches(inject_triton.run, image(channels), act=True, **each)
    if op == "inject and residual":
        return aot.launches(inject_triton.run, image(channels), residual=image(channels), act=True, **each)
    if op == "inject and fp32":
        return aot.launches(inject_triton.run, image(channels), residual=image(channels).float(), act=True, **each)
    if op == "inject backward":
        return aot.launches(inject_triton.run_backward, image(channels), image(channels), act=True, **each)
    x, each["x2"] = image(channels - shape.second), image(shape.second) if shape.second else None
    affine = (shape.groups, numbers(channels), numbers(channels))
    if op == "forward":
        return aot.launches(group_norm_silu_triton.run, x, *affine, **each)
    stats = numbers(n, shape.groups, 3)
    return aot.launches(group_norm_silu_triton.run_backward, image(channels), x, stats, *affine, **each)


def name(launch):
    return launch.kernel.fn.__name__


# x-sized tensors that a kernel reads and writes, by op and kernel; the other kernels touch numbers only
TRAFFIC = {
    ("forward", "one_pass_kernel"): (1, 1),
    ("forward", "sums_kernel"): (1, 0),
    ("forward", "apply_kernel"): (1, 1),
    ("backward", "one_pass_kernel"): (2, 1),
    ("backward", "sums_kernel"): (2, 0),
    ("backward", "gradient_kernel"): (2, 1),
    ("inject", "apply_kernel"): (1, 1),
    ("inject and residual", "apply_kernel"): (2, 1),
    ("inject and fp32", "apply_kernel"): (3, 1),  # as bytes of bf16
    ("inject backward", "sums_kernel"): (2, 1),
}


def loop(code):
    """Instructions of the longest loop, both ends included; 0 without one."""
    longest = 0
    for i, instruction in enumerate(code.sass):
        # an instruction takes 16 bytes
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        if target and int(target[1], 16) // 16 < i:
            longest = max(longest, i + 1 - int(target[1], 16) // 16)
    return longest


def per_element(code, shape):
    """Instructions an element: those of the loop as often as it runs, all others once, padded lanes included."""
    elements = torch.Size(shape.size).numel()
    o = code.launch.options
    whole, body = len(code.sass), loop(code)
    runs = 1
    if body:
        channels, pixels = shape.size[1], torch.Size(shape.size[2:]).numel()
        rows = shape.size[0] * tiles.blocks(channels, o["BLOCK_C"])
        runs = tiles.blocks(tiles.blocks(pixels, o["BLOCK_P"]), code.launch.grid[0] // rows)
    threads = code.launch.grid[0] * 32 * code.warps
    return (whole + body * (runs - 1)) * threads / elements


def check(launch, op, shape, dtype, target):
    code = aot.compile(launch, target)
    code.check()
    if target not in aot.NVIDIA or (op, name(launch)) not in TRAFFIC:
        return
    reads, writes = TRAFFIC[op, name(launch)]
    loads, stores = code.accesses("LDG"), code.accesses("STG")
    # sums and statistics go out in 32 bits
    assert set(stores) <= {32, 128}, stores
    assert (128 in stores) == (writes > 0), stores
    # so do numbers of channels come in; of x nothing does
    words = launch.options["BLOCK_C"] * launch.options["BLOCK_P"] / (32 * code.warps) * dtype.itemsize / 16
    assert 16 not in loads, loads
    assert loads[128] >= words * reads * 5 / 8, (words, loads)
    if target == "sm_90":
        used = per_element(code, shape)
        assert used <= A_BYTE * (reads + writes) * dtype.itemsize, f"{name(launch)}: {used:.1f} instructions an element"


def run(op, shape, dtype, last, target):
    for launch in launches(shape, dtype, last, op):
        check(launch, op, shape, dtype, target)


# test_code_of_everything has the other half
@pytest.mark.parametrize(
    ("op", "shape", "last"),
    [
        (op, shape, (i + (op == "backward")) % 2 == 1)
        for op in ("forward", "backward")
        for i, shape in enumerate((ONE_PASS, SEAM, SPLIT))
    ],
    ids=str,
)
def test_code_for_sm_90(op, shape, last):
    """Every shape by each op, and in each layout."""
    run(op, shape, torch.bfloat16, last, "sm_90")


INJECTIONS = ("inject", "inject and residual", "inject backward")


@pytest.mark.parametrize("op", [*INJECTIONS, "inject and fp32"])
def test_code_of_inject(op):
    run(op, SPLIT, torch.bfloat16, True, "sm_90")


@pytest.mark.parametrize("target", [t for t in aot.TARGETS if t != "sm_90"])
def test_code_for(target):
    """Both ops, both paths and both layouts; which with which goes round from target to target."""
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    turn = list(aot.TARGETS).index(target) % 2 == 1
    run("forward", SPLIT if turn else ONE_PASS, dtype, turn, target)
    run("backward", ONE_PASS if turn else SPLIT, dtype, not turn, target)


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("shape", [ONE_PASS, SEAM, SPLIT, WIDE], ids=str)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_code_of_everything(target, shape, last):
    for op, dtype in itertools.product(("forward", "backward", *INJECTIONS), FLOATS):
        if (target, dtype) != ("sm_75", torch.bfloat16):
            run(op, shape, dtype, last, target)


@pytest.mark.parametrize("last", [False, True])
def test_the_pivot_is_rounded_before_it_is_subtracted(last):
    """Fused into x - sum / P, it would differ from the pivot that the mean is made of: 5e-4 at mean/std = 1e4.

    The interpreter fuses nothing and cannot see this. A thread's FFMAs are two an element, for d^2 and y, and a few.
    """
    (launch,) = launches(ONE_PASS, torch.float32, last, "forward")
    code = aot.compile(launch, "sm_90")
    elements = launch.options["BLOCK_C"] * launch.options["BLOCK_P"] / (32 * code.warps)
    assert 2 * elements - 8 <= code.count(r"\bFFMA\b") <= 3.25 * elements


@pytest.mark.parametrize("op", ["forward", "backward", *INJECTIONS])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 1, 256, 256)], ids=str)
def test_code_where_sizes_are_one(op, size):
    """Triton makes constants of them."""
    for launch in launches(Shape(size, 1), torch.bfloat16, False, op):
        aot.compile(launch, "sm_90").check()


@pytest.fixture
def h100(fake, monkeypatch):  # noqa: F811
    """A fake device with as many multiprocessors."""
    monkeypatch.setattr(tiles, "multiprocessors", lambda _: 132)


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(
    ("pixels", "written"), [((16, 16), [["y", "stats"]]), ((256, 256), [["part"], ["stats"], ["y"]])]
)
def test_in_a_graph(pixels, written):
    """What a kernel writes to is found, and nothing else: the rest would be copied."""
    x, x2, weight, add = real(2, 12, *pixels), real(2, 4, *pixels), real(16), real(2, 16)
    tail = (x2, add, None, None, True)
    kernels, others = traced("group_norm_silu", x, 4, weight, weight, 1e-5, *tail)
    assert [sorted(k.kwargs["tensors_to_clone"]) for k in kernels] == [sorted(names) for names in written]
    assert not any("clone" in name for name in others)
    if not hasattr(torch.ops.fastdiff, "group_norm_silu_backward_triton"):
        library._define("group_norm_silu_backward", "triton", group_norm_silu_triton.run_backward)
    kernels, _ = traced("group_norm_silu_backward", real(2, 16, *pixels), x, real(2, 4, 3), 4, weight, weight, *tail)
    assert sorted(kernels[-1].kwargs["tensors_to_clone"])[:2] == ["dx", "dx2"]


@pytest.mark.usefixtures("h100")
def test_inject_in_a_graph():
    x = real(2, 12, 16, 16)
    for residual in (None, x, real(2, 12, 16, 16)):
        kernels, _ = traced("inject", x, real(12), None, None, residual, True)
        assert [k.kwargs["tensors_to_clone"] for k in kernels] == [["y"]]
