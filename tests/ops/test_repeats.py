"""Each op 50 times (slow: 250), forward and backward: bit-equal on one thread and two; images are on their own."""

import pytest
import torch
from torch import Tensor

from fastdiff.ops import dispatch
from tests.ops import describe, sweep
from tests.ops.describe_all import DESCRIPTIONS, cells_of

REPEATS = (50, pytest.param(250, marks=pytest.mark.slow))
BACKENDS = [b for b in ("cpp", "triton", "cuda") if dispatch.reason("q_sample", b) is None]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def large(name):
    """A cell with several tiles of several images, and every option that it may have."""

    def size(cell):
        return torch.Size(cell.get("shape", ())).numel() * (cell.get("regime", "plain") == "plain")

    if name == "time_embed":
        return next(c for c in cells_of(name) if c["dim"] == 2061 and c["t"] == "steps")
    if name == "attention":
        # several parts of a head, and several panels of keys
        return cells_of(name)[0] | {"shape": (2, 170, 40), "heads": 2, "regime": "plain", "threads": None}
    if name == "attention across":
        return cells_of(name)[0] | {"shape": (2, 170, 600, 40), "heads": 2, "regime": "plain", "threads": None}
    if name == "norm_linear":
        # several chunks of tokens, blocks of channels and groups of panels
        own = {"shape": (2, 150, 2100, 330), "regime": "plain", "norm": "both", "residual": "contiguous"}
        return cells_of(name)[0] | own | {"threads": None}
    factors = DESCRIPTIONS[name].factors
    if "spec" not in factors:
        return max(cells_of(name), key=size) | {"shape": (3, 3, 45, 43)}
    # enough numbers for a second thread, and pieces of a channel that are summed apart
    own = {"spec": (1, 10, 10, (37, 29), 4), "regime": "plain", "add": "image", "affine": "both"}
    return cells_of(name)[0] | own | {k: None for k in ("threads",) if k in factors}


def bits(got):
    return [v.clone() for v in got.values()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", DESCRIPTIONS)
@pytest.mark.parametrize("repeats", REPEATS)
def test_repeats_are_bit_equal(name, layout, backend, repeats, threads):
    what = DESCRIPTIONS[name]
    cell = large(name)
    if not sweep.runs(what, backend) or ("layout" not in cell and layout == "channels_last"):
        pytest.skip(f"no {backend} kernel here, or no layout")
    args = describe.made(what, cell | ({"layout": layout} if "layout" in cell else {}))
    with dispatch.backend(backend):
        threads(1)
        wanted = bits(what.call(args))
        for repeat in range(repeats):
            threads(1 + repeat % 2)
            assert all(same(a, b) for a, b in zip(wanted, what.call(args).values(), strict=True)), repeat


def same(a, b):
    """Bit for bit; NaN is NaN."""
    return torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)) and torch.equal(a.isnan(), b.isnan())


SHARED = ("weight", "bias", "norm_weight", "norm_bias", "table", "rows", "seed", "k")


def one(args, n, images):
    """The arguments of image n alone."""

    def cut(name, v):
        if name in SHARED or not isinstance(v, Tensor) or v.ndim == 0:
            return {k: cut(k, w) for k, w in v.items()} if isinstance(v, dict) else v
        if name == "h":
            return v[:, n : n + 1].contiguous()
        if v.shape[0] == 2 * images and name in ("F", "x_in"):
            return torch.cat([v[n : n + 1], v[images + n : images + n + 1]])
        # one number a channel has no image to be cut out
        shared = v.shape[0] != images or (name in ("add", "scale", "shift") and v.ndim == 1)
        return v if shared else v[n : n + 1]

    return {name: cut(name, v) for name, v in args.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_an_image_does_not_depend_on_the_batch(name, backend):
    """Alone, and beside an image that is full of NaN; gradients of what the images share are sums, and left out."""
    what, seen = DESCRIPTIONS[name], 0
    if not sweep.runs(what, backend):
        pytest.skip(f"no {backend} kernel here")
    for cell in cells_of(name):
        shape = cell.get("shape") or cell.get("spec", (11,))
        images = 11 if name == "time_embed" else shape[0]
        wrong_layout = "shared" in (cell.get("layout"), cell.get("F_layout"), cell.get("noise_layout"))
        if images < 2 or cell.get("out") or wrong_layout or cell.get("t") in ("none", "one"):
            continue
        args = describe.made(what, cell)
        with dispatch.backend(backend):
            together, alone = what.call(args), what.call(one(args, 1, images))
        for key, v in alone.items():
            if key in ("x", "x0", "x_t", "eps", "v", "z", "y", "e", "x2", "noise") and v.shape[0] == 1:
                assert same(v[0], together[key][1]), f"{key} of {describe.named(cell)}"
                seen += 1
    assert seen >= 20
