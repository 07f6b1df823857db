"""attention: the reference against the formula, the C++ kernel against float64, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional

from fastdiff.ops import attention, dispatch, native
from fastdiff.ops.attention import attended
from tests.ops import oracle
from tests.ops.describe import laid, poisoned
from tests.process import nothing_wrong_on

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels here")
TOKENS, DEPTHS, HEADS = (1, 5, 16, 33, 49, 100, 256, 1024), (1, 3, 8, 24, 32, 40, 64, 256), (1, 2, 4)
# every count of tokens with every depth, heads in turn; few numbers get several images
CASES = [
    (1 if tokens * depth > 4096 else 3, tokens, HEADS[(i + j) % 3] if tokens * depth < 65536 else 1, depth)
    for i, tokens in enumerate(TOKENS)
    for j, depth in enumerate(DEPTHS)
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(n, tokens, heads, depth, times=1.0, seed=0):
    """qkv; times: of the scores."""
    qkv = torch.randn(n, tokens, 3 * heads * depth, generator=torch.Generator().manual_seed(seed))
    qkv[..., : heads * depth] *= times
    return qkv


def fused(qkv, heads):
    """By torch's own attention in the dtype of qkv."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def complaint(qkv, heads, y):
    """What is wrong with a result: an error over twice that of torch's own attention and an ulp."""
    wanted = oracle.attention(qkv, heads)
    if y.shape != wanted.shape or not y.is_contiguous():
        return f"y is {tuple(y.shape)} with strides {y.stride()}"
    ours, theirs = (float((v.double() - wanted).abs().max()) for v in (y, fused(qkv, heads)))
    bound = 2 * theirs + 2**-23 * float(wanted.abs().max())
    return None if ours <= bound else f"error {ours:.1e}, PyTorch's {theirs:.1e}, bound {bound:.1e}"


# the reference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_float64_is_the_formula(backend):
    for n, tokens, heads, depth in CASES[:48:5]:
        qkv = drawn(n, tokens, heads, depth).double()
        with dispatch.backend(backend):
            y = attention(qkv, heads)
        assert (y - oracle.attention(qkv, heads)).abs().max() <= 1e-13
        assert (y - fused(qkv, heads)).abs().max() <= 1e-13


def test_by_hand():
    """Two tokens, two heads of one number: the weights are sigmoids."""
    q, k, v = torch.tensor([[[0.3, -1.0], [2.0, 0.7]], [[1.1, 0.4], [-0.6, 0.9]], [[5.0, 1.0], [-2.0, 3.0]]]).double()
    y = attention(torch.cat([q, k, v], 1)[None], 2)[0]
    for i in range(2):
        for head in range(2):
            share = 1 / (1 + math.exp(q[i, head] * (k[1, head] - k[0, head])))
            assert abs(y[i, head] - (share * v[0, head] + (1 - share) * v[1, head])) <= 1e-15


# the kernel ----------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("tokens", TOKENS)
def test_against_float64(tokens, threads):
    for case in (case for case in CASES if case[1] == tokens):
        qkv, heads = drawn(*case), case[2]
        threads(1)
        with dispatch.backend("cpp"), poisoned():
            y = attention(qkv, heads)
            assert not (said := complaint(qkv, heads, y)), f"{case}: {said}"
            for count in (2, 3, 5, 1):
                threads(count)
                # every query has a sum of its own, in the order of the keys
                assert torch.equal(attention(qkv, heads), y), (case, count)


@needs_kernels
@pytest.mark.parametrize("times", [30.0, 1000.0])
def test_large_scores(times, threads):
    for case in ((2, 33, 2, 24), (1, 256, 1, 40), (3, 7, 4, 1)):
        qkv = drawn(*case, times)
        y = attention(qkv, case[2])
        assert not (said := complaint(qkv, case[2], y)), f"{case}: {said}"


@needs_kernels
def test_scores_that_are_the_same(threads):
    """Equal keys: the mean of the values. Of one sign and large, so that only their differences can be raised."""
    for tokens in (1, 7, 33, 100):
        qkv = drawn(2, tokens, 1, 40)
        qkv[..., :80] = torch.tensor([30.0, -30.0]).repeat_interleave(40)
        y = attention(qkv)
        assert (y.double() - qkv[..., 80:].double().mean(1, keepdim=True)).abs().max() <= 2**-20


@needs_kernels
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("part", "tokens", "depth"), [(p, *s) for p in range(3) for s in ((21, 5), (70, 32))])
def test_a_number_that_is_none(part, tokens, depth, broken, threads):
    """It reaches the results that it reaches in the formula, and no other one."""
    clean = drawn(3, tokens, 2, depth)
    before = attention(clean, 2)
    qkv = clean.clone()
    qkv[1, tokens - 3, part * 2 * depth + depth + 1] = broken
    wanted = oracle.attention(qkv, 2).isfinite()
    for count in (1, 3):
        threads(count)
        y = attention(qkv, 2)
        assert torch.equal(y.isfinite(), wanted)
        assert torch.equal(y[[0, 2]], before[[0, 2]])
        assert torch.equal(y[1, :, :depth], before[1, :, :depth])
    assert not wanted[1].all()


@needs_kernels
def test_what_an_earlier_call_left_behind_does_not_matter(threads):
    """Memory that is worked in is kept from call to call; here it is full of NaN, as are the results' pages."""
    for case in CASES[:48]:
        qkv, heads = drawn(*case), case[2]
        wanted = attention(qkv, heads)
        for count in (1, 2):
            threads(count)
            assert attention(torch.full((2, 300, 3 * 150), torch.nan), 2).isnan().all()
            with poisoned():
                assert torch.equal(attention(qkv, heads), wanted), case


@needs_kernels
def test_tensors_as_they_lie(threads):
    qkv = drawn(3, 21, 2, 20)
    wanted = attention(qkv, 2)
    kept = qkv.clone()
    for layout in ("cropped", "padded", "transposed", "unaligned", "channels_last", "every second"):
        assert torch.equal(attention(laid(qkv, layout), 2), wanted), layout
    assert torch.equal(qkv, kept)


@needs_kernels
def test_an_image_and_a_head_are_their_own(threads):
    qkv = drawn(5, 70, 3, 24)
    y = attention(qkv, 3)
    assert torch.equal(attention(qkv[2:3], 3)[0], y[2])
    for head in range(3):
        own = qkv.unflatten(2, (3, 3, 24))[:, :, :, head].flatten(2)
        assert torch.equal(attention(own), y[..., head * 24 : (head + 1) * 24])


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)])
def test_nothing_to_attend_to(shape, threads):
    for count in (1, 2):
        threads(count)
        assert attention(torch.zeros(shape), 2).shape == (*shape[:2], 4)


@needs_kernels
def test_no_key_to_attend_to():
    """A sum over nothing, which only the formula has."""
    q, nothing = drawn(1, 3, 2, 4)[..., :8], torch.zeros(1, 0, 8)
    assert torch.equal(attended(q, nothing, nothing, 2)[0], torch.zeros(1, 3, 8))
    with dispatch.backend("cpp"), pytest.raises(dispatch.BackendUnavailable, match="at least one key, got none"):
        attended(q, nothing, nothing, 2)


def complaints():
    for case in CASES[7:48:2] + CASES[53:54] + CASES[55:56]:
        for times in (1.0, 30.0):
            qkv = drawn(*case, times)
            if said := complaint(qkv, case[2], attention(qkv, case[2])):
                yield f"{case}: {said}"


@needs_kernels
@pytest.mark.parametrize("isa", ["v3", "base"])
def test_other_instruction_sets(isa):
    nothing_wrong_on(isa, complaints)


# gradients -----------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(("tokens", "heads", "depth"), [(7, 2, 3), (33, 1, 24), (100, 4, 8)])
def test_gradients_are_no_worse_than_torchs(tokens, heads, depth, threads):
    leaf = drawn(2, tokens, heads, depth).requires_grad_()
    dy = torch.randn(2, tokens, heads * depth, generator=torch.Generator().manual_seed(3))
    with dispatch.backend("cpp"):
        (got,) = torch.autograd.grad(attention(leaf, heads), leaf, dy)
    (plain,) = torch.autograd.grad(fused(leaf, heads), leaf, dy)
    wide = leaf.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(oracle.attention(wide, heads), wide, dy.double())
    ours, theirs = (float((g - wanted).abs().max()) for g in (got, plain))
    assert ours <= 2 * theirs + 2**-23 * float(wanted.abs().max())


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "heads", "message"),
    [
        ((2, 5, 12), 3, r"qkv is \(2, 5, 12\); accepted: \(N, L, 3 heads d\), with heads=3"),
        ((2, 5, 10), 1, r"qkv is \(2, 5, 10\); accepted"),
        ((2, 5, 12), 0, r"qkv is \(2, 5, 12\); accepted: .* with heads=0"),
        ((2, 5, 12), -2, r"qkv is \(2, 5, 12\); accepted: .* with heads=-2"),
        ((5, 12), 1, r"qkv is \(5, 12\); accepted"),
        ((2, 5, 3, 4), 1, r"qkv is \(2, 5, 3, 4\); accepted"),
        ((2, 5, 0), 1, r"qkv is \(2, 5, 0\); accepted"),
    ],
)
def test_what_does_not_fit_is_refused(shape, heads, message):
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        attention(torch.zeros(shape), heads)


@needs_kernels
def test_the_kernel_takes_float32():
    with (
        dispatch.backend("cpp"),
        pytest.raises(dispatch.BackendUnavailable, match=r"takes float32, got torch\.float64"),
    ):
        attention(drawn(1, 3, 1, 4).double())
