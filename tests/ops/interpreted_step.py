"""The Triton kernel of step_, run by the interpreter: every case, layout, stride and switch against the reference."""

import math

import pytest
import torch

from fastdiff import row
from fastdiff.ops import step, step_triton
from tests.ops.cases import CASES, DTYPES, Case, copied, inputs, run

OUTPUTS = ("x", "x_in", "h", "bad")
EVERYTHING = ("A", "B0", "BF", "B1", "B2", "B3", "S", "P", "Q")


def compare(args, slack=2e-6):
    """Both run on copies of args; NaN in the same places, the rest within a rounding and what noise may differ by."""
    wanted, got = run(step.step_reference_, copied(args)), run(step_triton.run, copied(args))
    for name in OUTPUTS:
        a, b = got[name], wanted[name]
        if a is None:
            continue
        assert a.stride() == args[name].stride()
        assert torch.equal(a.isnan(), b.isnan()), name
        size = b.nan_to_num().abs().max().item() if b.numel() else 0.0
        eps = torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0
        difference = (a.double() - b.double()).nan_to_num(posinf=0, neginf=0)
        assert difference.numel() == 0 or difference.abs().max() <= slack + eps * size, name
    return got


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    compare(inputs(CASES[name]))


@pytest.mark.parametrize("variance", [None, "range", "moment"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("shape", "pad"), [((3, 3, 4, 6), 0), ((2, 3, 5, 3), 5), ((2, 5, 4, 4), 3), ((2, 1, 8, 8), 7), ((1, 70, 2, 2), 0)]
)
def test_channels_last_and_padded(variance, guided, dtype, shape, pad):
    """Tiles that share Philox blocks (pixels a multiple of 4) and that do not; more channels than a tile has."""
    case = Case(shape, guided=guided, variance=variance, columns=EVERYTHING, clip=0.8, dtype=dtype, channels_last=True)
    args = inputs(case)
    wide = torch.full((len(args["x_in"]), shape[1] + pad, *shape[2:]), 7.0, dtype=dtype)
    args["x_in"] = wide.to(memory_format=torch.channels_last)
    got = compare(args)
    assert (got["x_in"][:, shape[1] :] == 7).all()


@pytest.mark.parametrize("mixed", ["F", "x_in"])
def test_one_dense_and_one_channels_last(mixed):
    args = inputs(Case((2, 3, 8, 4), guided=True, columns=EVERYTHING, clip=0.8))
    args[mixed] = args[mixed].to(memory_format=torch.channels_last)
    compare(args)


def test_any_strides_of_the_network_output():
    args = inputs(Case((4, 3, 8, 8), columns=("A", "B0", "BF", "S")))
    dense = args["F"]
    for F in (
        dense.transpose(2, 3).contiguous().transpose(2, 3),
        dense.repeat(1, 2, 1, 1)[:, :3],
        dense.repeat(1, 2, 1, 1).to(memory_format=torch.channels_last)[:, 2:5],
        torch.stack([dense, dense], -1)[..., 0],
        dense[:1].expand(4, 3, 8, 8),
        dense.double(),
    ):
        compare(args | {"F": F})


def test_noise_does_not_depend_on_batch_and_layout():
    args = inputs(Case((6, 3, 16, 16), columns=("A", "B0", "S")))
    many = run(step_triton.run, copied(args))["x"]
    last = {k: args[k].to(memory_format=torch.channels_last) for k in ("F", "x_in")}
    assert torch.equal(run(step_triton.run, copied(args) | last)["x"], many)
    for n in (0, 5):
        one = {k: v[n : n + 1] if k in ("x", "x_in", "F", "index", "bad") else v for k, v in copied(args).items()}
        one["h"] = args["h"][:, n : n + 1].clone()
        assert torch.equal(run(step_triton.run, one)["x"][0], many[n])


@pytest.mark.parametrize(
    ("layout", "poison", "where", "variance"),
    # any three of them in every combination
    [
        pytest.param(layout, poison, where, variance, marks=pytest.mark.slow if (i + j + k + m) % 2 else ())
        for i, layout in enumerate((torch.contiguous_format, torch.channels_last))
        for j, poison in enumerate((math.nan, math.inf, -math.inf))
        for k, where in enumerate(("F", "x", "h", "second"))
        for m, variance in enumerate(("range", "moment"))
    ],
)
def test_a_broken_image_stays_alone(layout, poison, where, variance):
    args = inputs(Case((3, 2, 6, 6), variance=variance, columns=EVERYTHING, clip=1.0))
    args["F"] = args["F"].to(memory_format=layout)
    place = {"F": args["F"][1, 1], "x": args["x"][1, 1], "h": args["h"][0, 1, 1], "second": args["F"][1, 3]}[where]
    place[4, 2] = poison
    compare(args)


@pytest.mark.parametrize("off", row.NAMES[row.C_SKIP : row.ALPHA])
@pytest.mark.parametrize("broken", ["x", "F", "both"])
def test_a_zero_coefficient_reads_nothing(off, broken):
    args = inputs(Case((2, 2, 4, 4), columns=EVERYTHING, clip=0.9))
    args["rows"][:, row.NAMES.index(off)] = 0
    for name in ("x", "F"):
        if broken in (name, "both"):
            args[name][0, 0, 1, 1] = math.nan
    compare(args)


def test_all_zeros_read_nothing():
    args = inputs(Case((2, 2, 4, 4), guided=True, columns=()))
    args["rows"][:, [row.C_SKIP, row.C_OUT]] = 0
    for name in ("x", "F"):
        args[name].fill_(math.nan)
    args["bad"] = None
    got = compare(args)
    assert (got["x"] == 0).all()


def test_weight_one_reads_the_conditional_half_only():
    args = inputs(Case((2, 2, 4, 4), guided=True, columns=("B0", "BF")))
    args["rows"][:, row.W] = 1
    args["F"][2:] = math.nan
    assert compare(args)["x"].isfinite().all()


def test_bad_keeps_its_first_row():
    args = inputs(Case((4, 2, 6, 6), columns=("A", "B0")))
    args["F"][1:, 0, 0, 0] = math.nan
    args["bad"] = torch.tensor([-1, -1, 0, 5])
    assert compare(args)["bad"].tolist() == [-1, 2, 0, 5]


def test_without_next_input_and_bad():
    args = inputs(Case((2, 3, 4, 4), columns=EVERYTHING)) | {"x_in": None, "bad": None}
    compare(args)


def test_what_the_kernel_refuses():
    args = inputs(CASES["plain"])
    for change, says in (
        ({}, None),
        ({"x": args["x"].double()}, "the state is float32"),
        ({"h": args["h"].double()}, "got h in torch.float64"),
        ({"x_in": args["x_in"].double()}, "x_in must be float32"),
        ({"x_in": torch.empty(3, 2, 5, 14)[..., ::2]}, None),
        ({"x_in": torch.empty(3, 2, 9, 14)[:, :, ::2, :7]}, "x_in must be float32"),
        ({"bad": torch.zeros(3)}, "bad must be dense int64"),
        ({"F": torch.empty(3, 2, 2**15, 2**15, device="meta")}, "within 2^30 numbers"),
        ({"F": args["F"].to("meta")}, "run on cpu tensors here"),
    ):
        given = args | change
        first = [given.pop(name) for name in ("x", "x_in", "h", "F", "rows", "k", "index", "seed")]
        why = step_triton.refuses(*first, **given)
        assert (why is None) == (says is None), (why, says)
        assert says is None or says in why
