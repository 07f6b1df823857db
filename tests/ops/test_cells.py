"""Every backend on every cell: error at most twice (gradients: three times) PyTorch's own against float64.

What this process can run: cpp on a CPU, cuda and triton on a GPU, and triton in its interpreter where
TRITON_INTERPRET=1 is set; a tenth of the cells runs there in processes of its own.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastdiff.ops import dispatch
from tests.ops import describe, pairwise, sweep
from tests.ops.describe_all import DESCRIPTIONS, cells_of
from tests.process import together

ROOT = Path(__file__).parents[2]
CELLS = [(name, number) for name in DESCRIPTIONS for number in range(len(cells_of(name)))]
BACKENDS = ("cpp", "triton", "cuda")
"""The reference is what the others are measured by; its own test is in float64."""


@pytest.fixture(scope="module", autouse=True)
def _on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "number"), CELLS)
def test_cell(name, number):
    what, cell = DESCRIPTIONS[name], cells_of(name)[number]
    found = {b: sweep.complaints(what, cell, b) for b in BACKENDS if sweep.runs(what, b)}
    assert not any(found.values()), f"{describe.named(cell)}: {found}"


@pytest.mark.skipif(dispatch.reason("q_sample", "cpp") is not None, reason="no compiled kernels here")
def test_how_many_cells_the_compiled_kernels_have():
    """All ops have a C++ kernel, and none of their cells is passed by."""
    assert sum(sweep.runs(DESCRIPTIONS[name], "cpp") for name, _ in CELLS) == len(CELLS) >= 500


@pytest.mark.parametrize("name", [name for name in DESCRIPTIONS if name != "normal"])
def test_the_reference_is_the_formula(name):
    """In float64, where rounding hides nothing: of its error in the cell's own dtype the last places are left."""
    what, compared = DESCRIPTIONS[name], 0
    for cell in cells_of(name):
        at = describe.known(what, cell)
        args = describe.cast(at.args, torch.float64) | ({"t": at.args["t"].double()} if "dim" in at.args else {})
        wanted, got = what.oracle(args), describe.ran(what, args, "reference")
        for key, error in describe.errors(got, wanted).items():
            if got[key].dtype == torch.float64 and not sweep.empty(at.args):
                bound = 1e-7 * at.plain[key] + 1e-12 * (describe.by_row(wanted[key].abs()) + describe.magnitude(args))
                assert (error <= bound).all(), f"{key} of {describe.named(cell)}: {error} over {bound}"
                compared += 1
    assert compared >= 50


@pytest.mark.timeout(900)
def test_a_tenth_of_the_cells_in_the_interpreter():
    """Triton's kernels on CPU tensors; TRITON_INTERPRET is read when triton is imported, so in another process."""
    pytest.importorskip("triton", reason="the interpreter is triton's")
    code = f"import sys; sys.path.append({str(ROOT)!r}); from tests.ops import sweep; sweep.main('triton', 20, %d)"
    commands = [[sys.executable, "-P", "-W", "ignore", "-c", code % first] for first in (0, 10)]
    ran: Counter[str] = Counter()
    for done in together(*commands, seconds=850, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""):
        assert done.returncode == 0, done.stdout + done.stderr
        ran.update({line.split(":")[0]: int(line.split()[-1]) for line in done.stdout.splitlines()})
    assert set(ran) == {name for name in DESCRIPTIONS if "triton" in dispatch._table[DESCRIPTIONS[name].op]}
    assert sum(ran.values()) >= 0.1 * sum(len(cells_of(name)) for name in ran)


def test_tensors_keep_their_strides_on_the_way_to_a_device():
    for layout in describe.LAYOUTS:
        v = describe.laid(torch.randn(2, 3, 4, 5), layout)
        got = describe.moved({"v": v}, "cpu")["v"]
        assert torch.equal(v, got)
        assert (got.stride(), got.storage_offset()) == (v.stride(), v.storage_offset())


@pytest.mark.slow
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_the_product(name):
    """300 cells of each description's full product: 2,700 together. On a GPU `pytest -m gpu` runs them."""
    what = DESCRIPTIONS[name]
    backends = [b for b in BACKENDS if sweep.runs(what, b)]
    for cell in pairwise.sampled(what.factors, seed=100 + what.seed, count=300):
        found = {b: sweep.complaints(what, cell, b) for b in backends}
        assert not any(found.values()), f"{describe.named(cell)}: {found}"
