"""The Triton kernel of time_embed, run by the interpreter, against float64."""

import pytest
import torch

from fastdiff.ops import time_embed_triton
from fastdiff.ops.time_embed import time_embed_ref

TIMES = {
    "steps": torch.tensor([0, 1, 17, 999, 10**6, 999983]),
    "unit": torch.linspace(0, 1, 12),
    "real": torch.tensor([3.25, 1e-3, 123456.78, -5.5, -1e6, 1e-30]),
    "half": torch.tensor([0.5, 640.0, 1.25]).bfloat16(),
    "none": torch.zeros(0),
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(
    ("dim", "options"),
    [
        (8, {}),
        (128, {"shift": 1.0, "flip": True}),
        (33, {"scale": 1000.0}),
        (512, {"max_period": 100.0}),
        (1200, {"flip": True, "scale": 0.25}),
        (2, {}),
        (1, {"shift": -1.0}),
    ],
)
def test_error_at_most_twice_the_references(times, dim, options):
    t = TIMES[times] if "scale" not in options else TIMES[times] / options["scale"]
    wanted = time_embed_ref(t.double(), dim, **options)
    got, reference = time_embed_triton.run(t, dim, **options), time_embed_ref(t, dim, **options)
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    limit = 2 * (reference - wanted).abs() + torch.finfo(torch.float32).eps
    assert ((got - wanted).abs() <= limit).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype):
    t = torch.linspace(0, 1000, 9)
    assert torch.equal(time_embed_triton.run(t, 65, dtype=dtype), time_embed_triton.run(t, 65).to(dtype))


def test_what_is_no_time_gives_nan():
    got = time_embed_triton.run(torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]), 9)
    assert got[:3, :8].isnan().all()
    assert (got[:, 8] == 0).all()
    assert got[3].isfinite().all()
