"""The CUDA kernels' own code, run as plain C++ with every thread a fiber (tests/ops/emulated_cuda), against float64.

It runs indices, barriers, shuffles, clusters and the launchers in front. It cannot show races between threads of one
phase beyond the two orders tried, the accuracy of the GPU's approximate functions, or anything about time.
"""

import itertools
import math
import random
import shutil

import pytest
import torch

from fastdiff import row
from fastdiff.ops import cuda, group_norm_silu_cuda, inject_cuda, normal_cuda, philox, q_sample_cuda, step, step_cuda
from fastdiff.ops.group_norm_silu import group_norm_silu_ref, layout
from fastdiff.ops.inject import inject_ref
from fastdiff.ops.q_sample import q_sample_ref
from tests.ops import emulated
from tests.ops.cases import CASES as STEPS, Case as Step, copied, inputs, run
from tests.ops.describe import laid
from tests.ops.test_cpp import MASKS, noising
from tests.ops.test_group_norm_cpp import CASES as NORMS, NAMES, Case, arguments, by_reference, cast, small_grads
from tests.ops.test_step import allowed, error, written_out

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulated kernels"),
    # the first test compiles them: 25 s alone, minutes beside others
    pytest.mark.timeout(600),
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = {"h100": emulated.H100, "a100": emulated.A100, "ada": emulated.ADA, "small": emulated.SMALL}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("pybind11", reason="pybind11 binds the emulated kernels")
    if library := emulated.given():
        return library, None
    folder = tmp_path_factory.mktemp("emulated")
    *objects, checks = emulated.compile_all([*emulated.SOURCES, emulated.FAKE / "checks.cpp"], folder)
    return emulated.link(objects, folder, "_cuda"), emulated.link([checks], folder, "_checks")


@pytest.fixture(params=DEVICES)
def kernels(request, compiled):
    with emulated.on_the_cpu(compiled[0], DEVICES[request.param]):
        yield compiled[0]


@pytest.fixture
def h100(compiled):
    with emulated.on_the_cpu(compiled[0]):
        yield compiled[0]


def test_columns(compiled):
    assert tuple(compiled[0].columns.split(", ")) == row.NAMES


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 8, 8), (1,), (2, 33), (2, 3, 4, 5), (0, 3)])
def test_normal(h100, shape):
    key, index = philox.seed_tensor(2**64 - 3), torch.tensor([0, 2**35 + 1, 2**31 - 1])
    got = normal_cuda.run(key, index, 2**24 - 1, 255, shape)
    wanted = philox.normal(key, index, 2**24 - 1, 255, shape, torch.float64)
    assert got.shape == wanted.shape
    # the angle is rounded once more than in the reference
    assert got.numel() == 0 or (got - wanted).abs().max() <= 3e-6


def sampled(shape, dtype, **given):
    x0, t, table, noise = noising(shape, dtype)
    args = (x0, t, table)
    own = {"seed": philox.seed_tensor(5), "index": torch.arange(shape[0]) * 3 + 2**33, "step": 9, "stream": 130}
    given = own | given | ({"noise": noise} if given.get("noise") else {})
    return q_sample_cuda.run(*args, **given, eps=True, v=True), q_sample_ref(*args, **given, eps=True, v=True)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8])
@pytest.mark.parametrize(
    "shape", [(3, 2, 5, 7), (4, 3, 16, 16), (2, 8, 13), (2, 1, 3, 5, 3), (0, 3, 4, 4), (2, 3, 0, 4)]
)
@pytest.mark.parametrize("noise", [False, True])
def test_q_sample(h100, shape, dtype, noise):
    got, wanted = sampled(shape, dtype, noise=noise or None)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        if noise or not a.numel():
            assert torch.equal(a, b)
        else:
            # one place of the result where it is narrow
            assert (a.double() - b.double()).abs().max() <= 3e-6 + torch.finfo(a.dtype).eps * b.abs().max()


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 5, 16), (2, 4, 3, 4, 2), (3, 4, 1, 1), (0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("name", MASKS)
def test_masks(h100, name, shape):
    x0, t, table, noise = noising(shape)
    where = MASKS[name](*shape)
    noise[~where.expand(shape)] = math.nan
    given = {"noise": noise, "where": where, "v": True}
    out = torch.full(shape, math.nan)
    got, wanted = q_sample_cuda.run(x0, t, table, **given, out=out), q_sample_ref(x0, t, table, **given)
    assert got[0] is out
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1].isnan(), wanted[1].isnan())


def test_layouts_of_x0(h100):
    x0, t, table, noise = noising((4, 3, 8, 6))
    wanted = q_sample_cuda.run(x0, t, table, noise=noise)[0]
    last = x0.to(memory_format=torch.channels_last)
    assert torch.equal(q_sample_cuda.run(last, t, table, noise=noise)[0], wanted)
    # an image of odd size and a tensor that starts beside a boundary of 16 bytes go number by number
    beside = torch.empty(x0.numel() + 1)[1:].view(x0.shape).copy_(x0)
    assert torch.equal(q_sample_cuda.run(beside, t, table, noise=noise)[0], wanted)


@pytest.mark.parametrize("name", STEPS)
def test_step(h100, name):
    args = inputs(STEPS[name])
    wanted, reference = written_out(args), run(step.step_reference_, copied(args))
    got = run(step_cuda.run, copied(args))
    for key in ("x", "x_in", "h"):
        draws = key != "h" and "S" in STEPS[name].columns and not STEPS[name].given_noise
        limit = allowed(error(reference[key], wanted[key]), wanted[key], got[key].dtype, draws) * (1.5 if draws else 1)
        assert error(got[key], wanted[key]) <= limit, key
    assert torch.equal(got["bad"], reference["bad"])


EVERYTHING = ("A", "B0", "BF", "B1", "B2", "B3", "S", "P", "Q")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 9, 6), (2, 3, 8, 8)])
@pytest.mark.parametrize("variance", [None, "range", "moment"])
def test_step_layouts(h100, shape, last, dtype, variance):
    """All of a row at once, vectors (8 x 8, contiguous), pixels (8 x 8, channels_last) and numbers (9 x 6)."""
    args = inputs(
        Step(shape, guided=True, columns=EVERYTHING, dtype=dtype, channels_last=last, variance=variance, clip=0.9)
    )
    wanted, got = written_out(args), run(step_cuda.run, copied(args))
    for key in ("x", "x_in", "h"):
        rounded = wanted[key].to(got[key].dtype).double()
        assert error(got[key], wanted[key]) <= allowed(error(rounded, wanted[key]), wanted[key], got[key].dtype, True)
    assert got["x_in"].stride() == args["x_in"].stride()


@pytest.mark.parametrize("size", [(8, 8), (5, 3)])
def test_padded_and_strided(h100, size):
    """Channels behind the state's stay as they are; any strides of F."""
    args = inputs(Step((4, 3, *size), columns=("A", "B0", "BF")))
    for form in (torch.contiguous_format, torch.channels_last):
        padded = torch.full((4, 8, *size), 7.0, dtype=torch.bfloat16).to(memory_format=form)
        got = run(step_cuda.run, copied(args) | {"x_in": padded.clone(memory_format=torch.preserve_format)})
        wanted = run(step.step_reference_, copied(args) | {"x_in": padded.clone()})["x_in"]
        assert (got["x_in"][:, 3:] == 7).all()
        assert (got["x_in"][:, :3].float() - wanted[:, :3].float()).abs().max() <= 2**-6
    F = args["F"]
    for view in (
        F.transpose(2, 3).contiguous().transpose(2, 3),
        F.repeat(1, 2, 1, 1)[:, :3],
        F.repeat(1, 2, 1, 1).to(memory_format=torch.channels_last)[:, 3:],
        torch.stack([F, F], -1)[..., 0],
        F[:1].expand(4, 3, *size),
        F.double(),
    ):
        got = run(step_cuda.run, copied(args) | {"F": view})
        assert error(got["x"], written_out({**args, "F": view})["x"]) <= 2e-6


@pytest.mark.parametrize("shape", [(5, 2, 8, 8), (5, 2, 5, 5)])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_broken_image_stays_alone_and_is_named(h100, shape, poison):
    args = inputs(Step(shape, columns=("A", "B0", "BF", "S"), clip=1.0))
    clean = run(step_cuda.run, copied(args))
    args["F"][3, 1, 4, 2] = poison
    got = run(step_cuda.run, copied(args))
    assert got["bad"].tolist() == [-1, -1, -1, 2, -1]
    again = run(step_cuda.run, copied(args) | {"bad": got["bad"].clone(), "k": torch.tensor([4])})
    assert again["bad"].tolist() == [-1, -1, -1, 2, -1]
    others = [0, 1, 2, 4]
    assert torch.equal(got["x"][others], clean["x"][others])
    assert got["x"][3].isfinite().sum() == got["x"][3].numel() - 1


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (2, 2, 5, 5)])
@pytest.mark.parametrize("history", [(), ("B1",)])
def test_zeros_read_nothing_and_nan_passes_the_clip(h100, shape, history):
    args = inputs(Step(shape, guided=True, columns=("B0", *history), clip=1.0))
    args["rows"][:, row.C_SKIP] = 0
    args["rows"][:, row.W] = 1
    args["x"].fill_(math.nan)
    args["F"][2:] = math.nan
    args["F"][0, 0, 1, 2] = math.nan
    args["F"][0, 0, 3, 3] = math.inf
    got = run(step_cuda.run, copied(args))
    assert got["x"].isnan().nonzero().tolist() == [[0, 0, 1, 2]]
    # BF is zero: the infinite F is in the clipped x0 alone
    there = args["rows"][2, row.B1] * args["h"][0, 0, 0, 3, 3] if history else torch.zeros(())
    torch.testing.assert_close(got["x"][0, 0, 3, 3], args["rows"][2, row.B0] + there)
    assert got["h"][1:].isnan().all()


def test_noise_does_not_depend_on_the_batch(h100):
    args = inputs(Step((5, 3, 8, 8), columns=("A", "B0", "S")))
    many = run(step_cuda.run, copied(args))
    one = {k: v[3:4] if k in ("x", "x_in", "F", "index", "bad") else v for k, v in copied(args).items()}
    one["h"] = args["h"][:, 3:4].clone()
    assert torch.equal(run(step_cuda.run, one)["x"][0], many["x"][3])


def by_kernel(args, dy):
    first = [args[k] for k in ("x", "groups", "weight", "bias")]
    rest = {k: args[k] for k in ("x2", "add", "scale", "shift", "act")}
    y, stats = group_norm_silu_cuda.run(*first, **rest)
    dx, dx2, sums = group_norm_silu_cuda.run_backward(dy, first[0], stats, *first[1:], **rest)
    return {"y": y, "stats": stats, "dx": dx, "dx2": dx2, "sums": sums} | small_grads(sums, args)


def compare(got, own, exact, name):
    """Twice PyTorch's own error, three times for gradients; and what several roundings of the largest number are."""
    if exact.numel() == 0 or exact.isnan().all():
        assert got.shape == exact.shape
        assert not got.any()
        return
    ours, theirs = (float((v.double() - exact).abs().max()) for v in (got, own))
    factor, slack = (2, 1e-7) if name == "y" else (3, 5e-7)
    assert ours <= factor * theirs + slack * exact.abs().max(), f"{name}: error {ours:.1e}, PyTorch's {theirs:.1e}"


def check_norm(case, seed=0):
    args = arguments(case, seed)
    dy = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    got = by_kernel(args, dy)
    exact = by_reference(cast(args, torch.float64), dy.double(), group_norm_silu_ref)
    own = by_reference(args, dy, group_norm_silu_ref)
    for key, wanted in exact.items():
        compare(got[key], own[key], wanted, key)
    for key in ("y", "dx", *(("dx2",) if case.split else ())):
        assert got[key].is_contiguous(memory_format=layout(args["x"]))
        assert got[key].dtype == case.dtype


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("device", ["h100", "small"])
def test_norm(compiled, name, device):
    with emulated.on_the_cpu(compiled[0], DEVICES[device]):
        check_norm(NORMS[name])


# what pairs of these have to do with each other is where index arithmetic goes wrong
CELLS = {
    "channels": (8, 12, 24, 40, 48, 37, 64, 96),
    "size": ((1, 1), (4, 4), (5, 7), (8, 8), (16, 4), (3, 11)),
    "images": (1, 3),
    "last": (False, True),
    "dtype": FLOATS,
    "given": ((), ("weight", "bias"), ("add",), NAMES),
    "second": (False, True),
    "device": tuple(DEVICES),
    "act": (True, False),
}


@pytest.mark.parametrize("seed", range(60))
def test_norm_cells(compiled, seed):
    g = random.Random(seed)
    cell = {name: g.choice(values) for name, values in CELLS.items()}
    channels = cell["channels"]
    groups = g.choice([d for d in range(1, channels + 1) if channels % d == 0])
    # a group of one number has no gradient but rounding
    if cell["size"] == (1, 1) and groups == channels:
        groups = 1
    split = g.choice((channels // 2 // 8 * 8, g.randrange(1, channels))) if cell["second"] else 0
    shape = (cell["images"], channels, *cell["size"])
    case = Case(shape, groups, split, cell["given"], g.random() < 0.5, cell["last"], cell["act"], cell["dtype"])
    with emulated.on_the_cpu(compiled[0], DEVICES[cell["device"]]):
        check_norm(case, seed)


def plan(kernels, device, shape, groups, dtype=0, last=True, backward=False):
    n, channels, pixels = shape
    nothing, dtypes = (0,) * 9, (dtype, dtype)
    call = kernels.GroupNorm(nothing, ((0, 0),) * 5, *dtypes, last, True, n, channels, channels, pixels, groups, 1e-5)
    return kernels.Planned(call, kernels.Device(*device), backward).plan


def test_the_cases_take_every_way(compiled):
    """One pass in a block and in clusters of every size, two passes; 16 bytes in both directions, and numbers."""
    seen = set()
    for case, device in itertools.product(NORMS.values(), DEVICES.values()):
        n, channels, *space = case.shape
        if n and math.prod(space):
            dtype = (torch.float32, torch.bfloat16, torch.float16).index(case.dtype)
            p = plan(compiled[0], device, (n, channels, math.prod(space)), case.groups, dtype, case.last)
            seen.add((p["one_pass"], p["splits"] if p["one_pass"] else p["splits"] > 1, p["wide"] > 1, p["deep"] > 1))
    ways = {(one_pass, splits) for one_pass, splits, *_ in seen}
    assert ways >= {(True, 1), (True, 2), (True, 4), (True, 8), (False, False), (False, True)}
    for one_pass in (True, False):
        assert {s[2:] for s in seen if s[0] == one_pass} >= {(True, False), (False, True), (False, False)}


LARGE = [
    ((256, 128, 1024), 32),
    ((1, 320, 4096), 32),
    ((64, 192, 4096), 32),
    ((16, 256, 65536), 32),
    ((1, 128, 1310720), 32),
    ((4, 1280, 64), 32),
    ((2, 2048, 256), 1),
    ((3, 37, 1009), 37),
]


@pytest.mark.parametrize(("shape", "groups"), LARGE)
@pytest.mark.parametrize("device", DEVICES)
def test_plans_fit_their_device(compiled, shape, groups, device):
    """Every vector belongs to one thread, shared memory is there, two blocks a processor where that is possible."""
    processors, block, _, clusters = DEVICES[device]
    for dtype, last, backward in itertools.product((0, 1), (False, True), (False, True)):
        p = plan(compiled[0], DEVICES[device], shape, groups, dtype, last, backward)
        assert p["shared"] <= block
        assert 1 <= p["columns"] * p["lanes"] <= 256
        assert p["tiles"] * p["columns"] * p["wide"] >= shape[1] > (p["tiles"] - 1) * p["columns"] * p["wide"]
        assert p["splits"] * p["range"] * p["deep"] >= shape[2]
        if p["one_pass"]:
            assert p["splits"] in (1, 2, 4, 8)
            assert p["splits"] <= clusters
            assert p["columns"] * p["wide"] % (shape[1] // groups) == 0
            assert shape[0] * p["tiles"] * p["splits"] * 4 >= processors
        else:
            assert (p["splits"] - 1) * p["range"] * p["deep"] < shape[2]
            assert p["range"] <= 64 * p["lanes"]


@pytest.mark.parametrize("last", [False, True])
def test_statistics_and_outliers(kernels, last):
    args = arguments(Case((2, 20, 30, 30), 4, last=last, given=("add",), mean=1e4, split=7))
    args["x"][:, :, 0, 0] += 1e3
    stats = by_kernel(args, torch.ones(2, 20, 30, 30))["stats"].double()
    z = torch.cat([args["x"], args["x2"]], 1).double() + args["add"].double().reshape(20, 1, 1)
    z = z.reshape(2, 4, -1)
    torch.testing.assert_close(stats[..., 0] + stats[..., 1], z.mean(2), rtol=1e-10, atol=0)
    torch.testing.assert_close(stats[..., 2], 1 / (z.var(2, correction=0) + 1e-5).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("last", [False, True])
def test_a_far_mean_costs_no_digits(kernels, last):
    """PyTorch's own error is 1e-3 here; ours that of a mean of zero."""
    args = arguments(Case((2, 24, 16, 16), 4, last=last, given=NAMES, split=8, mean=1e4))
    dy = 1 + torch.randn(2, 24, 16, 16, generator=torch.Generator().manual_seed(1))
    exact, got = by_reference(cast(args, torch.float64), dy.double(), group_norm_silu_ref), by_kernel(args, dy)
    for key in ("y", "dx", "dweight"):
        assert (got[key] - exact[key]).abs().max() <= 2e-6 * exact[key].abs().max(), key


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_nan_stays_in_its_group(kernels, broken, last):
    args = arguments(Case((3, 24, 8, 8), 6, last=last, given=NAMES))
    dy = torch.randn(3, 24, 8, 8, generator=torch.Generator().manual_seed(1))
    clean = by_kernel(args, dy)
    args["x"][1, 6, 2, 3] = broken
    got = by_kernel(args, dy)
    for key in ("y", "dx"):
        assert got[key][1, 4:8].isnan().all()
        got[key][1, 4:8] = clean[key][1, 4:8]
        assert torch.equal(got[key], clean[key])


@pytest.mark.parametrize("last", [False, True])
def test_any_order_of_threads_gives_the_same_bits(kernels, last, monkeypatch):
    args = arguments(Case((2, 48, 12, 12), 8, last=last, given=NAMES, split=16))
    dy = torch.randn(2, 48, 12, 12, generator=torch.Generator().manual_seed(1))
    forward = by_kernel(args, dy)
    monkeypatch.setenv("FASTDIFF_EMULATED_REVERSED", "1")
    for key, value in by_kernel(args, dy).items():
        assert torch.equal(value, forward[key]), key


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("shape", "given"), [((2, 16, 8, 8), NAMES[2:]), ((3, 5, 3, 7), ("scale",)), ((0, 4, 2, 2), ())]
)
def test_inject(kernels, shape, last, dtype, given):
    args = arguments(Case(shape, 1, 0, given, True, last, True, dtype))
    args = {k: args[k] for k in ("x", "add", "scale", "shift", "act")}
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {k: v for k, v in args.items() if k != "x"}
    y = inject_cuda.run(args["x"], **options)
    dx, sums = inject_cuda.run_backward(dy, args["x"], **options)
    exact, own = by_reference(cast(args, torch.float64), dy.double(), inject_ref), by_reference(args, dy, inject_ref)
    factor = 1 if args["scale"] is None else 1 + args["scale"]
    got = {"y": y, "dx": dx, "dadd": factor * sums[..., 0], "dscale": sums[..., 1], "dshift": sums[..., 0]}
    for key, wanted in exact.items():
        compare(got[key], own[key], wanted, key)


@pytest.mark.parametrize("last", [False, True])
def test_slices_of_a_wide_row(h100, last):
    args = arguments(Case((3, 16, 6, 5), 4, given=NAMES, per_image=True, last=last))
    dy = torch.randn(3, 16, 6, 5, generator=torch.Generator().manual_seed(1))
    names, found = NAMES[2:], []
    for how in ("contiguous", "sliced"):
        given = args | {k: laid(args[k], how) for k in names}
        options = {k: given[k] for k in (*names, "act")}
        norm = [v for v in by_kernel(given, dy).values() if v is not None]
        injected = inject_cuda.run(args["x"], **options), *inject_cuda.run_backward(dy, args["x"], **options)
        found.append([*norm, *injected])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("own", ["same", "x itself", "other layout", *FLOATS])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 5, 3, 7), (2, 24, 30, 30), (2, 8, 4, 2, 6)])
def test_residual(h100, shape, last, dtype, own):
    args = arguments(Case(shape, 1, 0, NAMES[2:], True, last, True, dtype))
    args = {k: args[k] for k in ("x", "add", "scale", "shift", "act")}
    x = args["x"]
    residual = torch.randn_like(x, dtype=own if isinstance(own, torch.dtype) else dtype)
    if own == "other layout":
        residual = residual.movedim(1, -1).contiguous().movedim(-1, 1) if x.is_contiguous() else residual.contiguous()
    args["residual"] = x if own == "x itself" else residual
    y = inject_cuda.run(**args)
    assert y.stride() == x.stride()
    compare(y, inject_ref(**args), inject_ref(**cast(args, torch.float64)), "y")


def test_a_residual_beside_a_boundary_of_16_bytes(h100):
    x, r = torch.randn(2, 2, 8, 16, 16)
    beside = torch.empty(r.numel() + 1)[1:].view(r.shape).copy_(r)
    assert torch.equal(inject_cuda.run(x, residual=beside, act=True), inject_cuda.run(x, residual=r, act=True))


def test_pixels_of_bytes(compiled):
    for u in range(256):
        assert compiled[1].pixel(u) == (torch.tensor(u, dtype=torch.float32) / 127.5 - 1).item()


def test_quotients(compiled):
    g = random.Random(0)
    numbers = [0, 1, 2, 2**31 - 1, *(g.randrange(2**31) for _ in range(200))]
    for divisor in (1, 2, 3, 7, 384, 2**31 - 1, 2**31, *(g.randrange(1, 2**31) for _ in range(200))):
        near = [m for k in (1, 2, 5) for m in (k * divisor - 1, k * divisor) if m < 2**31]
        assert all(compiled[1].divided(m, divisor) == m // divisor for m in (*numbers, *near)), divisor


def test_offsets_past_2_to_the_31(compiled):
    pixels, channels = 2**30 + 12, 8
    for last in (False, True):
        wide, deep = (4, 1) if last else (1, 4)
        columns, lanes, tiles, splits = 2, 128, -(-channels // (2 * wide)), 1000
        steps = -(-(pixels // deep) // splits)
        block, thread, j = (2 * tiles + tiles - 1) * splits + 999, 255, 3
        at, n, c, p, count = compiled[1].cursor(
            last, 3, channels, pixels, wide, deep, columns, lanes, tiles, splits, steps, block, thread, j
        )
        assert n == 2
        assert 0 < j < count
        assert c == channels - wide
        assert p * deep < pixels
        assert at == n * channels * pixels + (p * channels + c if last else c * pixels + p * deep)
    for image, channel, pixel in ((channels * pixels, pixels, 1), (channels * pixels, 1, channels)):
        got = compiled[1].walk(image, channel, pixel, 2, 3, pixels - 3, pixels, 5)
        assert got == 2 * image + 4 * channel + 2 * pixel


def test_refusals():
    x = torch.zeros(1, 2, 4, 4)
    assert "run on cuda tensors, got one on cpu" in group_norm_silu_cuda.refuses(x, 1, None, None)
    assert "float32, bfloat16 and float16" in inject_cuda.refuses(x.double())
    assert "one dtype" in group_norm_silu_cuda.refuses(x, 1, None, None, x2=x.half())
    assert "images" in q_sample_cuda.refuses(torch.zeros(2), x, x)
    args = inputs(Step(columns=("A",)))
    first = [args[k] for k in ("x", "x_in", "h", "F", "rows", "k", "index", "seed")]
    assert "run on cuda tensors" in step_cuda.refuses(*first)
    assert "bad must be dense int64" in step_cuda.refuses(*first, bad=args["bad"].float())
    assert "the state is float32" in step_cuda.refuses(first[0].double(), *first[1:])
    assert "x_in must be" in step_cuda.refuses(first[0], first[1][..., :-1], *first[2:])


@pytest.mark.skipif(cuda.kernels is None, reason="fastdiff._cuda was not built here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_a_launch_says_so():
    assert cuda.missing() == "fastdiff._cuda was built, but torch sees no GPU here"
    with pytest.raises(RuntimeError, match=r"fastdiff's CUDA kernels: cudaSetDevice: .+"):
        cuda.kernels.normal(0, 0, 0, 0, 0, 1, 8, 0, 0)
