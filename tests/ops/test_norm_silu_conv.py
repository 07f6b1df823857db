"""norm_silu_conv: the reference against torch's own layers, the C++ kernels against float64, and what is refused."""

import pytest
import torch
from torch.nn import functional

from fastdiff.ops import dispatch, native, norm_silu_conv, pack
from fastdiff.ops.norm_silu_conv import moments_ref, unpack
from tests.ops import convolutions, oracle
from tests.ops.convolutions import KINDS, NUMBERS, Case, arguments, complaint, exact, far, run
from tests.ops.describe import poisoned
from tests.process import nothing_wrong_on

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels here")
NORM = ("norm_weight", "norm_bias", "bias")
NORMED = [kind for kind in KINDS if "stride" not in KINDS[kind]]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


# the reference -------------------------------------------------------------------------------------------------------


def layers(x, weight, bias, *, x2, groups, act, norm_weight=None, norm_bias=None, scale=None, shift=None, add=None,
           residual=None, upsample=False, stride=1, asymmetric=False):  # fmt: skip
    """By torch's modules, one after another, in the dtype of x."""

    def maps(v):
        return v.to(x.dtype)[..., None, None]

    h = x if x2 is None else torch.cat([x, x2], 1)
    if groups:
        norm = torch.nn.GroupNorm(groups, h.shape[1], 1e-5, affine=False)
        h = norm(h) * (1 if norm_weight is None else maps(norm_weight)) + (0 if norm_bias is None else maps(norm_bias))
        h = h * (1 if scale is None else 1 + maps(scale)) + (0 if shift is None else maps(shift))
        h = functional.silu(h) if act else h
    h = torch.nn.Upsample(scale_factor=2)(h) if upsample else h
    if asymmetric:
        h = torch.nn.ZeroPad2d((0, 1, 0, 1))(h)
    y = functional.conv2d(h, weight, bias, stride, 0 if asymmetric else weight.shape[2] // 2)
    y = y if add is None else y + maps(add)
    return y if residual is None else y + residual


def wide(args):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_the_formula(kind, backend):
    normed = kind in NORMED
    for given in ((), NUMBERS, ("bias", "add"), ("norm_weight", "scale", "residual"), ("norm_bias", "shift")):
        for per_image in (False, True):
            case = Case(kind, (3, 12, 6, 5), 7, 4 * normed, 5 * normed, given, per_image, act=len(given) != 3)
            args = wide(arguments(case))
            with dispatch.backend(backend):
                y = norm_silu_conv(**args)
            assert far(y, layers(**args)) <= 1e-13
            assert far(exact(args), layers(**args)) <= 1e-13


@pytest.mark.parametrize(("outputs", "inputs", "size"), [(1, 1, 1), (32, 5, 3), (33, 7, 3), (130, 3, 1)])
def test_packed_weights_are_the_weights(outputs, inputs, size):
    weight = torch.randn(outputs, inputs, size, size)
    packed = pack(weight)
    assert torch.equal(unpack(packed), weight)
    assert packed.weight.shape == (-(-outputs // 32), inputs * size**2, 32)
    assert packed.weight.is_contiguous()
    assert not packed.weight.transpose(1, 2).flatten(0, 1)[outputs:].any()
    # a transpose: the gradient of what is packed is the packed gradient
    leaf = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad(pack(leaf).weight, leaf, packed.weight)
    assert torch.equal(grad, weight)
    assert torch.autograd.gradcheck(lambda w: pack(w).weight, weight[:2, :2].double().requires_grad_())


def test_weights_packed_once_are_the_weights_packed_in_the_call():
    args = arguments(Case(groups=3, given=NORM))
    assert torch.equal(norm_silu_conv(**args), norm_silu_conv(**args | {"weight": pack(args["weight"])}))


# the kernels ---------------------------------------------------------------------------------------------------------

CASES = {
    "plain": Case(),
    "nothing given": Case(given=()),
    "norm": Case(groups=3, given=NORM),
    "norm of nothing given": Case(groups=1, given=()),
    "no act": Case(groups=3, given=NORM, act=False),
    "scale, shift": Case(groups=4, given=("scale", "shift", "bias")),
    "all by image": Case(shape=(3, 12, 9, 7), groups=4, given=NUMBERS, per_image=True),
    "add": Case(given=("add",)),
    "add by image": Case(shape=(5, 3, 6, 6), given=("add",), per_image=True),
    "residual": Case(given=("residual",)),
    "NCHW": Case(groups=4, given=NUMBERS, last=False),
    "NCHW of two": Case(groups=4, split=5, given=NUMBERS, last=False),
    # channels: parts of vectors, of panels, and more than one block of either
    "one channel": Case(shape=(2, 1, 5, 6), outputs=1, groups=1, given=NORM),
    "1 to 3": Case(shape=(3, 1, 5, 6), outputs=3),
    "3 to 5": Case(shape=(2, 3, 13, 9), outputs=5, groups=3, given=NUMBERS),
    "5 to 17": Case(shape=(2, 5, 13, 9), outputs=17, groups=5, given=NUMBERS),
    "17 to 33": Case(shape=(2, 17, 13, 9), outputs=33, groups=1, given=NUMBERS),
    "33 to 130": Case(shape=(1, 33, 13, 9), outputs=130, groups=3, given=NUMBERS),
    "130 to 33": Case(shape=(2, 130, 9, 7), outputs=33, groups=13, given=NUMBERS, per_image=True),
    "260 to 260": Case(shape=(1, 260, 9, 7), outputs=260, groups=20, given=NUMBERS),
    "260 to 1": Case(shape=(5, 260, 5, 6), outputs=1, groups=26),
    "130 of 17": Case(shape=(17, 130, 13, 9), outputs=9),
    # outputs so few that all taps are multiplied at once
    "to 7 of two": Case(shape=(3, 35, 11, 9), outputs=7, split=19, given=NUMBERS, per_image=True),
    "to 6 of two, normed": Case(shape=(3, 35, 11, 9), outputs=6, split=19, groups=5, given=NUMBERS, per_image=True),
    "to 3": Case(shape=(2, 128, 32, 32), outputs=3, groups=32, given=NORM),
    "to 1, wide": Case(shape=(2, 20, 3, 141), outputs=1, given=NUMBERS),
    # two tensors: boundaries inside of vectors and of groups
    "two": Case(split=4, groups=3, given=NUMBERS, per_image=True),
    "two without norm": Case(shape=(2, 40, 6, 6), split=17),
    "two, straddling": Case(shape=(2, 60, 6, 6), split=31, groups=4, given=NUMBERS, per_image=True),
    "two, one group": Case(shape=(3, 35, 6, 6), split=19, groups=1, given=NORM),
    "two, 1 and 259": Case(shape=(1, 260, 6, 6), split=1, groups=2, given=NORM),
    "two, 129 and 17": Case(shape=(2, 146, 7, 5), split=129, groups=2, given=NUMBERS),
    # sizes: tiles that are cut, rows of tiles that are cut
    "1x1 pixels": Case(shape=(5, 6, 1, 1), groups=2, given=NUMBERS),
    "one line": Case(shape=(4, 6, 1, 7), groups=2, given=NUMBERS),
    "one column": Case(shape=(4, 6, 7, 1), groups=2, given=NUMBERS),
    "2x3": Case(shape=(17, 6, 2, 3), groups=2, given=NUMBERS),
    "4x4": Case(shape=(17, 6, 4, 4), groups=2, given=NUMBERS, per_image=True),
    "5x6": Case(shape=(17, 6, 5, 6), groups=2, given=NUMBERS, per_image=True),
    "28x28": Case(shape=(3, 20, 28, 28), outputs=40, groups=5, given=NUMBERS, per_image=True),
    "wide": Case(shape=(2, 6, 20, 70), groups=2, given=NUMBERS, per_image=True),
    "wider": Case(shape=(2, 5, 3, 141), groups=1, split=2, given=NUMBERS),
    "9x35": Case(shape=(3, 6, 9, 35), groups=2, given=NUMBERS),
    "tall": Case(shape=(2, 6, 90, 3), groups=2, given=NUMBERS),
    "no images": Case(shape=(0, 6, 5, 5), given=("bias",)),
    # more transformed inputs than are kept together
    "several groups of tiles": Case(shape=(5, 100, 37, 41), outputs=9, groups=10, given=NORM),
    "mean 1000": Case(shape=(2, 12, 13, 9), groups=3, given=NUMBERS, mean=1000.0),
    "mean 1000, two": Case(shape=(2, 36, 28, 28), split=13, groups=4, given=NUMBERS, mean=-1000.0),
}


def taken(case, kind):
    """The case as one of another kind: those of stride 2 have no norm and one tensor."""
    return case._replace(kind=kind, **({} if kind in NORMED else {"groups": 0, "split": 0, "mean": 0.0}))


def possible(name, kind):
    case = CASES[name]
    # torch's own norm wants more than one number, its convolution a window
    return not (kind == "asymmetric" and min(case.shape[2:]) < 2)


EVERY = [(name, kind) for kind in KINDS for name in CASES if possible(name, kind)]


@needs_kernels
@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_against_float64(name, kind, threads):
    case = taken(CASES[name], kind)
    args = arguments(case)
    with dispatch.backend("cpp"), poisoned():
        y = norm_silu_conv(**args)
        assert not (said := complaint(case, args, y)), said
        for count in (2, 3, 5):
            threads(count)
            # work is shared out by results, which no thread's share changes
            assert torch.equal(norm_silu_conv(**args), y), count


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_the_result(kind, threads):
    for name in ("all by image", "one line", "wide", "tall", "33 to 130", "2x3", "several groups of tiles"):
        if possible(name, kind):
            args = arguments(taken(CASES[name], kind))
            y, moments = run(args, measure=True)
            wanted = moments_ref(y)
            # about the mean, in units of the deviation
            deviation = wanted[..., 1].sqrt() + 1e-6 * wanted[..., 0].abs()
            assert ((moments[..., 0] - wanted[..., 0]).abs() <= 2e-6 * deviation).all(), name
            assert ((moments[..., 1] - wanted[..., 1]).abs() <= 1e-5 * deviation.square()).all(), name
            threads(3)
            assert torch.equal(run(args, measure=True)[1], moments), name
            threads(1)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_moments_far_from_zero(kind):
    """mean / std of 1000: sums about zero would leave no digit of the variance."""
    args = arguments(Case(kind, (3, 8, 21, 33), given=("bias",)))
    args["bias"] = args["bias"] + 1000.0
    y, moments = run(args, measure=True)
    wanted = moments_ref(y)
    deviation = wanted[..., 1].sqrt()
    assert wanted[..., 0].abs().min() >= 500 * deviation.max()
    assert ((moments[..., 0] - wanted[..., 0]).abs() <= 1e-5 * deviation).all()
    assert ((moments[..., 1] - wanted[..., 1]).abs() <= 1e-5 * deviation.square()).all()


@needs_kernels
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].groups])
def test_the_normed_maps_behind_the_result(name, threads):
    """append: the same bits in front, and h behind them, which nothing but its rounding parts from the formula."""
    case = taken(CASES[name], "1x1")
    args = arguments(case)
    without, moments = run(args, measure=True)
    h = oracle.conv_input(**{k: v for k, v in args.items() if k not in ("weight", "bias", "add", "residual")})
    for count in (1, 2, 3, 5):
        threads(count)
        with poisoned():
            y, its_moments = run(args, measure=True, append=True)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y[:, : case.outputs], without)
        assert torch.equal(its_moments, moments)
        assert y.shape[1] == case.outputs + case.shape[1]
        assert far(y[:, case.outputs :], h) <= (1e-6 if case.mean == 0 else 1e-4)


@needs_kernels
@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("kind", NORMED)
def test_a_norm_of_moments_that_are_known(kind, mean):
    case = Case(kind, (2, 45, 23, 17), 8, 5, 16, NUMBERS, True, mean=mean)
    args = arguments(case)
    known = {"moments": moments_ref(args["x"]), "moments2": moments_ref(args["x2"])}
    y = run(args, **known)[0]
    assert not complaint(case, args, y)
    assert far(y, run(args)[0].double()) <= 1e-5
    # they are what is taken: others give another result
    assert far(run(args, **known | {"moments2": known["moments"].new_ones(2, 29, 2)})[0], y.double()) > 0.1
    assert far(run(args, **known | {"moments": known["moments"].new_ones(2, 16, 2)})[0], y.double()) > 0.1


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_its_own(kind):
    """Bit for bit, alone and among others."""
    case = taken(Case(shape=(7, 38, 13, 22), outputs=33, split=11, groups=2, given=NUMBERS, per_image=True), kind)
    args = arguments(case)
    y, moments = run(args, measure=True)
    for n in (0, 3, 6):
        images = ("x", "x2", "scale", "shift", "add", "residual")
        one = {k: v[n : n + 1] if k in images and v is not None else v for k, v in args.items()}
        alone, its_moments = run(one, measure=True)
        assert torch.equal(alone[0], y[n])
        assert torch.equal(its_moments[0], moments[n])


@needs_kernels
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("kind", "groups"), [(kind, groups) for kind in KINDS for groups in (0, 3) if not groups or kind in NORMED]
)
def test_a_number_that_is_none(kind, groups, broken, threads):
    """It reaches every output that it should, those near it at most, and no other image."""
    case = Case(kind, (3, 12, 14, 15), 40, groups, 5 * bool(groups), ("bias",))
    for count in (1, 3):
        threads(count)
        args = arguments(case)
        clean = run(args)[0]
        args["x"][1, 2, 9, 6] = broken
        y, wanted = run(args)[0], convolutions.plain(args)
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
        assert not y[1][~wanted[1].isfinite()].isfinite().any()
        if not groups:
            assert not y[1].isfinite().all()
            # tiles of 4x4 results from 6x6 pixels: in a Winograd transform all of them meet all
            down, right = (axis // 4 * 4 for axis in ((18, 12) if kind == "up" else (9, 6)))
            touched = torch.zeros(y.shape[2:], dtype=torch.bool)
            touched[max(down - 4, 0) : down + 8, max(right - 4, 0) : right + 8] = True
            touched = touched if case.winograd else ~wanted[1, 0].isfinite()
            assert torch.equal(y[1][:, ~touched], clean[1][:, ~touched])


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_earlier_call_left_behind_does_not_matter(kind, threads):
    """Memory that is worked in is kept from call to call; here it is full of NaN, as are the results' pages."""
    for name in ("all by image", "one column", "17 to 33", "two, straddling", "wide", "2x3"):
        case = taken(CASES[name], kind)
        args = arguments(case)
        if not possible(name, kind):
            continue
        wanted = run(args, measure=True)
        for count in (1, 2):
            threads(count)
            larger = arguments(taken(Case(shape=(4, 80, 20, 40), outputs=96, groups=4), kind))
            larger["x"].fill_(torch.nan)
            assert run(larger, measure=True)[0].isnan().all()
            with poisoned():
                got = run(args, measure=True)
            assert all(map(torch.equal, got, wanted)), name


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_as_they_lie(kind):
    """NCHW, cut out of others, expanded, parameters in strides or float64: the same bits."""
    case = taken(Case(shape=(2, 12, 8, 6), groups=3, split=7, given=NUMBERS, per_image=True), kind)
    args = arguments(case)
    wanted = run(args)[0]

    def within(v):
        room = torch.full([s + 3 for s in v.shape], torch.nan, dtype=v.dtype)
        view = room[tuple(slice(1, 1 + s) for s in v.shape)]
        return view.copy_(v)

    kept = {k: v.clone() for k, v in args.items() if isinstance(v, torch.Tensor)}
    for change in (torch.Tensor.contiguous, within, lambda v: v.mT.contiguous().mT if v.ndim == 4 else v):
        other = {k: change(v) if isinstance(v, torch.Tensor) and k != "weight" else v for k, v in args.items()}
        assert torch.equal(run(other)[0], wanted)
        small = {k: v.double() for k, v in other.items() if isinstance(v, torch.Tensor) and v.ndim < 4}
        assert torch.equal(run(other | small)[0], wanted)
    assert all(torch.equal(args[k], v) for k, v in kept.items())


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_repeats_are_bit_equal(kind, threads):
    args = arguments(taken(Case(shape=(3, 38, 13, 22), outputs=70, split=11, groups=2, given=NUMBERS), kind))
    wanted = run(args, measure=True)
    for repeat in range(30):
        threads(1 + repeat % 3)
        assert all(map(torch.equal, run(args, measure=True), wanted)), repeat


def complaints():
    for name, kind in EVERY[::3]:
        case = taken(CASES[name], kind)
        args = arguments(case)
        if said := complaint(case, args, norm_silu_conv(**args)):
            yield f"{name} {kind}: {said}"


@needs_kernels
@pytest.mark.parametrize("isa", ["v3", "base"])
def test_other_instruction_sets(isa):
    nothing_wrong_on(isa, complaints)


# gradients -----------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_references(kind, packed):
    """The formula's own, differentiated by torch: what a result lacks in digits its gradient does not."""
    case = taken(Case(shape=(2, 12, 5, 6), groups=3, split=5, given=NUMBERS, per_image=True), kind)
    args = arguments(case) | ({"append": True} if kind == "1x1" else {})
    if packed:
        args["weight"] = pack(args["weight"])
    found = []
    for backend in ("reference", "cpp"):
        leaves = {k: v.clone().requires_grad_() for k, v in args.items() if isinstance(v, torch.Tensor)}
        given = args | leaves
        if packed:
            leaves["weight"] = args["weight"].weight.clone().requires_grad_()
            given["weight"] = args["weight"]._replace(weight=leaves["weight"])
        with dispatch.backend(backend):
            y = norm_silu_conv(**given)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        found.append(torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or far(b[None], a[None].double()) <= 1e-6


@needs_kernels
def test_moments_have_no_gradient():
    args = arguments(Case(groups=3, given=NORM))
    args["x"].requires_grad_()
    y, moments = run(args, measure=True)
    assert y.requires_grad
    assert not moments.requires_grad
    # those of x are no way around x: the norm's own gradient is found without them
    with_them = run(args, moments=moments_ref(args["x"].detach()))[0]
    (a,), (b,) = (torch.autograd.grad(v.square().sum(), args["x"]) for v in (y, with_them))
    assert far(b, a.double()) <= 1e-5


# what is refused -----------------------------------------------------------------------------------------------------

REFUSED = [
    ({"weight": torch.zeros(8, 12, 2, 2)}, r"weight is \(8, 12, 2, 2\); accepted: \(O, I, 3, 3\) and \(O, I, 1, 1\)"),
    ({"weight": torch.zeros(8, 12, 3)}, r"weight is \(8, 12, 3\); accepted"),
    ({"x": torch.zeros(2, 12, 9)}, r"x is \(2, 12, 9\); accepted: \(N, C, H, W\)"),
    ({"x2": torch.zeros(2, 3, 9, 6)}, r"x2 \(2, 3, 9, 6\) does not go beside x \(2, 12, 9, 7\)"),
    ({"x2": torch.zeros(3, 3, 9, 7)}, r"x2 \(3, 3, 9, 7\) does not go beside x"),
    ({"x2": torch.zeros(2, 3, 9, 7)}, r"weight is for 12 channels, x \(and x2\) have 15"),
    ({"groups": 5}, r"groups=5 does not divide the 12 channels; pass a divisor, or 0"),
    ({"groups": -1}, r"groups=-1 does not divide the 12 channels"),
    ({"stride": 3}, r"stride=3 with a window of 3; accepted: 1, or 2 with 3x3"),
    ({"weight": torch.zeros(8, 12, 1, 1), "stride": 2}, r"stride=2 with a window of 1"),
    ({"weight": torch.zeros(8, 12, 1, 1), "upsample": True}, "upsample=True goes with a 3x3 window"),
    ({"x": torch.zeros(2, 12, 0, 7)}, r"x is \(2, 12, 0, 7\); accepted: .* 1 x 1 pixels"),
    (
        {"x": torch.zeros(2, 12, 1, 7), "stride": 2, "asymmetric": True},
        r"x is \(2, 12, 1, 7\); accepted: images of at least 2 x 2 pixels",
    ),
    ({"asymmetric": True}, r"asymmetric=True goes with stride=2"),
    ({"stride": 2, "upsample": True}, r"stride=2 goes without upsample, groups and x2; run group_norm_silu in front"),
    ({"append": True}, "append=True goes with a window of 1 behind a norm"),
    ({"append": True, "groups": 3}, "append=True goes with a window of 1 behind a norm"),
    ({"append": True, "weight": torch.zeros(8, 12, 1, 1)}, "append=True goes with a window of 1 behind a norm"),
    ({"stride": 2, "groups": 3}, r"stride=2 goes without upsample, groups and x2"),
    ({"bias": torch.zeros(7)}, r"bias is \(7,\); accepted: \(8,\) for x"),
    ({"bias": torch.zeros(2, 8)}, r"bias is \(2, 8\); accepted: \(8,\) for x"),
    ({"add": torch.zeros(3, 8)}, r"add is \(3, 8\); accepted: \(8,\) or \(2, 8\) for x"),
    ({"scale": torch.zeros(8), "groups": 3}, r"scale is \(8,\); accepted: \(12,\) or \(2, 12\) for x"),
    ({"shift": torch.zeros(2, 1, 12), "groups": 3}, r"shift is \(2, 1, 12\); accepted"),
    ({"norm_weight": torch.zeros(2, 12), "groups": 3}, r"norm_weight is \(2, 12\); accepted: \(12,\) for x"),
    ({"norm_bias": torch.zeros(8), "groups": 3}, r"norm_bias is \(8,\); accepted: \(12,\) for x"),
    ({"residual": torch.zeros(2, 8, 7, 9)}, r"residual is \(2, 8, 7, 9\); accepted: \(2, 8, 9, 7\), as the result"),
    ({"residual": torch.zeros(2, 8, 9, 7), "stride": 2}, r"residual is .*; accepted: \(2, 8, 5, 4\), as the result"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^norm_silu_conv: {message}"):
        norm_silu_conv(**arguments(Case()) | change)


@needs_kernels
@pytest.mark.parametrize("name", ["x", "x2", "residual", "weight"])
def test_kernels_take_float32(name):
    args = arguments(Case(split=5, given=("bias", "residual")))
    args[name] = args[name].double()
    with (
        dispatch.backend("cpp"),
        pytest.raises(dispatch.BackendUnavailable, match=r"takes float32, got torch\.float64"),
    ):
        norm_silu_conv(**args)
