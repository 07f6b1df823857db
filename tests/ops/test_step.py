"""step_: every backend against the formula written out in float64, and every planted bug caught."""

import math

import pytest
import torch

from fastdiff import row
from fastdiff.ops import dispatch, philox, step, step_
from tests.ops.cases import CASES, DTYPES, Case, copied, inputs, lines, run

BACKENDS = [n for n in dispatch.BACKENDS if dispatch.reason("step_", n) is None]
OUTPUTS = ("x", "x_in", "h")
NAMED = pytest.mark.parametrize("name", CASES)


def written_out(args):
    """The formula of DESIGN in float64, one image and one number at a time: shares nothing with the package."""
    a = copied(args, torch.float64)
    r, after = a["rows"][a["k"].item()].tolist(), a["rows"][a["k"].item() + 1].tolist()
    c = {name: r[i] for i, name in enumerate(row.NAMES)}
    n, channels = a["x"].shape[:2]
    for i in range(n):
        x, F = a["x"][i].clone(), a["F"][i]
        fc = F[:channels]
        if len(a["F"]) == 2 * n:
            fu = a["F"][i + n][:channels]
            fc = fu + c["W"] * (fc - fu)
        raw = c["C_SKIP"] * x + c["C_OUT"] * fc
        x0 = raw.clamp(-c["CLIP"], c["CLIP"])
        y = c["A"] * x + c["B0"] * x0 + c["BF"] * fc
        for slot in range(3):
            if c[f"B{slot + 1}"] != 0:
                y += c[f"B{slot + 1}"] * a["h"][slot, i]
        if c["S"] != 0:
            if a["noise"] is None:
                z = philox.normal(a["seed"], a["index"][i : i + 1], a["k"].item(), 1, x.shape, torch.float64)[0]
            else:
                z = a["noise"][i]
            s2 = torch.ones_like(x)
            if a["variance"] == "range":
                s2 = (c["V0"] + (F[channels:] + 1) / 2 * (c["V1"] - c["V0"])).exp()
            elif a["variance"] == "moment":
                eps = (x - c["ALPHA"] * raw) / c["SIGMA"]
                s2 = (c["V0"] + c["V1"] * F[channels:] + c["V2"] * eps**2).clamp(min=c["V0"]).clamp(max=c["V3"])
            y += c["S"] * s2.sqrt() * z
        if c["P"] != 0 or c["Q"] != 0:
            a["h"][int(c["SLOT"]), i] = c["P"] * x + c["Q"] * x0
        a["x"][i] = y
        for half in range(len(a["x_in"]) // n):
            a["x_in"][i + half * n] = after[row.C_IN] * y
    return a


def error(got, wanted):
    """Largest difference; NaN must stand where NaN is wanted."""
    assert torch.equal(got.isnan(), wanted.isnan())
    return (got.double() - wanted).nan_to_num().abs().max().item() if got.numel() else 0.0


def allowed(reference_error, wanted, dtype, draws):
    """Twice PyTorch's own error and the last place; where it draws, also the 1e-6 by which normals may differ."""
    size = wanted.nan_to_num().abs().max().item() if wanted.numel() else 0.0
    return 2 * reference_error + torch.finfo(dtype).eps * size / 2 + (2e-6 if draws else 0)


@NAMED
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(name, backend):
    args = inputs(CASES[name])
    wanted = written_out(args)
    reference = run(step.step_reference_, copied(args))
    with dispatch.backend(backend):
        got = run(step_, copied(args))
    for key in OUTPUTS:
        draws = key != "h" and "S" in CASES[name].columns and not CASES[name].given_noise
        limit = allowed(error(reference[key], wanted[key]), wanted[key], got[key].dtype, draws)
        assert error(got[key], wanted[key]) <= limit, key
        if not draws and CASES[name].variance is None:
            assert torch.equal(got[key].nan_to_num(), reference[key].nan_to_num()), key
    assert (got["bad"] == -1).all()
    assert torch.equal(got["k"], args["k"])


@NAMED
def test_the_reference_runs_in_float64(name):
    args = inputs(CASES[name])
    wanted = written_out(args)
    got = run(step_, copied(args, torch.float64))
    for key in OUTPUTS:
        assert error(got[key], wanted[key]) <= 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts_and_dtypes(backend, dtype, channels_last):
    everything = ("A", "B0", "BF", "B1", "B2", "B3", "S", "P", "Q")
    for guided in (False, True):
        case = Case((3, 3, 9, 6), guided=guided, columns=everything, dtype=dtype, channels_last=channels_last)
        args = inputs(case)
        wanted = written_out(args)
        with dispatch.backend(backend):
            got = run(step_, copied(args))
        for key in OUTPUTS:
            rounded = wanted[key].to(got[key].dtype).double()
            assert error(got[key], wanted[key]) <= allowed(
                error(rounded, wanted[key]), wanted[key], got[key].dtype, key != "h"
            )
        assert got["x_in"].stride() == args["x_in"].stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_of_the_network_output(backend):
    args = inputs(Case((4, 3, 8, 8), columns=("A", "B0", "BF")))
    dense = args["F"]
    for F in (
        dense.transpose(2, 3).contiguous().transpose(2, 3),
        dense.repeat(1, 2, 1, 1)[:, :3],
        torch.stack([dense, dense], -1)[..., 0],
        dense[:1].expand(4, 3, 8, 8),
        dense.double(),
    ):
        wanted = written_out({**args, "F": F})
        with dispatch.backend(backend):
            got = run(step_, copied(args) | {"F": F})
        assert error(got["x"], wanted["x"]) <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_does_not_depend_on_the_batch(backend):
    case = Case((64, 3, 32, 32), columns=("A", "B0", "S"))
    args = inputs(case)
    with dispatch.backend(backend):
        many = run(step_, copied(args))
        for n in (0, 17, 63):
            one = {k: v[n : n + 1] if k in ("x", "x_in", "F", "index", "bad") else v for k, v in copied(args).items()}
            one["h"] = args["h"][:, n : n + 1].clone()
            assert torch.equal(run(step_, one)["x"][0], many["x"][n])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert torch.equal(run(step_, copied(args))["x"], many["x"])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_agrees_with_the_reference(backend):
    args = inputs(Case((16, 3, 33, 31), columns=("S",)))
    args["rows"][:, row.S] = 1
    with dispatch.backend(backend):
        got = run(step_, copied(args))["x"]
    z = philox.normal(args["seed"], args["index"], 2, philox.STEP, (3, 33, 31))
    assert (got - z).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_broken_image_stays_alone_and_is_named(backend, poison):
    args = inputs(Case((5, 2, 6, 6), columns=("A", "B0", "BF", "S"), clip=1.0))
    with dispatch.backend(backend):
        clean = run(step_, copied(args))
        args["F"][3, 1, 4, 2] = poison
        got = run(step_, copied(args))
        again = run(step_, copied(args) | {"bad": got["bad"].clone(), "k": torch.tensor([4])})
    assert got["bad"].tolist() == [-1, -1, -1, 2, -1]
    assert again["bad"].tolist() == [-1, -1, -1, 2, -1]
    others = [0, 1, 2, 4]
    assert torch.equal(got["x"][others], clean["x"][others])
    assert not got["x"][3, 1, 4, 2].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("history", [(), ("B1",)])
def test_nan_passes_the_clip(backend, history):
    args = inputs(Case((1, 1, 4, 4), columns=("B0", *history), clip=1.0))
    args["F"][0, 0, 1, 2] = math.nan
    args["F"][0, 0, 3, 3] = math.inf
    with dispatch.backend(backend):
        got = run(step_, copied(args))["x"][0, 0]
    assert got.isnan().nonzero().tolist() == [[1, 2]]
    # BF is zero: the infinite F is in the clipped x0 alone
    there = args["rows"][2, row.B1] * args["h"][0, 0, 0, 3, 3] if history else torch.zeros(())
    torch.testing.assert_close(got[3, 3], args["rows"][2, row.B0] + there)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_coefficient_reads_nothing(backend):
    """x is full of NaN and the row has A = C_SKIP = 0, as the last step of an x0-predicting network has."""
    args = inputs(Case((2, 2, 4, 4), columns=("B0",)))
    args["rows"][:, row.C_SKIP] = 0
    args["x"].fill_(math.nan)
    with dispatch.backend(backend):
        got = run(step_, copied(args))
    wanted = args["rows"][2, row.B0] * args["rows"][2, row.C_OUT] * args["F"]
    assert (got["x"] - wanted).abs().max() <= 1e-6
    assert got["h"].isnan().all()
    assert (got["bad"] == -1).all()


def test_weight_one_reads_the_conditional_half_only():
    args = inputs(Case((2, 2, 4, 4), guided=True, columns=("B0",)))
    args["rows"][:, row.W] = 1
    args["F"][2:] = math.nan
    for backend in BACKENDS:
        with dispatch.backend(backend):
            assert run(step_, copied(args))["x"].isfinite().all()


def test_given_noise_is_taken_as_it_is():
    args = inputs(CASES["given noise"])
    for backend in BACKENDS:
        with dispatch.backend(backend):
            a = run(step_, copied(args))["x"]
            b = run(step_, copied(args) | {"noise": args["noise"] + 1})["x"]
        assert (b - a - args["rows"][2, row.S]).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"F": torch.zeros(3, 2, 5, 6)}, "the network returned"),
        ({"F": torch.zeros(3, 1, 5, 7)}, "the network returned"),
        ({"F": torch.zeros(4, 2, 5, 7)}, "the network returned"),
        ({"h": torch.zeros(2, 3, 2, 5, 7)}, "dense NCHW"),
        ({"variance": "learned"}, "variance='learned'"),
        ({"variance": "range"}, "4 channels"),
        ({"rows": torch.zeros(7, 5)}, "rows must be"),
        ({"x_in": torch.zeros(5, 2, 5, 7)}, "x_in"),
        ({"x_in": torch.zeros(3, 1, 5, 7)}, "x_in"),
        ({"k": torch.zeros(0, dtype=torch.int64)}, "k must be"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be"),
        ({"index": torch.zeros(1, dtype=torch.int64)}, "index must be"),
        ({"noise": torch.zeros(1, 2, 5, 7)}, "noise must be"),
        ({"bad": torch.zeros(1, dtype=torch.int64)}, "bad must be"),
        ({"F": torch.zeros(3, 2, 5, 7, device="meta")}, "F is on meta and the state on cpu"),
    ],
)
def test_shapes_that_do_not_fit(backend, change, says):
    with dispatch.backend(backend), pytest.raises(ValueError, match=says):
        run(step_, inputs(CASES["plain"]) | change)


def test_unknown_backends():
    with pytest.raises(ValueError, match="accepted: auto"), dispatch.backend("cudnn"):
        pass
    with dispatch.backend("triton"), pytest.raises(dispatch.BackendUnavailable, match="triton"):
        run(step_, inputs(CASES["plain"]))


BUGS = {
    "sign of C_OUT": lambda rows, a: rows[:, row.C_OUT].neg_(),
    "next row": lambda rows, a: a["k"].add_(1),
    "weight on the wrong half": lambda rows, a: a.update(F=a["F"].roll(len(a["x"]), 0)),
    "history slots swapped": lambda rows, a: rows.__setitem__(
        (slice(None), [row.B1, row.B2]), rows[:, [row.B2, row.B1]]
    ),
    "slot off by one": lambda rows, a: rows[:, row.SLOT].add_(1).remainder_(3),
    "noise variance for deviation": lambda rows, a: rows[:, row.S].square_(),
    "clip left out": lambda rows, a: rows[:, row.CLIP].fill_(math.inf),
    "another stream": lambda rows, a: a["seed"].add_(1),
    "images in another order": lambda rows, a: a.update(index=a["index"].flip(0)),
    "P and Q exchanged": lambda rows, a: rows.__setitem__((slice(None), [row.P, row.Q]), rows[:, [row.Q, row.P]]),
    "C_IN of this row": lambda rows, a: rows[:, row.C_IN].copy_(rows[:, row.C_IN].roll(1)),
    "BF left out": lambda rows, a: rows[:, row.BF].zero_(),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    """A step with one mistake must miss the formula by far more than the tolerance."""
    everything = ("A", "B0", "BF", "B1", "B2", "B3", "S", "P", "Q")
    args = inputs(Case((3, 2, 5, 7), guided=True, columns=everything, clip=0.8))
    wanted = written_out(args)
    wrong = copied(args)
    BUGS[bug](wrong["rows"], wrong)
    got = run(step_, wrong)
    assert (
        max(error(got[key], wanted[key]) for key in ("x", "x_in")) > 1e-3
        or not torch.equal(got["h"].isnan(), wanted["h"].isnan())
        or error(got["h"], wanted["h"]) > 1e-3
    )


def test_rows_of_the_cases_differ():
    """Neighbouring rows hold different numbers, else a wrong row would go unseen."""
    rows = lines(CASES["all"], torch.Generator().manual_seed(0))
    assert (rows[2] != rows[3])[: row.SLOT].sum() >= 10
