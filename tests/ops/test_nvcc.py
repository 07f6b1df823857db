"""Every .cu through nvcc for sm_80 and sm_90: it compiles without a warning, keeps everything in registers, moves 16
bytes at a time, and stays within its budget of instructions. Registers and counts are recorded in the test's log.
"""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.ops import sass

SOURCES = sorted(sass.CUDA.glob("*.cu"))
WIDE_LOAD, WIDE_STORE = r"LDG\.E\S*\.128", r"STG\.E\S*\.128"
REGISTERS = 128  # 256 threads, two blocks a processor
INSTRUCTIONS = 44  # an element, noise included: KERNELS section 3
WIDTH = 8  # elements of a thread

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH"),
    pytest.mark.skipif(sass.cuobjdump() is None, reason="neither nvcc's cuobjdump nor triton's is here"),
]


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def kernels(request, tmp_path_factory):
    """By source, in mangled names."""
    one = partial(sass.compiled, arch=request.param, folder=tmp_path_factory.mktemp("cubin"))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((source.stem for source in SOURCES), pool.map(one, SOURCES), strict=True))


def named(kernels, source, *parts):
    """The kernels of a source whose mangled names hold all of `parts`."""
    found = [k for k in kernels[source] if all(re.search(part, k.name) for part in parts)]
    assert found, (source, parts)
    return found


def test_no_stack_and_no_spill(kernels, record_property):
    for source, compiled in kernels.items():
        for k in compiled:
            record_property(f"{source} {k.name}", f"{k.registers} registers, {len(k.code)} instructions")
            assert (k.stack, k.spill) == (0, 0), k.name
            assert k.registers <= REGISTERS, k.name
            assert not k.count(r"\b(LDL|STL)\b"), k.name
    assert sum(map(len, kernels.values())) >= 60


def test_sixteen_bytes_at_a_time(kernels):
    """VECTORS and PIXELS of the elementwise kernel (AccessE0, E1) and every kernel made of `Vectors`."""
    for k in named(kernels, "q_sample", "AccessE0"):
        assert k.count(WIDE_STORE) >= 2, k.name
        # eight bytes hold eight pixels
        pixels = "_0EhL" in k.name
        assert k.count(r"LDG\.E\S*\.64" if pixels else WIDE_LOAD) >= ("Normal" not in k.name), k.name
    for k in named(kernels, "step", "AccessE[01]"):
        assert k.count(WIDE_LOAD) >= 4, k.name
        assert k.count(WIDE_STORE) >= 2, k.name
    for source in ("group_norm", "group_norm_backward"):
        for k in named(kernels, source, "Vectors"):
            assert k.count(WIDE_LOAD) >= 4, k.name
            if not re.search("split_(moments|sums)", k.name):
                assert k.count(WIDE_STORE) >= 1, k.name


def test_a_residual_in_sixteen_bytes(kernels):
    """As many words more as x has, twice as many where it is fp32 beside sixteen bits; four of x are on their way."""
    for kind, words in (("NoResidual", 4), (r"\d+ResidualI", 8), ("WideResidual", 12)):
        for k in named(kernels, "group_norm", "apply", "Vectors", kind):
            assert k.count(WIDE_LOAD) >= words, k.name


def test_instructions_of_the_noise(kernels, record_property):
    """Whole kernels, every output included, for what draws its own noise; of step_ the way of a row with x, F and z."""
    for k in [*named(kernels, "q_sample", "AccessE0", "Normal"), *named(kernels, "q_sample", "AccessE0.*Lb1E")]:
        assert k.count(r"MUFU\.COS") == WIDTH // 2, k.name
        record_property(f"instructions an element, {k.name}", len(k.code) / WIDTH)
        assert len(k.code) <= INSTRUCTIONS * WIDTH, k.name
    # uniform numbers 8, C_OUT or A, B0, S: 8 each; Box-Muller 20, the other terms and C_IN 8 each
    way = {r"MUFU\.COS": 4, r"\bFFMA\b": 32, r"\bFMUL\b": 44, WIDE_STORE: 3}
    for k in named(kernels, "step", "AccessE0.*(Ef|Bfloat).*Lb0E"):
        least = sass.fewest(k, way) / WIDTH
        record_property(f"instructions an element, {k.name}", least)
        assert least <= INSTRUCTIONS, k.name


def test_nan_passes_the_clip(kernels):
    """The hardware's min and max that keep NaN: two for each element."""
    for k in named(kernels, "step", "Step"):
        assert k.count(r"FMNMX\.NAN") >= 2 * WIDTH, k.name


def test_clusters(kernels, request):
    """One pass exchanges through a cluster's shared memory on sm_90, and knows nothing of clusters before."""
    clusters = "sm_90" in request.node.name
    for source in ("group_norm", "group_norm_backward"):
        for k in named(kernels, source, "one_pass"):
            assert bool(k.count(r"UCGABAR|BAR\.\S*CGA|CCTL\.\S*CGA|MAPA|CGA")) == clusters, k.name
