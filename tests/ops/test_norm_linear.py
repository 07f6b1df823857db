"""norm_linear: the reference against the formula, the C++ kernel against float64, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional

from fastdiff.ops import dispatch, native, norm_linear, pack_linear
from fastdiff.ops.norm_linear import norm_linear_ref, unpack_linear
from tests.ops import oracle
from tests.ops.describe import laid, poisoned
from tests.process import nothing_wrong_on

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels here")
# N, tokens, channels, outputs: tokens of several chunks, channels of several blocks, outputs of several groups
SHAPES = (
    *((1, 1, 1, 1), (1, 1, 320, 33), (2, 5, 7, 3), (3, 63, 64, 32), (1, 65, 65, 31), (2, 100, 129, 96)),
    *((1, 300, 40, 64), (2, 33, 1024, 48), (1, 600, 33, 20), (1, 77, 768, 64)),
)
DEEP = ((1, 40, 2049, 70), (1, 300, 2600, 400), (2, 130, 2560, 280))
WAYS = [(norm, gate, residual) for norm in (False, True) for gate in (False, True) for residual in (False, True)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(shape, *, norm=True, gate=False, residual=False, bias=True, seed=0):
    """Arguments of `norm_linear` by name."""
    n, tokens, channels, outputs = shape
    g = torch.Generator().manual_seed(seed)
    rows = 2 * outputs if gate else outputs
    args = {
        "x": torch.randn(n, tokens, channels, generator=g) + 1,
        "weight": torch.randn(rows, channels, generator=g) / channels**0.5,
        "bias": torch.randn(rows, generator=g) if bias else None,
        "gate": gate,
        "residual": torch.randn(n, tokens, outputs, generator=g) if residual else None,
    }
    names = ("norm_weight", "norm_bias") if norm else ()
    return args | {"norm": norm} | {name: torch.randn(channels, generator=g) for name in names}


def complaint(args, y):
    """What is wrong with a result: an error over twice PyTorch's own and two ulps."""
    wanted = oracle.norm_linear(**args)
    if y.shape != wanted.shape or not y.is_contiguous():
        return f"y is {tuple(y.shape)} with strides {y.stride()}"
    with dispatch.backend("reference"):
        plain = norm_linear(**args)
    ours, theirs = (float((v.double() - wanted).abs().max()) for v in (y, plain))
    bound = 2 * theirs + 2**-22 * float(wanted.abs().max())
    return None if ours <= bound else f"error {ours:.1e}, PyTorch's {theirs:.1e}, bound {bound:.1e}"


# the reference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_float64_is_the_formula(backend):
    for i, shape in enumerate(SHAPES):
        norm, gate, residual = WAYS[i % 8]
        args = drawn(shape, norm=norm, gate=gate, residual=residual)
        args = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        with dispatch.backend(backend):
            assert (norm_linear(**args) - oracle.norm_linear(**args)).abs().max() <= 1e-12


def test_by_hand():
    """A token of two channels is normed to -1 and 1; a gate of 1 passes Phi(1) of 3."""
    x = torch.tensor([[[2.0, 6.0]]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0], [-0.5, 0.5]], dtype=torch.float64)
    y = norm_linear(x, weight, torch.tensor([2.0, 0.0]).double(), norm=True, eps=0.0, gate=True)
    assert abs(y.item() - 3 * 0.5 * (1 + math.erf(1 / math.sqrt(2)))) <= 1e-15


@pytest.mark.parametrize("outputs", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("gate", [False, True])
def test_what_is_packed_can_be_unpacked(outputs, gate):
    weight = torch.randn(outputs * (2 if gate else 1), 5, generator=torch.Generator().manual_seed(0))
    packed = pack_linear(weight, gate=gate)
    assert torch.equal(unpack_linear(packed), weight)
    assert tuple(packed.weight.shape) == (-(-outputs // 32) * (2 if gate else 1), 5, 32)
    # the last panel's zeros
    assert int((packed.weight != 0).sum()) == weight.numel()


# the kernel ----------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("shape", [*SHAPES, *DEEP])
def test_against_float64(shape, threads):
    for norm, gate, residual in WAYS if shape in SHAPES else WAYS[:6:5]:
        args = drawn(shape, norm=norm, gate=gate, residual=residual, bias=gate or residual)
        threads(1)
        with dispatch.backend("cpp"), poisoned():
            y = norm_linear(**args)
            assert not (said := complaint(args, y)), f"{shape} {norm} {gate} {residual}: {said}"
            for count in (2, 3):
                threads(count)
                # every sum is one of its own, in the order of the channels
                assert torch.equal(norm_linear(**args), y), count


@needs_kernels
def test_a_token_does_not_depend_on_others(threads):
    args = drawn((1, 300, 130, 70), gate=True, residual=True)
    y = norm_linear(**args)
    for first, end in ((0, 1), (7, 90), (299, 300)):
        some = args | {k: args[k][:, first:end] for k in ("x", "residual")}
        assert torch.equal(norm_linear(**some), y[:, first:end])


@needs_kernels
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_a_mean_far_from_zero(offset, threads):
    """Tokens of the same numbers about another mean: what the mean loses is the input's own rounding."""
    args = drawn((1, 9, 320, 40))
    args["x"] = (args["x"] + offset).contiguous()
    wanted = oracle.norm_linear(**args)
    assert (norm_linear(**args) - wanted).abs().max() <= 4e-6 * wanted.abs().max()


@needs_kernels
def test_the_gate_is_gelu(threads):
    """One number a token goes through as it is: at most 1.5e-7 |g| away, as near as torch's own, tails included."""
    g = torch.cat([torch.linspace(-9, 9, 400001), torch.tensor([-1e30, 1e30, -0.0, 1e-30, 6.0000005, -6.0000005])])
    y = norm_linear(g.view(1, -1, 1), torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 0.0]), gate=True).flatten()
    wanted = g.double() * torch.special.ndtr(g.double())
    size = g.double().abs() + 1e-300
    ours, theirs = ((v.double() - wanted).abs() / size for v in (y, functional.gelu(g)))
    assert ours.max() <= 1.5e-7
    assert ours.max() <= theirs.max() + 5e-8
    # below zero little is left, and that is right to more than its size
    low = (g < -1) & (g > -6)
    assert ((y.double() - wanted).abs() / wanted.abs())[low].max() <= 1e-3
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan]).view(1, 3, 1)
    got = norm_linear(odd, torch.tensor([[0.0], [1.0]]), gate=True).flatten()
    assert got.isnan().all()  # 0 inf is none either, where a is 0


@needs_kernels
def test_what_an_earlier_call_left_behind_does_not_matter(threads):
    """Memory that is worked in is kept from call to call; here it is full of NaN, as are the results' pages."""
    for i, shape in enumerate((*SHAPES, *DEEP)):
        norm, gate, residual = WAYS[i % 8]
        args = drawn(shape, norm=norm, gate=gate, residual=residual)
        threads(1)
        wanted = norm_linear(**args)
        for count in (1, 2):
            threads(count)
            spoilt = norm_linear(torch.full((1, 700, 2600), torch.nan), torch.ones(66, 2600), norm=True, gate=True)
            assert spoilt.isnan().all()
            with poisoned():
                assert torch.equal(norm_linear(**args), wanted), shape


@needs_kernels
def test_tensors_as_they_lie(threads):
    args = drawn((3, 21, 20, 20), residual=True)
    wanted = norm_linear(**args)
    layouts = ("cropped", "padded", "transposed", "unaligned", "channels_last", "every second")
    for layout in layouts:
        for name in ("x", "residual"):
            assert torch.equal(norm_linear(**args | {name: laid(args[name], layout)}), wanted), (name, layout)
    assert torch.equal(norm_linear(**args | {"weight": laid(args["weight"], "transposed")}), wanted)


@needs_kernels
def test_part_of_a_wider_tensor_is_read_where_it_lies(threads):
    """As q's third of a projection: no copy of it is made."""
    x, weight = torch.randn(2, 9, 60, generator=torch.Generator().manual_seed(0)), drawn((1, 1, 20, 40))["weight"]
    middle = x.chunk(3, 2)[1]
    assert native.tokens_apart(middle) == 60
    assert torch.equal(norm_linear(middle, weight), norm_linear(middle.contiguous(), weight))


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 5, 12, 4), (2, 0, 12, 4)])
def test_no_tokens(shape, threads):
    for count in (1, 2):
        threads(count)
        assert norm_linear(**drawn(shape, gate=True, residual=True)).shape == (*shape[:2], 4)


def complaints():
    for i, shape in enumerate((*SHAPES, *DEEP)):
        for norm, gate, residual in (WAYS[i % 8], WAYS[(3 * i + 2) % 8]):
            args = drawn(shape, norm=norm, gate=gate, residual=residual)
            if said := complaint(args, norm_linear(**args)):
                yield f"{shape} {norm} {gate} {residual}: {said}"


@needs_kernels
@pytest.mark.parametrize("isa", ["v3", "base"])
def test_other_instruction_sets(isa):
    nothing_wrong_on(isa, complaints)


# gradients -----------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("gate", [False, True])
def test_gradients_are_no_worse_than_torchs(gate, threads):
    args = drawn((2, 33, 24, 12), gate=gate, residual=True)
    names = [k for k, v in args.items() if isinstance(v, torch.Tensor)]
    dy = torch.randn(2, 33, 12, generator=torch.Generator().manual_seed(3))

    def gradients(function, dtype):
        leaves = {k: args[k].to(dtype).requires_grad_() for k in names}
        return torch.autograd.grad(function(**args | leaves), list(leaves.values()), dy.to(dtype))

    def plain(x, weight, bias, **given):
        packed = pack_linear(weight, gate=given.pop("gate"))
        return norm_linear_ref(x, *packed, bias, **given)

    with dispatch.backend("cpp"):
        got = gradients(norm_linear, torch.float32)
    wanted, theirs = gradients(oracle.norm_linear, torch.float64), gradients(plain, torch.float32)
    for name, g, w, p in zip(names, got, wanted, theirs, strict=True):
        bound = 2 * float((p - w).abs().max()) + 2**-23 * float(w.abs().max())
        assert float((g - w).abs().max()) <= bound, name


# what is refused -----------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 5, 12), torch.zeros(6, 12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": torch.zeros(5, 12)}, r"x is \(5, 12\); accepted: \(N, L, 12\)"),
        ({"x": torch.zeros(2, 5, 11)}, r"x is \(2, 5, 11\); accepted: \(N, L, 12\), as the weight has inputs"),
        ({"weight": torch.zeros(6, 12, 1)}, r"weight is \(6, 12, 1\); accepted: \(O, C\), C >= 1, with gate=False"),
        ({"weight": torch.zeros(6, 0)}, r"weight is \(6, 0\); accepted"),
        ({"weight": torch.zeros(7, 12), "gate": True}, r"weight is \(7, 12\); accepted: \(2 O, C\), C >= 1, with gate"),
        ({"weight": pack_linear(W), "gate": True}, r"gate=True with weights packed without; pass pack_linear\(weight"),
        ({"bias": torch.zeros(5)}, r"bias is \(5,\); accepted: \(6,\)"),
        ({"bias": torch.zeros(3), "gate": True}, r"bias is \(3,\); accepted: \(6,\)"),
        ({"norm_weight": torch.zeros(12)}, r"norm_weight and norm_bias go with norm=True"),
        ({"norm": True, "norm_bias": torch.zeros(6)}, r"norm_bias is \(6,\); accepted: \(12,\)"),
        ({"norm": True, "norm_weight": torch.zeros(1, 12)}, r"norm_weight is \(1, 12\); accepted: \(12,\)"),
        ({"residual": torch.zeros(2, 5, 5)}, r"residual is \(2, 5, 5\); accepted: \(2, 5, 6\), as the result"),
        ({"residual": torch.zeros(2, 5, 6), "gate": True}, r"residual is \(2, 5, 6\); accepted: \(2, 5, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=f"^norm_linear: {message}"):
        norm_linear(**{"x": X, "weight": W, **given})


@needs_kernels
@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_the_kernel_takes_float32(name):
    args = drawn((1, 3, 4, 4), residual=True)
    with (
        dispatch.backend("cpp"),
        pytest.raises(dispatch.BackendUnavailable, match=r"takes float32, got torch\.float64"),
    ):
        norm_linear(**args | {name: args[name].double()})
