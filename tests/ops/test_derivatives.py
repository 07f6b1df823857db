"""First and second derivatives of every op: right, or refused with a sentence."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastdiff as fd
from fastdiff.ops import (
    attention,
    dispatch,
    group_norm_silu,
    inject,
    norm_linear,
    norm_silu_conv,
    q_sample,
    step_,
    time_embed,
)
from fastdiff.ops.attention import attended
from tests.ops import oracle
from tests.ops.cases import CASES, Case, copied, inputs, run
from tests.ops.convolutions import KINDS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.func.jvp imports torch's own decompositions, which are scripted
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]


def drawn(*shapes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def twice(function, tensors):
    """gradcheck and gradgradcheck."""
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


def runs(op, backend):
    return backend in dispatch._table[op] and dispatch.reason(op, backend) is None


# in float64 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
def test_group_norm_silu(act, two, per_image):
    small = (2, 4) if per_image else (4,)
    x, x2, weight, bias, add, scale, shift = drawn((2, 2 if two else 4, 3), (2, 2, 3), (4,), (4,), small, small, small)
    args = (x, weight, bias, add, scale, shift, *([x2] if two else []))

    def f(x, weight, bias, add, scale, shift, x2=None):
        return group_norm_silu(x, 2, weight, bias, x2=x2, add=add, scale=scale, shift=shift, act=act)

    twice(f, args)


def test_group_norm_silu_of_channels_last():
    (x,) = drawn((1, 4, 2, 2))
    twice(lambda x: group_norm_silu(x.to(memory_format=torch.channels_last), 2, None, None), (x,))


@pytest.mark.parametrize("given", [("weight",), ("bias",), ()])
def test_group_norm_silu_without_some_parameters(given):
    tensors = dict(zip(("x", "weight", "bias"), drawn((2, 4, 3), (4,), (4,)), strict=True))
    names = ("x", *given)

    def f(*args):
        at = dict(zip(names, args, strict=True))
        return group_norm_silu(at["x"], 2, at.get("weight"), at.get("bias"))

    twice(f, [tensors[name] for name in names])


@pytest.mark.parametrize("act", [False, True])
def test_inject(act):
    tensors = drawn((2, 3, 4), (2, 3), (3,), (2, 3), (2, 3, 4))
    twice(lambda *a: inject(a[0], add=a[1], scale=a[2], shift=a[3], residual=a[4], act=act), tensors)
    (x,) = drawn((2, 3, 4))
    twice(lambda x: inject(x, residual=x, act=act), (x,))


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_silu_conv(kind, act):
    one = kind == "1x1"
    x, weight, bias, norm_weight, norm_bias, add, x2 = drawn(
        (2, 2, 2, 3), (2, 4, 1, 1) if one else (2, 4, 3, 3), (2,), (4,), (4,), (2, 2), (2, 2, 2, 3)
    )
    if "stride" in KINDS[kind]:
        tensors = (x, weight[:, :2].detach().requires_grad_(), bias, add)
        twice(lambda x, weight, bias, add: norm_silu_conv(x, weight, bias, add=add, **KINDS[kind]), tensors)
        return

    def f(x, weight, bias, norm_weight, norm_bias, add, x2):
        given = {"groups": 2, "norm_weight": norm_weight, "norm_bias": norm_bias, "x2": x2, "add": add, "act": act}
        shift = {"scale": norm_bias.sin(), "shift": norm_weight.sin()}
        y = norm_silu_conv(x, weight, bias, **given, **shift, **KINDS[kind])
        return norm_silu_conv(y, weight[:, :2], residual=y)

    twice(f, (x, weight, bias, norm_weight, norm_bias, add, x2))


@pytest.mark.parametrize("heads", [1, 2])
def test_attention(heads):
    twice(lambda qkv: attention(qkv, heads), drawn((2, 3, 12)))


def test_attention_to_other_tokens():
    tensors = drawn((2, 3, 6), (2, 4, 6), (2, 4, 6), (2, 3, 6))
    twice(lambda q, k, v, residual: attended(q, k, v, 2, residual)[0], tensors)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_norm_linear(norm, gate):
    names = ("norm_weight", "norm_bias") if norm else ()
    tensors = drawn((2, 3, 4), (2, 4) if gate else (1, 4), (2,) if gate else (1,), (2, 3, 1), *((4,) for _ in names))

    def f(x, weight, bias, residual, *affine):
        given = dict(zip(names, affine, strict=True))
        return norm_linear(x, weight, bias, norm=norm, gate=gate, residual=residual, **given)

    twice(f, tensors)


@pytest.mark.parametrize("masked", [False, True])
def test_q_sample(masked):
    x0, noise = drawn((2, 2, 3), (2, 2, 3))
    table = torch.tensor([[0.9, 0.3], [0.4, 0.8]], dtype=torch.float64)
    where = torch.rand(2, 1, 3) < 0.5 if masked else None
    t = torch.tensor([1, 0])
    twice(lambda x0, noise: q_sample(x0, t, table, noise=noise, where=where, eps=True, v=True), (x0, noise))


@pytest.mark.parametrize("flip", [False, True])
def test_time_embed(flip):
    (t,) = drawn((3,))
    twice(lambda t: time_embed(t, 5, flip=flip, scale=2.0), (t,))


def test_step_is_differentiable_in_its_reference_form():
    """In float64, where no kernel takes the call: the state's and the network output's gradients."""
    args = copied(inputs(Case((1, 2, 2, 2), columns=("A", "B0", "BF", "S"), clip=50.0)), torch.float64)
    x, F = (args[name].clone().requires_grad_() for name in ("x", "F"))

    def f(x, F):
        state = x.clone()
        given = {k: v for k, v in args.items() if k in ("x_in", "h", "rows", "k", "index", "seed")} | {"x_in": None}
        step_(state, given["x_in"], given["h"].clone(), F, *(given[k] for k in ("rows", "k", "index", "seed")))
        return state

    twice(f, (x, F))


@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda"])
def test_a_step_that_requires_grad_is_refused_by_the_kernels(backend):
    if dispatch.reason("step_", backend) is not None:
        pytest.skip(f"no {backend} here")
    args = inputs(CASES["plain"])
    args["F"].requires_grad_()
    with dispatch.backend(backend), pytest.raises(dispatch.BackendUnavailable, match="requires grad"):
        run(step_, args)


@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda"])
def test_gradients_that_no_kernel_has_are_refused_before_a_backend_is_asked(backend):
    """Also where the backend is not there: what an op cannot do, no backend of it does."""
    args = inputs(CASES["plain"])
    first = [args[name] for name in ("x", "x_in", "h", "F", "rows", "k", "index", "seed")]
    first[3].requires_grad_()
    assert "requires grad" in dispatch._table["step_"][backend].refuses(*first)
    x0, table = torch.randn(2, 1, 3, 3), torch.rand(5, 2, requires_grad=True)
    given = {"noise": torch.randn(2, 1, 3, 3)}
    assert "schedule's table" in dispatch._table["q_sample"][backend].refuses(x0, torch.tensor([0, 1]), table, **given)


def test_a_step_under_auto_takes_the_reference_for_gradients():
    args = copied(inputs(CASES["plain"]))
    args["F"].requires_grad_()
    run(step_, args)
    (dF,) = torch.autograd.grad(args["x"].sum(), args["F"])
    rows = args["rows"][int(args["k"])]
    assert (dF - rows[fd.row.B0] * rows[fd.row.C_OUT]).abs().max() <= 1e-6


# the kernels' derivatives in float32 ---------------------------------------------------------------------------------


def _norm(x, weight, bias, add, scale, shift, x2):
    return group_norm_silu(x, 3, weight, bias, x2=x2, add=add, scale=scale, shift=shift)


def _norm_oracle(x, weight, bias, add, scale, shift, x2):
    return oracle.group_norm_silu(x, 3, weight, bias, x2=x2, add=add, scale=scale, shift=shift)


TABLE, T = torch.tensor([[0.9, 0.3], [0.4, 0.8]]), torch.tensor([1, 0])
SECOND = {
    "group_norm_silu": (
        _norm,
        _norm_oracle,
        [(2, 5, 4, 3), (12,), (12,), (2, 12), (2, 12), (12,), (2, 7, 4, 3)],
    ),
    # inputs made from one another, as in a U-Net: h comes from the skip beside it
    "group_norm_silu of relatives": (
        lambda x, w: _norm(x[:, :5] * w[:5, None, None], w, w, 2 * w, x[:, :, 0, 0], w.square(), x[:, 5:]),
        lambda x, w: _norm_oracle(x[:, :5] * w[:5, None, None], w, w, 2 * w, x[:, :, 0, 0], w.square(), x[:, 5:]),
        [(2, 12, 4, 3), (12,)],
    ),
    "group_norm_silu of a skip": (
        lambda skip, a, w: _norm(a.sin() * skip[:, :5], w, w, w, w, w, skip),
        lambda skip, a, w: _norm_oracle(a.sin() * skip[:, :5], w, w, w, w, w, skip),
        [(2, 7, 4, 3), (2, 5, 4, 3), (12,)],
    ),
    "inject of relatives": (
        lambda x, a: inject(x * a[..., None, None], add=a, scale=a.sin(), shift=a, residual=x, act=True),
        lambda x, a: oracle.inject(x * a[..., None, None], add=a, scale=a.sin(), shift=a, residual=x, act=True),
        [(2, 5, 4, 3), (2, 5)],
    ),
    "inject": (
        lambda x, add, scale, shift, r: inject(x, add=add, scale=scale, shift=shift, residual=r.sin(), act=True),
        lambda x, add, scale, shift, r: oracle.inject(x, add=add, scale=scale, shift=shift, residual=r.sin(), act=True),
        [(2, 5, 4, 3), (2, 5), (5,), (2, 5), (2, 5, 4, 3)],
    ),
    "norm_silu_conv": (
        lambda x, w, b, s, x2: norm_silu_conv(x, w, b[:4], groups=3, norm_weight=b, scale=s, x2=x2, add=b[:4]),
        lambda x, w, b, s, x2: oracle.norm_silu_conv(x, w, b[:4], groups=3, norm_weight=b, scale=s, x2=x2, add=b[:4]),
        [(2, 5, 4, 3), (4, 12, 3, 3), (12,), (2, 12), (2, 7, 4, 3)],
    ),
    "norm_silu_conv of relatives": (
        lambda x, w: norm_silu_conv(x.sin(), w, residual=x, shift=x[:, :, 0, 0], groups=1, upsample=False),
        lambda x, w: oracle.norm_silu_conv(x.sin(), w, None, residual=x, shift=x[:, :, 0, 0], groups=1),
        [(2, 5, 4, 3), (5, 5, 3, 3)],
    ),
    "attention": (lambda qkv: attention(qkv, 2), lambda qkv: oracle.attention(qkv, 2), [(2, 7, 18)]),
    "attention of relatives": (
        lambda x, w: attention(x.sin() * w, 3) * x[..., :6],
        lambda x, w: oracle.attention(x.sin() * w, 3) * x[..., :6],
        [(2, 5, 18), (18,)],
    ),
    "attention across": (
        lambda q, k, v, r: attended(q, k, v, 2, r.sin())[0],
        lambda q, k, v, r: oracle.attended(q, k, v, 2, r.sin()),
        [(2, 7, 6), (2, 5, 6), (2, 5, 6), (2, 7, 6)],
    ),
    "norm_linear": (
        lambda x, w, b, m, r: norm_linear(
            x, w, b, norm=True, norm_weight=m, norm_bias=m.sin(), gate=True, residual=r.sin()
        ),
        lambda x, w, b, m, r: oracle.norm_linear(
            x, w, b, norm=True, norm_weight=m, norm_bias=m.sin(), gate=True, residual=r.sin()
        ),
        [(2, 7, 6), (8, 6), (8,), (6,), (2, 7, 4)],
    ),
    "norm_linear of relatives": (
        lambda x, w: norm_linear(x.sin(), w, x[0, 0], residual=x),
        lambda x, w: oracle.norm_linear(x.sin(), w, x[0, 0], residual=x),
        [(2, 7, 6), (6, 6)],
    ),
    "q_sample": (
        lambda x0, noise: q_sample(x0, T, TABLE.to(x0.dtype), noise=noise).square(),
        lambda x0, noise: oracle.q_sample(x0, T, TABLE, noise=noise)["x_t"].square(),
        [(2, 5, 4, 3), (2, 5, 4, 3)],
    ),
    "time_embed": (lambda t: time_embed(t, 10, flip=True), None, [(7,)]),
}


def second(function, tensors):
    """First derivatives of sum(c y), and those of sum(u dy), all with fixed numbers c and u."""

    def fixed(v, seed):
        return torch.randn(v.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(v.dtype)

    y = function(*tensors)
    first = torch.autograd.grad(y, tensors, fixed(y, 7), create_graph=True)
    both = sum((fixed(g, i) * g).sum() for i, g in enumerate(first))
    return [*first, *torch.autograd.grad(both, tensors)]


@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_second_derivatives_of_the_kernels(name, backend):
    function, exact, shapes = SECOND[name]
    if not runs(name.split()[0], backend):
        pytest.skip(f"no {backend} kernel here")
    tensors = drawn(*shapes, dtype=torch.float32)
    wide = [v.detach().double().requires_grad_() for v in tensors]
    wanted = second(exact or function, wide)
    with dispatch.backend("reference"):
        plain = second(function, tensors)
    with dispatch.backend(backend):
        got = second(function, tensors)
    for i, (g, p, w) in enumerate(zip(got, plain, wanted, strict=True)):
        bound = 3 * max((p - w).abs().max().item(), 2**-24 * w.abs().max().item()) + 2**-24 * w.abs().max().item()
        assert (g - w).abs().max().item() <= bound, i


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_the_gradient_of_a_norm_over_one_number(backend):
    """dz = rstd (d - d - 0): nothing but the rounding of numbers that cancel."""
    if not runs("group_norm_silu", backend):
        pytest.skip(f"no {backend} kernel here")
    x, weight, bias = drawn((3, 4, 1, 1), (4,), (4,), dtype=torch.float32)
    with dispatch.backend(backend):
        (dx,) = torch.autograd.grad(group_norm_silu(x, 4, weight, bias, act=False).sum(), x)
    assert (dx.abs() <= 2**-23 * weight.abs().reshape(4, 1, 1) / math.sqrt(1e-5)).all()


# transforms ----------------------------------------------------------------------------------------------------------

TRANSFORMED = {
    "group_norm_silu": (lambda x: group_norm_silu(x, 2, None, None), (3, 4, 5)),
    "inject": (lambda x: inject(x, add=torch.ones(4), act=True), (3, 4, 5)),
    "norm_silu_conv": (
        lambda x: norm_silu_conv(x, torch.ones(2, 4, 3, 3).to(x) / 9, groups=2),
        (3, 4, 5, 3),
    ),
    "attention": (lambda x: attention(x, 2), (2, 5, 12)),
    "norm_linear": (lambda x: norm_linear(x, torch.ones(4, 12).to(x) / 9, norm=True, gate=True), (2, 5, 12)),
    "q_sample": (
        lambda x: q_sample(x, torch.tensor([1, 0, 1]), TABLE.to(x.dtype), noise=torch.ones(3, 4, 5, dtype=x.dtype)),
        (3, 4, 5),
    ),
    "time_embed": (lambda t: time_embed(t, 6), (3,)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_fall_back_to_the_reference(name):
    """vmap, jvp, grad, jacrev and forward mode agree with the plain call's derivatives."""
    function, shape = TRANSFORMED[name]
    (x, u) = (v.detach() for v in drawn(shape, shape, dtype=torch.float32))
    y, dy = torch.func.jvp(function, (x,), (u,))
    exact_y, exact_dy = torch.func.jvp(function, (x.double(),), (u.double(),))
    assert (y - exact_y).abs().max() <= 1e-5
    assert (dy - exact_dy).abs().max() <= 1e-5
    many = torch.stack([x, x + 1])
    assert (torch.func.vmap(function)(many) - torch.stack([function(v) for v in many])).abs().max() <= 1e-5
    got = torch.func.grad(lambda x: (function(x) * exact_y.float()).sum())(x)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((function(leaf) * exact_y.float()).sum(), leaf)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.unpack_dual(function(torch.autograd.forward_ad.make_dual(x, u)))
        assert (dual.tangent - exact_dy).abs().max() <= 1e-5


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_transforms_of_a_named_backend_are_refused(name, backend):
    function, shape = TRANSFORMED[name]
    if not runs(name, backend):
        pytest.skip(f"no {backend} kernel here")
    x = torch.zeros(shape)
    with dispatch.backend(backend):
        for transformed in (
            lambda: torch.func.vmap(function)(x[None]),
            lambda: torch.func.jvp(function, (x,), (x,)),
            lambda: torch.func.grad(lambda x: function(x).sum())(x),
        ):
            with pytest.raises(dispatch.BackendUnavailable, match=r"torch\.func"):
                transformed()
